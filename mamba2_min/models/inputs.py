"""Checks of a model's inputs: bad input is one clear line."""

from __future__ import annotations

from operator import index
from typing import Any

import torch
from torch import Tensor

from mamba2_min.ops.autograd import is_traced


def as_ids(ids: Any, name: str) -> Tensor:
    """Integers of any dtype as int64. Raises ValueError for anything else."""
    if not isinstance(ids, Tensor):
        raise ValueError(f"{name} must be a tensor of integers, not a {type(ids).__name__}")
    if ids.dtype == torch.bool or ids.dtype.is_floating_point or ids.dtype.is_complex:
        raise ValueError(f"{name} must be integers, not {ids.dtype}")
    return ids.long()


def check_inputs(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, config: Any
) -> tuple[Tensor | None, torch.Size]:
    """input_ids (b, l) as int64, and (b, l) of that or of inputs_embeds (b, l, d_model), whichever is given.

    Raises ValueError for both, for neither, for a wrong shape or type, and for ids outside the vocabulary.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    if inputs_embeds is not None:
        d = config.d_model
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[1] < 1 or inputs_embeds.shape[2] != d:
            raise ValueError(f"inputs_embeds must be (b, l, {d}) with l >= 1, not {tuple(inputs_embeds.shape)}")
        return None, inputs_embeds.shape[:2]
    ids = as_ids(input_ids, "input_ids")
    if ids.dim() != 2 or ids.shape[1] < 1:
        raise ValueError(f"input_ids must be (b, l) with l >= 1, not {tuple(ids.shape)}")
    # On a GPU the check would wait for the device; there the embedding's own assertion finds bad ids.
    readable = type(ids) is Tensor and ids.device.type == "cpu" and not (torch.compiler.is_compiling() or is_traced())
    if readable and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
        raise ValueError(f"input_ids must lie in [0, {config.vocab_size}), the vocabulary")
    return ids, ids.shape


def check_step(ids: Tensor, batch: int, vocab_size: int) -> Tensor:
    """The ids (b,) of one step as int64. Raises ValueError where they are not one id of the vocabulary per row."""
    if type(ids) is not Tensor or ids.dtype != torch.int64:
        ids = as_ids(ids, "ids")
    if ids.shape != (batch,):
        raise ValueError(f"the state has {batch} rows, and ids must be ({batch},), not {tuple(ids.shape)}")
    if batch and ids.device.type == "cpu":
        rows = ids.tolist()  # faster than a minimum and a maximum
        if min(rows) < 0 or max(rows) >= vocab_size:
            raise ValueError(f"ids must lie in [0, {vocab_size}), the vocabulary")
    return ids


def one_prompt(prompt_ids: Any) -> list[int]:
    """The ids of one prompt, from any sequence of integers. Raises ValueError for several prompts or an empty one."""
    try:
        if getattr(prompt_ids, "ndim", 1) != 1:
            raise TypeError
        ids = list(map(index, prompt_ids))
    except TypeError:
        raise ValueError(
            "prompt_ids must be one prompt, a flat sequence of ids; read several, padded on the left, by "
            "prefill(input_ids, seq_idx=...), and go on with step"
        ) from None
    if not ids:
        raise ValueError("the prompt is empty; start a document with its end-of-document token")
    return ids
