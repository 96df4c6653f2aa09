"""The residual stream in training on a GPU: what a layer adds and the norm of the next in one kernel, and so backwards.

The sum belongs to one block and the norm to the next, so this goes around `Block.forward`. It takes blocks that are
plain, without dropout, and neither compiled nor computed again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mamba2_min.models.bypass import Forwards, is_plain
from mamba2_min.ops import gpu_kernels
from mamba2_min.ops.norm import add_rms_norm

if TYPE_CHECKING:
    from mamba2_min.models.mamba2 import Mamba2Backbone

Before = tuple[Tensor | None, Tensor | None]  # the states that a block starts from


def takes(backbone: Mamba2Backbone, x: Tensor, known: Forwards) -> bool:
    """Whether `through` computes what the blocks and the last norm do. `known`: plain blocks and norms."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not gpu_kernels.takes(x):
        return False
    training = backbone.training
    return (
        not (training and (backbone.recompute or backbone.compiled or backbone.config.dropout))
        and is_plain(backbone.norm_f, known)
        and all(is_plain(block, known) and is_plain(block.norm, known) for block in backbone.blocks)
    )


def through(
    backbone: Mamba2Backbone, x: Tensor, befores: Iterable[Before], seq_idx: Tensor | None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The stream's start (b, l, d_model) -> the output of the last norm, and the states of all layers."""
    more, conv, ssm = None, [], []
    for block, before in zip(backbone.blocks, befores, strict=True):
        x, u = add_rms_norm(x, more, block.norm.weight, block.norm.eps)
        more, *after = block.mixer(u, *before, seq_idx)
        conv.append(after[0])
        ssm.append(after[1])
    return add_rms_norm(x, more, backbone.norm_f.weight, backbone.norm_f.eps)[1], conv, ssm
