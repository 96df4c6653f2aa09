"""The progress of a run, for any kind of display."""

from __future__ import annotations

from collections import Counter


class Progress:
    """How far a run is: documents `kept`, and `rejected` by reason. A subclass shows it as it likes."""

    def __init__(self) -> None:
        self.kept = 0
        self.rejected: Counter[str] = Counter()

    def keep(self) -> None:
        """A document was kept."""
        self.kept += 1

    def reject(self, reason: str) -> None:
        """An attempt came to nothing."""
        self.rejected[reason] += 1

    def tick(self) -> None:
        """Called several times a second."""

    def note(self, text: str) -> None:
        """Something happened that the user should know; the run goes on."""
