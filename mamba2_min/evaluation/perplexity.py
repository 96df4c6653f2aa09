"""The exact perplexity of a model on a text: each token counts once, with everything before it as its context."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mamba2_min.data.windows import validation_windows
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


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    tokens: Tensor,
    n_bytes: int,
    start_id: int,
    window: int = WINDOW,
    autocast: contextlib.AbstractContextManager | None = None,
) -> Score:
    """Scores `tokens` (l,), one stream that is read in order after the token `start_id`; the state is carried over.

    n_bytes: the bytes of text that the tokens stand for (`Corpus.validation_bytes`); window: tokens per forward pass;
    autocast: a context to run the model in. The model's training mode is restored. Raises UserError for no tokens.
    """
    device = model.ids_device
    state, count = None, 0
    nats = torch.zeros((), dtype=widest(device), device=device)
    with evaluating(model):
        for input_ids, targets in validation_windows(tokens, window, start_id):
            input_ids, targets = input_ids.to(device), targets.to(device)
            with autocast or contextlib.nullcontext():
                loss, state = model.loss_and_state(input_ids, targets, state, reduction="sum")
            nats += loss
            count += targets.numel()
    return Score(float(nats), count, n_bytes)
