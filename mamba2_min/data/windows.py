"""From a stream of tokens to batches: windows in random order to train on, the stream in order to validate with."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mamba2_min.data.epochs import Epochs
from mamba2_min.data.findings import counted
from mamba2_min.errors import UserError
from mamba2_min.ops.loss import IGNORE


class Windows(Epochs):
    """An endless iterator of training batches: (input_ids, targets), each (b, l) int64, targets one token ahead.

    In each epoch every target `tokens[1:]` occurs exactly once. The stream is cut into windows of `context` tokens,
    at a new random phase each epoch, so that no token is always the first of a window, and the windows come in a new
    random order. The two windows at the ends of the stream are shorter; they are filled up on the right with id 0 and
    target -100. Batches all have the same shape: what an epoch leaves over starts the batch with which the next begins.

    Where the stream is shorter than `context`, `self.context` is what there is, and `self.note` says so (else None).
    """

    _starts: torch.Tensor  # (w,): the index of each window's first input, in the order of this epoch

    def __init__(self, tokens: torch.Tensor, context: int, batch_size: int, seed: int = 0):
        """`tokens` (l,), on the CPU. Raises UserError for fewer than two tokens, ValueError for sizes below 1."""
        if context < 1 or batch_size < 1:
            raise ValueError(f"context and batch_size must be at least 1, not {context} and {batch_size}")
        self.targets_per_epoch = len(tokens) - 1
        if self.targets_per_epoch < 1:
            raise UserError(f"nothing to learn from: the training part has {counted(len(tokens), 'token')}, not two")
        self.tokens, self.batch_size, self.seed = tokens, batch_size, seed
        self.context = min(context, self.targets_per_epoch)
        self.note = None
        if self.context < context:
            self.note = f"context {context} shortened to {self.context}: the training part has {len(tokens)} tokens"
        self.sizes = {"context": self.context, "tokens": len(tokens)}
        self._begin(epoch=0)

    def _draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = []
        missing = self.batch_size
        while missing:
            if self.position == len(self._starts):
                self._begin(self.epoch + 1)
            chosen.append(self._starts[self.position : self.position + missing])
            self.position += len(chosen[-1])
            missing -= len(chosen[-1])
        starts = torch.cat(chosen)[:, None]  # (b, 1)
        ends = (starts + self.context).clamp(max=self.targets_per_epoch)
        at = starts.clamp(min=0) + torch.arange(self.context)  # (b, l)
        inside = at < ends
        at = at * inside  # any index will do where nothing is read from it
        input_ids = self.tokens[at].long() * inside
        targets = self.tokens[at + 1].long().masked_fill(~inside, IGNORE)
        return input_ids, targets

    @property
    def length(self) -> int:
        return len(self._starts)

    def _shuffle(self, generator: torch.Generator) -> None:
        """Draws the phase and the order of the windows."""
        phase = int(torch.randint(self.context, (), generator=generator))
        # A window that starts before the stream keeps what lies inside of it: targets 0 to phase - 1.
        first = phase - self.context if phase else 0
        starts = torch.arange(first, self.targets_per_epoch, self.context)
        self._starts = starts[torch.randperm(len(starts), generator=generator)]


def validation_windows(
    tokens: torch.Tensor, context: int, start_id: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The stream in order, for evaluation with the state carried on: (input_ids, targets), each (1, l) int64.

    `l` is `context`, in the last window what is left. Each token but the first is the target once. With `start_id`
    the stream is read as if that token stood before it, and the first token is a target as well: with the
    end-of-document token there, the targets are exactly what `Corpus.validation_bytes` counts.
    Raises ValueError for a context below 1, UserError for a stream without a target.
    """
    if context < 1:
        raise ValueError(f"context must be at least 1, not {context}")
    if start_id is not None:
        tokens = torch.cat([tokens.new_tensor([start_id]), tokens])
    if len(tokens) < 2:
        raise UserError("nothing to validate with: the validation part has no token to predict")
    return _in_order(tokens, context)


def document_windows(
    tokens: torch.Tensor, starts: torch.Tensor, context: int, start_id: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]]:
    """Documents in order, each read after `start_id`: (input_ids, targets, seq_idx, new), the tensors (1, l) int64.

    `starts` (d,): where each document begins in `tokens`. Each token is the target once. seq_idx numbers the documents;
    `new`: the window begins with a new document, and so from an empty state, else it goes on with the one before it.
    A window has `context` tokens at most, and ends with a document where one ends in it.
    Raises UserError for a stream without a token.
    """
    if not len(tokens):
        raise UserError("nothing to validate with: the validation part has no token to predict")
    inputs = torch.cat([tokens.new_tensor([start_id]), tokens[:-1]])
    inputs[starts] = start_id
    ends = torch.cat([starts[1:], starts.new_tensor([len(tokens)])])
    begin = 0
    while begin < len(tokens):
        here, fit = torch.searchsorted(ends, torch.tensor([begin, begin + context]), right=True).tolist()
        end = int(ends[fit - 1]) if fit > here else begin + context  # `here` is the document that `begin` is in
        number = torch.searchsorted(ends, torch.arange(begin, end), right=True)
        new = int(starts[here]) == begin
        yield inputs[None, begin:end].long(), tokens[None, begin:end].long(), number[None], new
        begin = end


def _in_order(tokens: torch.Tensor, context: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, len(tokens) - 1, context):
        piece = tokens[start : start + context + 1].long()[None]  # (1, l + 1)
        yield piece[:, :-1], piece[:, 1:]
