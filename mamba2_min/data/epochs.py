"""What every iterator over training batches shares: endless epochs, each in a new order, resumed to the batch."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mamba2_min.errors import UserError


class Epochs(ABC):
    """An endless iterator of batches. Its order depends on `seed`, the epoch and the sizes of the data alone.

    So `state_dict` is a few integers, and `load_state_dict` goes on with the very next batch. A subclass sets `sizes`,
    what the saved place belongs to by name; implements `_shuffle` and `_draw`, which counts `position` up to `length`;
    and calls `_begin(0)` when it has what these need.

    While a GPU is at work, `draw_ahead` draws the next batch already. `state_dict` and `epochs` still tell the place
    after the last batch that was taken; `epoch` and `position` are then ahead of it.
    """

    context: int  # tokens per window
    note: str | None = None  # a line for the user
    targets_per_epoch: int
    seed: int
    sizes: dict[str, int]
    # A batch that was drawn ahead, with `state_dict` and `epochs` as they were before it.
    _ahead: tuple[tuple[Tensor, ...], dict[str, int], float] | None = None

    @property
    @abstractmethod
    def length(self) -> int:
        """Where `position` ends in the present epoch."""

    @abstractmethod
    def _shuffle(self, generator: torch.Generator) -> None:
        """Draws the order of an epoch."""

    @abstractmethod
    def _draw(self) -> tuple[Tensor, ...]:
        """The next batch, from `epoch` and `position`."""

    def __next__(self) -> tuple[Tensor, ...]:
        if self._ahead is None:
            return self._draw()
        batch, self._ahead = self._ahead[0], None
        return batch

    def __iter__(self) -> Epochs:
        return self

    def draw_ahead(self) -> None:
        """Draws the batch that `next` will return, unless that is done already."""
        if self._ahead is None:
            before = self.state_dict(), self.epochs
            self._ahead = (self._draw(), *before)

    @property
    def epochs(self) -> float:
        """How often the data has been gone through, after the last batch that was taken, such as 2.25."""
        return self._ahead[2] if self._ahead else self.epoch + self.position / self.length

    def state_dict(self) -> dict[str, int]:
        """The place in the data, after the last batch that was taken."""
        if self._ahead:
            return dict(self._ahead[1])
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position, **self.sizes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to the place that `state_dict` gave. Raises UserError where it is damaged, or of other data."""
        damaged = UserError("cannot go on: the saved place in the data is damaged")
        if state.keys() != self.state_dict().keys() or any(type(value) is not int for value in state.values()):
            raise damaged
        for name, here in self.sizes.items():
            if state[name] != here:
                raise UserError(f"cannot go on at the saved place in the data: {name} {state[name]} then, {here} now")
        self.seed, self._ahead = state["seed"], None
        self._begin(state["epoch"])
        if not 0 <= state["position"] <= self.length:
            raise damaged
        self.position = state["position"]

    def _begin(self, epoch: int) -> None:
        self.epoch, self.position = epoch, 0
        self._shuffle(torch.Generator().manual_seed(seed_of(self.seed, epoch)))


def seed_of(*numbers: int) -> int:
    """A seed for a random generator, made of several numbers: near ones give seeds that are far apart."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:7], "little")
