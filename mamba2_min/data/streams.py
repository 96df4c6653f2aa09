"""Batches whose rows go on where they stopped: a state can be carried from each window to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from mamba2_min.data.epochs import Epochs
from mamba2_min.data.findings import counted
from mamba2_min.errors import UserError
from mamba2_min.ops.loss import IGNORE


class Streams(Epochs):
    """An endless iterator of training batches (input_ids, targets, seq_idx, fresh), for `Trainer` with a carried state.

    In each epoch the documents follow each other in a new random order, and every token is a target exactly once. The
    text is cut into `batch_size` rows of equal length, at a new random place; a batch is the next window of `context`
    tokens of each row. So row r of a batch goes on where row r of the batch before it stopped.

    input_ids, targets, seq_idx: (b, l) int64. A document is read after `start_id`; seq_idx numbers the documents, so
    that a model's state begins anew with each. fresh (b,) bool: the rows that begin from an empty state, because a
    document begins there or an epoch. What the last windows of an epoch lack is filled up with id 0, target -100 and
    seq_idx -1.

    Where a row is shorter than `context`, `self.context` is its length, and `self.note` says so (else None).
    """

    _order: Tensor  # (d,): the documents in the order of this epoch
    _ends: Tensor  # (d,): where each of them ends in this epoch's text

    def __init__(self, tokens: Tensor, starts: Tensor, context: int, batch_size: int, start_id: int, seed: int = 0):
        """`tokens` (l,), on the CPU; `starts` (d,): where each document begins, in order.

        Raises UserError for fewer tokens than rows, ValueError for sizes below 1.
        """
        if context < 1 or batch_size < 1:
            raise ValueError(f"context and batch_size must be at least 1, not {context} and {batch_size}")
        if len(tokens) < batch_size:
            raise UserError(
                f"nothing to learn from: the training part has {counted(len(tokens), 'token')} for {batch_size} rows"
            )
        self.tokens, self.starts, self.rows, self.start_id, self.seed = tokens, starts, batch_size, start_id, seed
        self.lengths = torch.diff(starts, append=starts.new_tensor([len(tokens)]))
        self.row_length = -(-len(tokens) // batch_size)
        self.context = min(context, self.row_length)
        self.targets_per_epoch = len(tokens)
        self.note = None
        if self.context < context:
            self.note = f"context {context} shortened to {self.context}: the training part has {len(tokens)} tokens"
        self.sizes = {"context": self.context, "rows": batch_size, "tokens": len(tokens)}
        self._begin(epoch=0)

    def _draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.position == self.length:
            self._begin(self.epoch + 1)
        at = self.position * self.context + torch.arange(self.context)  # within a row
        place = torch.arange(self.rows)[:, None] * self.row_length + at  # (b, l), within the text before its rotation
        inside = (at < self.row_length) & (place < len(self.tokens))
        place = (place + self._shift) % len(self.tokens)
        k = torch.searchsorted(self._ends, place, right=True)  # the document, in this epoch's order
        within = place - self._ends[k] + self.lengths[self._order[k]]
        index = self.starts[self._order[k]] + within
        targets = self.tokens[index].long().masked_fill(~inside, IGNORE)
        before = self.tokens[(index - 1).clamp(min=0)].long()
        input_ids = torch.where(within > 0, before, self.start_id) * inside
        fresh = (within[:, 0] == 0) | (self.position == 0)
        self.position += 1
        number = (within == 0).cumsum(1)
        return input_ids, targets, number.masked_fill(~inside, -1), fresh

    @property
    def length(self) -> int:
        """Batches per epoch."""
        return -(-self.row_length // self.context)

    def _shuffle(self, generator: torch.Generator) -> None:
        """Draws the order of the documents, and where the text is rotated to."""
        self._order = torch.randperm(len(self.starts), generator=generator)
        self._ends = self.lengths[self._order].cumsum(0)
        self._shift = int(torch.randint(len(self.tokens), (), generator=generator))


LONG = 16  # windows


def are_long(starts: Tensor, tokens: int, context: int) -> bool:
    """Whether more than half of a text lies in documents of more than 16 windows: then a carried state pays."""
    lengths = torch.diff(starts, append=starts.new_tensor([tokens]))
    return bool(2 * lengths[lengths > LONG * context].sum() > tokens)
