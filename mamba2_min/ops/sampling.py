"""From logits to a token: temperature, top-k, top-p, min-p and what prevents repetition, as plain functions of tensors.

    logits ─► repetition penalty ─► no repeats ─► temperature ─► top-k ─► top-p ─► min-p ─► draw ─► token

Each of the three cuts keeps the likeliest tokens and drops a tail. Nothing is sorted: `draw` finds out whether a token
lies in the top-p nucleus after it has been drawn, from the weight of those before it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mamba2_min import validate

_LARGEST = 2**63 - 1
_LOOP = 256  # tokens within which `no_repeat` looks back


def penalise(scores: Tensor, ids: Sequence[int], penalty: float) -> Tensor:
    """The logits with every token of `ids` made less likely, however often it occurs (CTRL, arXiv:1909.05858, 4.1).

    scores (v,) float; ids within [0, v). Returns a new (v,): positive logits divided by `penalty`, others multiplied.
    """
    index = torch.tensor(sorted(set(ids)), dtype=torch.long, device=scores.device)
    old = scores[index]
    return scores.index_put((index,), torch.where(old > 0, old / penalty, old * penalty))


def repeats(ids: Sequence[int], size: int) -> list[int]:
    """The tokens that would make the last `size` tokens a run that `ids` already holds; ids has the latest last."""
    last = list(ids[len(ids) - size + 1 :]) if len(ids) >= size > 1 else []
    if not last:
        return list(ids) if size == 1 else []
    ends = (i for i in range(size - 1, len(ids)) if ids[i - 1] == last[-1])
    return [ids[i] for i in ends if list(ids[i - size + 1 : i]) == last]


def draw(weights: Tensor, mass: float = math.inf, generator: torch.Generator | None = None) -> int:
    """The index of one token, drawn by weight from the nucleus: the fewest likeliest that together weigh `mass`.

    weights (v,) float64 on the CPU, >= 0, of any finite sum above 0; among equal weights the lower index comes first.
    The likeliest token always belongs to the nucleus. It samples by rejection instead of sorting: a token is drawn from
    all of them, and if those before it already weigh `mass`, it and all behind it are dropped and the draw is repeated.
    The result is distributed by weight over the nucleus, after about 1 / top_p rounds.
    """
    while True:
        # Inverse of the cumulative distribution. A uniform double is at most 1 - 2^-53, so the product stays below the
        # sum, and with right=True a token of weight 0 is never found.
        cumulative = weights.cumsum(0)
        uniform = torch.rand((), dtype=torch.float64, generator=generator, device="cpu")
        found = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
        if mass == math.inf:
            return found
        ahead = weights > weights[found]
        ahead[:found] |= weights[:found] == weights[found]
        weights = torch.where(ahead, weights, 0.0)
        before = float(weights.sum())
        if before == 0 or before < mass:
            return found


def _cpu_generator() -> torch.Generator:
    return torch.Generator("cpu")


@dataclass(frozen=True)
class Sampler:
    """Picks tokens. Its values are checked at construction (ValueError, one line); it owns its random numbers.

    temperature     0 is greedy, the lowest id among equals; 1 is the model's own distribution
    top_k           only the k likeliest, whichever of those that are equal in the last place; 0 is off
    top_p           only the fewest likeliest that hold this share of what top_k left; 1 is off, 0 keeps one
    min_p           only those at least this fraction as likely as the likeliest; 0 is off
    repeat_penalty  above 1, tokens among the last `repeat_window` become less likely; 1 is off
    seed            None: different every time
    no_repeat       so many tokens in a row are not written twice within 256: no loops; 0 is off
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None
    repeat_window: int = 64
    no_repeat: int = 0
    _generator: torch.Generator = field(default_factory=_cpu_generator, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        validate.number("temperature", self.temperature, 0, math.inf)
        validate.number("top_p", self.top_p, 0, 1)
        validate.number("min_p", self.min_p, 0, 1)
        validate.number("repeat_penalty", self.repeat_penalty, 1e-3, 1e3)
        validate.integer("top_k", self.top_k, 0, _LARGEST)
        validate.integer("repeat_window", self.repeat_window, 0, _LARGEST)
        validate.integer("no_repeat", self.no_repeat, 0, _LARGEST)
        if self.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(validate.integer("seed", self.seed, 0, _LARGEST))

    def adjusted(self, **changes: Any) -> Sampler:
        """A sampler with other values that goes on with the same random numbers (a new seed starts new ones)."""
        other = dataclasses.replace(self, **changes)
        if "seed" not in changes:
            object.__setattr__(other, "_generator", self._generator)
        return other

    @property
    def window(self) -> int:
        """How many of the last tokens `pick` looks at."""
        return max(self.repeat_window, _LOOP) if self.no_repeat else self.repeat_window

    def pick(self, logits: Tensor, history: Sequence[int] | deque[int] = ()) -> int:
        """One token id from logits (v,) of any float type and device; history: the ids so far, the latest last.

        Costs the same however long `history` is. FloatingPointError where the largest logit is NaN or infinite.
        """
        scores = logits.detach().cpu().double()  # float64, so that no temperature above 0 rounds to 0
        if self.repeat_penalty != 1 and history:
            scores = penalise(scores, list(islice(reversed(history), self.repeat_window)), self.repeat_penalty)
        if self.no_repeat and (again := repeats(list(islice(reversed(history), _LOOP))[::-1], self.no_repeat)):
            without = scores.index_fill(0, torch.tensor(again), -math.inf)
            scores = without if without.isfinite().any() else scores
        likeliest = int(scores.numpy().argmax())  # a tenth of the time of PyTorch's; of equals the first, or a NaN
        peak = float(scores[likeliest])
        if not math.isfinite(peak):
            raise FloatingPointError(f"the model's largest logit is {peak}: its weights are broken")
        if self.temperature == 0 or self.top_k == 1:
            return likeliest
        weights = (scores - peak).div_(self.temperature).exp_()  # the likeliest weighs 1
        ids = None
        if 0 < self.top_k < weights.numel():
            ids = scores.topk(self.top_k).indices  # not of the weights, where what hardly differs is equal
            weights = weights[ids]
        mass = self.top_p * float(weights.sum()) if self.top_p < 1 else math.inf
        if self.min_p > 0:
            weights = torch.where(weights >= self.min_p, weights, 0.0)
        found = draw(weights, mass, self._generator)
        return found if ids is None else int(ids[found])
