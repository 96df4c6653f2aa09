"""A language model that sorts texts: a linear head on what it has read of each.

    ids of a text ─► model.hidden ─► one vector per text ─► head ─► a score per label

The vector is the mean over the text's tokens ("mean"), or what stands at its last token, where the state has read all
of it ("last").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba2_min.models.base import LanguageModel
from mamba2_min.ops.loss import IGNORE

POOLS = ("mean", "last")


class Classifier(nn.Module):
    """`model` with a head for `labels` classes. It has what the trainer needs of a model."""

    class_weights: Tensor

    def __init__(
        self,
        model: LanguageModel,
        labels: int,
        pool: str = "mean",
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        dropout: float = 0.0,
        seed: int = 0,
    ):
        """Raises ValueError for fewer than two labels and an unknown pool."""
        super().__init__()
        if labels < 2:
            raise ValueError(f"sorting needs at least two labels, not {labels}")
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, not {pool!r}")
        self.model, self.pool, self.label_smoothing, self.dropout = model, pool, label_smoothing, dropout
        like = model.lm_head.weight
        self.head = nn.Linear(model.config.d_model, labels, device=like.device, dtype=like.dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            bound = 1 / math.sqrt(self.head.in_features)
            self.head.weight.copy_(torch.empty(self.head.weight.shape).uniform_(-bound, bound, generator=generator))
            self.head.bias.zero_()
        weights = torch.ones(labels) if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights.to(like), persistent=False)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def recompute(self) -> bool:
        return self.model.recompute

    @recompute.setter
    def recompute(self, on: bool) -> None:
        self.model.recompute = on

    def compile_blocks(self, on: bool = True) -> None:
        self.model.compile_blocks(on)

    def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """input_ids (b, l), mask (b, l) true where a token belongs to the text -> scores (b, labels).

        Padding may stand on either side: the state begins again where the text does, so that the scores are those of
        the text alone. Raises ValueError for a row without a token.
        """
        if mask is None:
            mask = torch.ones_like(input_ids, dtype=torch.bool)
        if not bool(mask.any(1).all()):
            raise ValueError("a text without a token cannot be sorted")
        hidden, _ = self.model.hidden(input_ids, seq_idx=mask.long())
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self.pool == "mean":
            weight = mask.to(hidden.dtype)
            vector = torch.where(mask[..., None], hidden, 0).sum(1) / weight.sum(1, keepdim=True)
        else:
            position = torch.arange(mask.shape[1], device=mask.device)
            last = torch.where(mask, position, -1).amax(1)
            vector = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return self.head(F.dropout(vector, self.dropout, self.training).to(self.head.weight.dtype))

    def loss(self, input_ids: Tensor, targets: Tensor, state: Any = None, seq_idx: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats per text, weighted by class.

        targets (b, l): the label of a row at one place, IGNORE elsewhere; seq_idx (b, l): 0 in the text, -1 in padding.
        """
        mask = None if seq_idx is None else seq_idx >= 0
        labels = torch.where(targets == IGNORE, -1, targets).amax(1)
        weights = self.class_weights[labels]
        losses = F.cross_entropy(
            self(input_ids, mask).float(),
            labels,
            reduction="none",
            label_smoothing=self.label_smoothing if self.training else 0.0,
        )
        return (losses * weights).mean()
