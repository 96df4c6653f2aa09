"""What can disturb a training between two steps, and how it is handled: bad losses, and signals."""

from __future__ import annotations

import math
import signal
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mamba2_min.training.distributed import launched

NOT_FINITE, JUMPED = "not finite", "jumped"

_REMEMBERED = 64  # accepted losses that a new one is compared with
_ENOUGH = 16  # of them, before anything is compared
_LEAST_SPREAD = 0.1  # nats: on a very smooth curve a small rise is not a jump


class LossGuard:
    """Judges every step's loss and gradient, and counts the steps that were skipped.

    A step is bad if its loss or the norm of its gradient is not finite, or if the loss jumps: if it exceeds the median
    of the last 64 accepted losses by more than `spike` times their spread. The spread is 1.4826 times the median
    distance from that median (the standard deviation of a normal distribution), and at least 0.1 nats; one wrong loss
    does not move a median. No loss counts as a jump before 16 were accepted, or if `spike` is 0.
    """

    def __init__(self, spike: float):
        self.spike = spike
        self.recent: list[float] = []
        self.in_a_row = 0  # bad steps, up to now
        self.skipped = 0  # bad steps in all
        self.reason = ""  # why the last bad step was bad

    def judge(self, loss: float, norm: float, share: float = 1.0) -> str:
        """Why the step must be skipped, or "". `share`: the share of the batch's positions that have a target.

        The mean over fewer targets scatters more, by the square root of their number.
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

    def forgive(self) -> None:
        """Forgets earlier losses and bad steps, after a change of the learning rate. Skipped steps stay counted."""
        self.recent, self.in_a_row = [], 0

    def state_dict(self) -> dict[str, Any]:
        return {"recent": list(self.recent), "in_a_row": self.in_a_row, "skipped": self.skipped, "reason": self.reason}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what `state_dict` returned. Raises ValueError for anything else."""
        recent = state["recent"]
        if not isinstance(recent, list) or not all(isinstance(loss, float) and math.isfinite(loss) for loss in recent):
            raise ValueError("its recent losses are not numbers")
        if type(state["in_a_row"]) is not int or type(state["skipped"]) is not int:
            raise ValueError("its counts of skipped steps are not numbers")
        self.recent, self.in_a_row, self.skipped = list(recent), state["in_a_row"], state["skipped"]
        self.reason = str(state["reason"])


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """A context that notes the first SIGINT, SIGTERM or SIGHUP in the list that it yields, so that a step can finish.

    The next SIGINT or SIGTERM ends the process at once, unless a launcher started it, which passes on what the terminal
    sends too. A further SIGHUP does not, because a window that closes may send several. A SIGHUP that is ignored, as
    under nohup, stays ignored. Outside of the main thread nothing changes.
    """
    caught: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # Windows has none
        numbers.append(signal.SIGHUP)

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        for each in () if launched() else (signal.SIGINT, signal.SIGTERM):
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
