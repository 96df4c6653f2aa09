"""The measures that runs are compared by, each with what chance would reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

GAMES = 400  # rows of each game of recall; a row of associations asks four times


@dataclass(frozen=True)
class Axis:
    """A measure: its `key` in the results, its `label`, and whether more of it is better.

    chance: what a model reaches that knows nothing; None where there is no such thing (time, memory): that axis is
    scaled by the ratio to the best. noise: what lies no further than this from chance counts as chance, or else the
    luckiest of runs that know nothing would be drawn as the best. digits: after the point, in tables.
    """

    key: str
    label: str
    chance: float | None
    more_is_better: bool = True
    noise: float = 0.0
    digits: int = 3

    def text(self, value: float | None) -> str:
        """The value for a table."""
        return "-" if value is None else f"{value:,.{self.digits}f}"

    def best(self, values: Sequence[float]) -> float:
        return max(values) if self.more_is_better else min(values)

    def scaled(self, values: Sequence[float | None]) -> list[float]:
        """Each value on the way from chance (0) to the best of them (1); 0 for what is below chance or missing."""
        known = [v for v in values if v is not None and math.isfinite(v)]
        if not known:
            return [0.0] * len(values)
        best = self.best(known)
        return [0.0 if v not in known or v is None else self._share(v, best) for v in values]

    def _share(self, value: float, best: float) -> float:
        if self.chance is None:
            share = value / best if self.more_is_better else best / value
        else:
            gain, most = ((v - self.chance) * (1 if self.more_is_better else -1) for v in (value, best))
            share = gain / most if gain > self.noise else 0.0
        return min(1.0, max(0.0, share))


def noise(chance: float, answers: int) -> float:
    """Three standard errors of the share that is right of so many answers by guessing."""
    return 3 * math.sqrt(chance * (1 - chance) / answers)


AXES = (
    Axis("reset", "bits per byte, empty state", None, more_is_better=False),
    Axis("carried", "bits per byte, state carried", None, more_is_better=False),
    Axis("distinct", "distinct three-word phrases", 0.0),
    Axis("loop_free", "loop-free share, greedy", 0.0),
    Axis("closure", "texts that end by themselves", 0.0),
    Axis("induction", "recall: induction", 1 / 15, noise=noise(1 / 15, GAMES)),
    Axis("association", "recall: association", 1 / 8, noise=noise(1 / 8, 4 * GAMES)),
    Axis("write", "tokens written per second", None, digits=0),
    Axis("read", "tokens read per second", None, digits=0),
    Axis("memory", "weights and state, MB", None, more_is_better=False, digits=1),
)


def axes_for(bits_by_chance: float) -> tuple[Axis, ...]:
    """AXES, where a model without any knowledge has so many bits per byte."""
    return tuple(replace(a, chance=bits_by_chance) if a.key in ("reset", "carried") else a for a in AXES)
