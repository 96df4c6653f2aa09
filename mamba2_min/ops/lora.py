"""A projection with an adapter as one function: its weight is frozen, and only A and B learn.

    y = x W^T + b + h B^T,   h = c (x m) A^T          m: 0 where dropout takes a number and 1 elsewhere

c = scale / (1 - p) holds all constant factors. With dh = c dy B, the gradients are

    dx = dy W + (dh A) m,   dA = dh^T (x m),   dB = dy^T h.

By single operations PyTorch would keep x m, the mask and results in between. Here x is kept once, or not at all where
its norm tells how to compute it again (recipes.py), and the mask as one byte a number.
On a GPU, with dropout, lora_kernels.py computes the same.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba2_min.ops import gpu_kernels
from mamba2_min.ops.autograd import autocast_off, handwritten_backward
from mamba2_min.ops.recipes import Recipe, recipe_of

# Of the kernels: in float32 exact products need many registers.
_LARGEST_RANK = {torch.bfloat16: 64, torch.float32: 16}


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float) -> Tensor:
    """x (..., in), weight (out, in), bias (out,) or None, A (r, in), B (out, r) -> (..., out).

    weight and bias get no gradient. p: the dropout on what A reads. Under autocast the products run in its dtype.
    """
    device = x.device.type
    lowered = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if lowered else x.dtype
    with autocast_off(x):
        if p and A.requires_grad and gpu_kernels.takes(x) and len(A) <= _LARGEST_RANK.get(dtype, 0) and _fits(x.device):
            from mamba2_min.ops.lora_kernels import LoRALinear

            return LoRALinear.apply(x, A, B, weight, bias, scale, p, dtype, recipe_of(x))
        mask = _rows(torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p)) if p else None
        return _LoRALinear.apply(x, A, B, weight, bias, mask, scale / (1 - p), dtype, recipe_of(x))


@functools.cache
def _fits(device: torch.device) -> bool:
    """Whether a device has the shared memory for the kernels, and multiplies bf16."""
    needed = 92_192 if torch.version.hip is None else 40_960
    return gpu_kernels.shared_memory(device) >= needed and gpu_kernels.multiplies_bf16(device)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, weight, bias, mask, c, dtype, recipe: Recipe | None):
        flat = _rows(x).to(dtype)
        w, a, b = weight.to(dtype), A.to(dtype), B.to(dtype)
        h = _product(c, flat if mask is None else flat * mask, a.t())
        y = F.linear(flat, w, None if bias is None else bias.to(dtype)).addmm_(h, b.t())
        ctx.save_for_backward(mask, w, a, b, h, *(recipe.inputs if recipe else [flat]))
        ctx.c, ctx.compute, ctx.shape, ctx.dtypes = c, recipe and recipe.compute, x.shape, (x.dtype, A.dtype, B.dtype)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @handwritten_backward
    def backward(ctx, dy):
        mask, w, a, b, h, *kept = ctx.saved_tensors
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        dy = _rows(dy)
        dh = _product(ctx.c, dy, b)
        dx, dA, dB = dy @ w if need_x else None, None, dy.t() @ h if need_B else None
        if need_A:
            x = _rows(ctx.compute(*kept)).to(w.dtype) if ctx.compute else kept[0]
            dA = dh.t() @ (x if mask is None else x * mask)
        if dx is not None:
            dx = dx.addmm_(dh, a) if mask is None else dx.add_((dh @ a).mul_(mask))
            dx = dx.view(ctx.shape)
        found = [None if t is None else t.to(dtype) for t, dtype in zip((dx, dA, dB), ctx.dtypes, strict=True)]
        return *found, *[None] * 6


def _rows(t: Tensor) -> Tensor:
    """(tokens, width)"""
    return t.reshape(-1, t.shape[-1])


def _product(c: float, x: Tensor, y: Tensor) -> Tensor:
    """c x y, in one operation."""
    return torch.addmm(x.new_empty(()), x, y, beta=0, alpha=c)
