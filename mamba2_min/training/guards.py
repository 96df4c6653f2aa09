"""What may come between two steps of a training, and what is done about it: signals, and losses that go wrong."""

from __future__ import annotations

import math
import signal
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NOT_FINITE, JUMPED = "not finite", "jumped"

_REMEMBERED = 64  # accepted losses that a new one is held against
_ENOUGH = 16  # of them, before anything is held against them
_LEAST_SPREAD = 0.1  # nats: a curve smoother than that is no reason to call a small rise a jump


class LossGuard:
    """Judges every step's loss and gradient, and counts the steps that were skipped.

    A step is bad where its loss or the norm of its gradient is not finite, or where the loss has jumped: it exceeds the
    median of the last 64 accepted losses by more than `spike` times their usual deviation, which is 1.4826 times the
    median distance from that median (the standard deviation, were they normal) and at least 0.1 nats. Medians do not
    move for the one loss that is wrong. Nothing has jumped before 16 were accepted, nor where `spike` is 0.
    """

    def __init__(self, spike: float):
        self.spike = spike
        self.recent: list[float] = []
        self.in_a_row = 0  # bad steps, up to now
        self.skipped = 0  # bad steps in all
        self.reason = ""  # why the last bad step was bad

    def judge(self, loss: float, norm: float, share: float = 1.0) -> str:
        """Why the step must not be taken, or "". `share`: of a batch's positions, those that have a target.

        The mean over fewer targets scatters more, by the root of their number.
        """
        why = self._fault(loss, norm, share)
        if why:
            self.in_a_row += 1
            self.skipped += 1
            self.reason = why
        else:
            self.in_a_row = 0
            self.recent = [*self.recent, loss][-_REMEMBERED:]
        return why

    def _fault(self, loss: float, norm: float, share: float) -> str:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return NOT_FINITE
        if not self.spike or len(self.recent) < _ENOUGH:
            return ""
        median = statistics.median(self.recent)
        spread = 1.4826 * statistics.median(abs(past - median) for past in self.recent)
        limit = median + self.spike * max(spread, _LEAST_SPREAD) / math.sqrt(share)
        return JUMPED if loss > limit else ""

    def state_dict(self) -> dict[str, Any]:
        return {"recent": list(self.recent), "in_a_row": self.in_a_row, "skipped": self.skipped, "reason": self.reason}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave. Raises ValueError for anything else."""
        recent = state["recent"]
        if not isinstance(recent, list) or not all(isinstance(loss, float) and math.isfinite(loss) for loss in recent):
            raise ValueError("its recent losses are not numbers")
        if type(state["in_a_row"]) is not int or type(state["skipped"]) is not int:
            raise ValueError("its counts of skipped steps are not numbers")
        self.recent, self.in_a_row, self.skipped = list(recent), state["in_a_row"], state["skipped"]
        self.reason = str(state["reason"])


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Within, the first SIGINT or SIGTERM is noted in the list that it yields, for a loop to end at a whole step; the
    next of either ends the process at once. Outside of the main thread nothing is changed."""
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)

    try:
        old = {number: signal.signal(number, note) for number in numbers}
    except ValueError:  # not the main thread
        old = {}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
