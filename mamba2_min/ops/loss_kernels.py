"""The softmax of ops/loss.py on a GPU: two passes over the logits, and the gradient in their place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba2_min.ops.gpu_kernels import on

_BLOCK = 4096


@triton.jit
def _kernel(logits, index, out, v, width, BLOCK: tl.constexpr):
    """One row: out = log softmax(logits)[index], and logits become softmax less one at index, 0 beyond v."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    at = tl.arange(0, BLOCK)
    peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)  # of each lane, relative to its peak
    for start in range(0, v, BLOCK):
        x = tl.load(logits + start + at, mask=start + at < v, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peaks, x)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.exp(peaks - shift) + tl.exp(x - shift)
        peaks = higher
    peak = tl.max(peaks, axis=0)
    total = tl.log(tl.sum(sums * tl.exp(peaks - peak), axis=0)) + peak
    target = tl.load(index + row)
    score = tl.load(logits + target, mask=(target >= 0) & (target < v), other=float("-inf")).to(tl.float32)
    tl.store(out + row, score - total)
    for start in range(0, width, BLOCK):
        x = tl.load(logits + start + at, mask=start + at < v, other=float("-inf")).to(tl.float32)
        p = tl.exp(x - total) - tl.where(start + at == target, 1.0, 0.0)
        tl.store(logits + start + at, p.to(logits.dtype.element_ty), mask=start + at < width)


def softmax_gradient(logits: Tensor, index: Tensor, vocab_size: int) -> Tensor:
    """log softmax(logits)[index] of each row, (rows, 1) float32; `logits` (rows, width) is replaced by its gradient."""
    out = torch.empty(len(logits), 1, dtype=torch.float32, device=logits.device)
    with on(logits):
        _kernel[(len(logits),)](logits, index, out, vocab_size, logits.shape[1], BLOCK=_BLOCK, num_warps=8)
    return out
