"""Rows of the table of words that are trained beside adapters: a small base lacks words more than anything else.

LoRA leaves the table as it is. A base that has read little spells the words of new texts byte by byte, with rows that
it hardly ever trained, and no projection makes up for that (docs/LOG.md has figures). So the rows of some tokens may be
trained as they are, the same rows in the embedding and in the head that is tied to it; all other rows stay. The package
peft calls this `trainable_token_indices`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mamba2_min.models.base import LanguageModel


def train_rows(model: LanguageModel, ids: Iterable[int]) -> None:
    """Lets the rows of these tokens learn, and no others. Call it after `add_lora`, which freezes the whole table.

    Raises ValueError for no token, for one that is not in the table, and for a head of its own.
    """
    table, tokens = mark_rows(model, ids), trained_tokens(model)
    others = torch.ones(len(table), 1, dtype=torch.bool)
    others[list(tokens)] = False

    def without_others(gradient: Tensor) -> Tensor:
        nonlocal others
        others = others.to(gradient.device)  # copied once: while a CUDA graph is recorded nothing may come from the CPU
        return gradient.masked_fill(others, 0)

    table.requires_grad_(True)
    table.trained_rows = len(tokens)  # type: ignore[attr-defined]  # for `decay_groups` and `trainable`
    table.register_hook(without_others)  # AdamW moves nothing whose gradient was always zero and that is not decayed


def mark_rows(model: LanguageModel, ids: Iterable[int]) -> Tensor:
    """Notes the tokens whose rows an adapter has, and returns the table. Raises ValueError as `train_rows` does."""
    tokens, table = tuple(sorted(set(ids))), model.backbone.embedding.weight
    if not tokens:
        raise ValueError("no token was named whose row is to be trained")
    if not 0 <= tokens[0] <= tokens[-1] < len(table):
        raise ValueError(f"the tokens to train are {tokens[0]} to {tokens[-1]}, and the table has {len(table):,} rows")
    if model.lm_head.weight is not table:
        raise ValueError("rows of the table are trained only where the head is tied to it, and this head is its own")
    model.trained_tokens = tokens  # type: ignore[assignment]
    return table


def trained_tokens(model: LanguageModel) -> tuple[int, ...]:
    """The tokens whose rows an adapter has, in order; none where there are none."""
    tokens: Sequence[int] = getattr(model, "trained_tokens", ())
    return tuple(tokens)


def rows_of(model: LanguageModel) -> Tensor:
    """A copy of the rows that an adapter has: (tokens, d_model)."""
    return model.backbone.embedding.weight.detach()[list(trained_tokens(model))]


@torch.no_grad()
def put_rows(model: LanguageModel, rows: Tensor) -> None:
    """Puts rows (tokens, d_model) into the table, in place."""
    table = model.backbone.embedding.weight
    table[list(trained_tokens(model))] = rows.to(table)
