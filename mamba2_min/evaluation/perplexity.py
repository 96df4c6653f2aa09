"""The exact perplexity of a model on documents: each token counts once, with all of its document before it as context.

A document is scored from an empty state, as the completer begins one; or the state is carried on from one document to
the next. What is computed is exact: no window cuts a token's context off.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mamba2_min.data.windows import document_windows, validation_windows
from mamba2_min.models.base import LanguageModel
from mamba2_min.models.evaluating import evaluating
from mamba2_min.ops.autograd import widest

WINDOW = 2048  # tokens per forward pass; the state is carried over, so the result does not depend on it


@dataclass(frozen=True)
class Score:
    """The total surprise of `tokens` predictions that stand for `n_bytes` bytes of text, in nats."""

    nats: float
    tokens: int
    n_bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # e^710 overflows

    @property
    def bits_per_byte(self) -> float:
        """The only one of the three that compares models with different tokenizers."""
        return self.nats / math.log(2) / self.n_bytes

    def __str__(self) -> str:
        return f"{self.loss:>7.4f}  perplexity {self.perplexity:>9,.1f}  bits per byte {self.bits_per_byte:.4f}"

    def measures(self) -> dict[str, float]:
        """What a line of metrics.jsonl holds of it."""
        return {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


class Processes(Protocol):
    """Several processes, this one of `rank`; `total` adds the tensors of all of them up in place."""

    rank: int
    size: int

    def total(self, tensors: Sequence[Tensor]) -> None: ...


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    tokens: Tensor,
    n_bytes: int,
    start_id: int,
    window: int = WINDOW,
    autocast: contextlib.AbstractContextManager | None = None,
    starts: Tensor | None = None,
    processes: Processes | None = None,
) -> Score:
    """Scores `tokens` (l,), read in order after the token `start_id`.

    starts (d,): where documents begin in `tokens` (`Corpus.validation_starts`); each is then read after `start_id` from
    an empty state. None: the state is carried from the first token to the last, whatever documents there are.
    n_bytes: the bytes of text that the tokens stand for (`Corpus.validation_bytes`); window: tokens per forward pass;
    autocast: a context to run the model in; processes: others that score the same, with whom the documents are shared
    out. The model's training mode is restored. Raises UserError for no tokens.
    """
    device = model.ids_device
    state, count, text = None, 0, -1  # the text: a document, or several in one window
    nats: list[Tensor] = []  # of each window
    nothing = torch.zeros((), dtype=widest(device), device=device)
    with evaluating(model):
        for input_ids, targets, seq_idx, new in _windows(tokens, starts, window, start_id):
            count, text = count + targets.numel(), text + new
            if processes and text % processes.size != processes.rank:
                nats.append(nothing)
                continue
            with autocast or contextlib.nullcontext():
                loss, state = model.loss_and_state(
                    input_ids.to(device),
                    targets.to(device),
                    None if new else state,
                    None if seq_idx is None else seq_idx.to(device),
                    reduction="sum",
                )
            nats.append(nothing + loss)
    every = torch.stack(nats)
    if processes:
        processes.total([every])
    return Score(sum(every.tolist()), count, n_bytes)


def _windows(
    tokens: Tensor, starts: Tensor | None, window: int, start_id: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, bool]]:
    """(input_ids, targets, seq_idx, whether the state is empty); seq_idx is None where there is one document."""
    if starts is None:
        for k, (input_ids, targets) in enumerate(validation_windows(tokens, window, start_id)):
            yield input_ids, targets, None, k == 0
        return
    for input_ids, targets, seq_idx, new in document_windows(tokens, starts, window, start_id):
        yield input_ids, targets, seq_idx if seq_idx[0, 0] != seq_idx[0, -1] else None, new
