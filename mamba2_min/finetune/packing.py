"""Conversations in batches: several in a row of tokens, none cut, none seeing another.

A row has room for `context` tokens; for a longer conversation, twice as many, four times, and so on. Rows are filled by
best fit: the longest conversation first, each into the fullest row that still has room. `seq_idx` numbers the
conversations of a row, so that the model's state and convolution begin again with each of them. The rest of a row is
padding: a conversation of its own, without targets. A step has about the same number of tokens whatever the length of
its rows: twice the length, half the rows.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor

from mamba2_min.data.epochs import Epochs
from mamba2_min.errors import UserError
from mamba2_min.finetune.conversations import Example
from mamba2_min.ops.loss import IGNORE

Batch = tuple[Tensor, Tensor, Tensor]  # input_ids, targets, seq_idx: (b, l) int64


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Best fit, longest first: for each row, the indices of what is in it. No length may exceed `room`."""
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (room left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(left, (lengths[i], -1))
        if at == len(left):
            rows.append([i])
            bisect.insort(left, (room - lengths[i], len(rows) - 1))
        else:
            free, row = left.pop(at)
            rows[row].append(i)
            bisect.insort(left, (free - lengths[i], row))
    return rows


def lay_out(examples: Sequence[Example], rows: Sequence[Sequence[int]], room: int) -> Batch:
    """Rows of `room` tokens: input_ids, targets (IGNORE where nothing is learnt) and seq_idx, each (b, room)."""
    input_ids = torch.zeros(len(rows), room, dtype=torch.long)
    targets = torch.full_like(input_ids, IGNORE)
    seq_idx = torch.full_like(input_ids, -1)  # the padding's number
    for r, row in enumerate(rows):
        end = 0
        for k, i in enumerate(row):
            start, end = end, end + len(examples[i])
            input_ids[r, start:end] = examples[i].ids[:-1]
            targets[r, start:end] = examples[i].targets
            seq_idx[r, start:end] = k
    return input_ids, targets, seq_idx


class PackedWindows(Epochs):
    """An endless iterator of training batches over examples, in a new random order each epoch.

    In each epoch every example occurs exactly once. With `alone` each row holds one example.
    """

    _batches: list[tuple[int, list[list[int]]]]

    def __init__(
        self, examples: Sequence[Example], context: int, batch_size: int, seed: int = 0, alone: bool = False
    ) -> None:
        """Raises UserError where there is no example, ValueError for sizes below 1."""
        if context < 1 or batch_size < 1:
            raise ValueError(f"context and batch_size must be at least 1, not {context} and {batch_size}")
        if not examples:
            raise UserError("nothing to learn from: the training part has no record")
        self.examples, self.batch_size, self.seed, self.alone = examples, batch_size, seed, alone
        self.context = context
        self.targets_per_epoch = sum(int(example.learnt.sum()) for example in examples)
        self.sizes = {"context": context, "batch_size": batch_size, "examples": len(examples)}
        self._begin(epoch=0)

    @property
    def length(self) -> int:
        return len(self._batches)

    def _draw(self) -> Batch:
        if self.position == len(self._batches):
            self._begin(self.epoch + 1)
        room, rows = self._batches[self.position]
        self.position += 1
        return lay_out(self.examples, rows, room)

    def _shuffle(self, generator: torch.Generator) -> None:
        shuffled = torch.randperm(len(self.examples), generator=generator).tolist()
        batches = batches_of(self.examples, shuffled, self.context, self.batch_size, self.alone)
        order = torch.randperm(len(batches), generator=generator).tolist()
        self._batches = [batches[i] for i in order]


def batches_of(
    examples: Sequence[Example], order: Sequence[int], context: int, batch_size: int, alone: bool = False
) -> list[tuple[int, list[list[int]]]]:
    """(room, rows of example indices) for each batch, over all examples once; equal lengths keep to `order`."""
    by_room: dict[int, list[int]] = {}
    for i in order:
        room = context
        while room < len(examples[i]):
            room *= 2
        by_room.setdefault(room, []).append(i)
    batches = []
    for room, members in sorted(by_room.items()):
        lengths = [len(examples[i]) for i in members]
        rows = [[k] for k in range(len(members))] if alone else pack(lengths, room)
        count = max(1, batch_size * context // room)
        named = [[members[k] for k in row] for row in rows]
        batches += [(room, named[start : start + count]) for start in range(0, len(named), count)]
    return batches
