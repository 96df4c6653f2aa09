"""A language model that sorts texts: a linear head on what it has read of each.

    ids of a text ─► model.hidden ─► one vector per text ─► head ─► a score per label

The vector is the mean over the text's tokens ("mean"), the largest number of each channel ("max"), both beside each
other ("mean+max"), or what stands at the last token, where the state has read all of it ("last").

Two things keep a small model from learning a few thousand texts by heart. Words are taken away from what it reads
(`word_dropout`), and it has to give the same answer to two readings of a text that miss other words (`consistency`,
R-Drop, arXiv:2106.14448).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba2_min.finetune.spelling import Spelling
from mamba2_min.models.base import LanguageModel
from mamba2_min.ops.loss import IGNORE

POOLS = ("mean", "last", "max", "mean+max")
ABSENT = 1  # stands for a word that is taken away: the zero byte, or in the pattern "whitespace" the unknown word


class Classifier(nn.Module):
    """`model` with a head for `labels` classes. It has what the trainer needs of a model.

    Its lm_head is not read: where that is not the embedding, it is frozen.
    """

    class_weights: Tensor

    def __init__(
        self,
        model: LanguageModel,
        labels: int,
        pool: str = "mean+max",
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        dropout: float = 0.0,
        seed: int = 0,
        word_dropout: float = 0.0,
        consistency: float = 0.0,
        spelling: Spelling | None = None,
    ):
        """spelling: is added to the embeddings; word_dropout: the share of the tokens that training takes away;
        consistency: the weight of the divergence of two readings, beside their loss.

        Raises ValueError for fewer than two labels and an unknown pool.
        """
        super().__init__()
        if labels < 2:
            raise ValueError(f"sorting needs at least two labels, not {labels}")
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, not {pool!r}")
        self.model, self.pool, self.label_smoothing, self.dropout = model, pool, label_smoothing, dropout
        like = model.lm_head.weight
        for p in model.lm_head.parameters():
            if p is not model.backbone.embedding.weight:  # else an optimizer would expect gradients of it
                p.requires_grad_(False)
        self.word_dropout, self.consistency, self.spelling = word_dropout, consistency, spelling
        width = model.config.d_model * (1 + pool.count("+"))
        self.head = nn.Linear(width, labels, device=like.device, dtype=like.dtype)
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
        seen = self._without_words(input_ids, mask) if self.training and self.word_dropout else input_ids
        if self.spelling is None:
            hidden, _ = self.model.hidden(seen, seq_idx=mask.long())
        else:
            embeds = self.model.backbone.embedding(seen) + self._spelled(input_ids, seen, mask)
            hidden, _ = self.model.hidden(inputs_embeds=embeds, seq_idx=mask.long())
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        vector = torch.cat([pooled(hidden, mask, kind) for kind in self.pool.split("+")], -1)
        return self.head(F.dropout(vector, self.dropout, self.training).to(self.head.weight.dtype))

    def _without_words(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Each token but the first of a text is ABSENT with probability `word_dropout`."""
        absent = torch.rand(input_ids.shape, device=input_ids.device) < self.word_dropout
        absent &= mask & F.pad(mask[:, :-1], (1, 0))
        return input_ids.masked_fill(absent, ABSENT)

    def _spelled(self, input_ids: Tensor, seen: Tensor, mask: Tensor) -> Tensor:
        """What the spelling adds; in training half of the absent words lose that too, and a tenth of the others."""
        assert self.spelling is not None
        added = self.spelling(input_ids.masked_fill(~mask, 0))  # padding spells nothing
        if self.training and self.word_dropout:
            share = torch.where(seen == input_ids, 0.1, 0.5)
            added = added * (torch.rand(input_ids.shape, device=added.device) >= share)[..., None]
        return added

    def loss(self, input_ids: Tensor, targets: Tensor, state: Any = None, seq_idx: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats per text, weighted by class; in training with what `consistency` adds.

        targets (b, l): the label of a row at one place, IGNORE elsewhere; seq_idx (b, l): 0 in the text, -1 in padding.
        """
        mask = None if seq_idx is None else seq_idx >= 0
        labels = torch.where(targets == IGNORE, -1, targets).amax(1)
        twice = self.training and self.consistency > 0
        if twice:
            input_ids, labels = input_ids.repeat(2, 1), labels.repeat(2)
            mask = None if mask is None else mask.repeat(2, 1)
        weights = self.class_weights[labels]
        scores = self(input_ids, mask).float()
        smoothing = self.label_smoothing if self.training else 0.0
        losses = F.cross_entropy(scores, labels, reduction="none", label_smoothing=smoothing)
        if twice:
            losses = losses + self.consistency * divergence(*scores.chunk(2)).repeat(2)
        return (losses * weights).mean()


def pooled(hidden: Tensor, mask: Tensor, kind: str) -> Tensor:
    """hidden (b, l, d), mask (b, l) true in the text -> (b, d): "mean", "max" or "last" of POOLS."""
    if kind == "mean":
        return torch.where(mask[..., None], hidden, 0).sum(1) / mask.to(hidden.dtype).sum(1, keepdim=True)
    if kind == "max":
        return torch.where(mask[..., None], hidden, -torch.inf).amax(1)
    position = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, position, -1).amax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """The mean of KL(first, second) and KL(second, first) of two rows of scores (b, labels): (b,), in nats."""
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1) / 2
