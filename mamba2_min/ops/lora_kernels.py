"""What an adapter adds to a projection (ops/lora.py), on a GPU and with dropout, without ever writing x m to memory.

The mask has one bit a number, 32 in an int32, (tokens, ceil(in / 32)): a sixteenth of x in bf16. `project` reads x and
the bits and multiplies by A; `gradients` reads both once more for the gradients of x and A.

What the adapter adds to the output is part of the large product, as r more columns of W: y = [x | h] [W | B]^T. So y is
not read and written once more. Backwards, dy [W | B] has both dx and what dh needs, and dy is read once for both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from mamba2_min.ops.autograd import handwritten_backward
from mamba2_min.ops.gpu_kernels import on, product_precision, rows_contiguous
from mamba2_min.ops.recipes import Recipe

_STEPS = 1 << 12  # dropout is rounded to a multiple of 1 / 4,096
_PER_PROGRAM = 512  # tokens whose share of A's gradient one program adds up. Constant, for equal bits.


@triton.jit
def _mask_kernel(seed, bits, words, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    """Each bit of a word is 1 with probability KEEP / 4,096, from 12 random words of Philox (its seven rounds).

    If a bit was 1 with probability q, then `bit | random` is with (1 + q) / 2 and `bit & random` with q / 2: that
    appends a binary digit, 1 or 0, in front of q's.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(seed)
    word = at * 0
    for k in tl.static_range(3):
        a, b, c, d = tl.randint4x(key, at * 3 + k, n_rounds=7)
        word = _digit(word, a, (KEEP >> (4 * k)) & 1)
        word = _digit(word, b, (KEEP >> (4 * k + 1)) & 1)
        word = _digit(word, c, (KEEP >> (4 * k + 2)) & 1)
        word = _digit(word, d, (KEEP >> (4 * k + 3)) & 1)
    tl.store(bits + at, word, mask=at < words)


@triton.jit
def _digit(word, random, ONE: tl.constexpr):
    random = random.to(tl.int32, bitcast=True)
    return word | random if ONE else word & random


@triton.jit
def _mask(bits, row, first, tokens, words, BT: tl.constexpr, BK: tl.constexpr):
    """Which numbers of some rows are kept, BK columns from `first` on, a multiple of 32: (BT, BK).

    Each word is loaded once and spread over its 32 columns. To load it for each column costs more than to load x.
    """
    place = first // 32 + tl.arange(0, BK // 32)
    there = (row < tokens)[:, None] & (place < words)[None, :]
    word = tl.load(bits + row[:, None] * words + place[None, :], mask=there, other=0)
    return tl.reshape((word[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1, (BT, BK)) != 0


@triton.jit
def _project_kernel(
    x, a, bits, xh, h, x_s, tokens, width, words, r, c,
    BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h = c (x m) A^T of BT tokens, alone and beside x: xh (tokens, width + r)."""
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    rank = tl.arange(0, BR)
    total = tl.zeros((BT, BR), tl.float32)
    for start in range(0, width, BK):
        column = start + tl.arange(0, BK)
        inside = (row < tokens)[:, None] & (column < width)[None, :]
        value = tl.load(x + row[:, None] * x_s + column[None, :], mask=inside, other=0.0)
        tl.store(xh + row[:, None] * (width + r) + column[None, :], value, mask=inside)
        value = tl.where(_mask(bits, row, start, tokens, words, BT, BK), value, 0.0).to(a.dtype.element_ty)
        of_a = (rank < r)[None, :] & (column < width)[:, None]
        factor = tl.load(a + rank[None, :] * width + column[:, None], mask=of_a, other=0.0)
        total += tl.dot(value, factor, input_precision=PRECISION)
    there = (row < tokens)[:, None] & (rank < r)[None, :]
    narrow = (total * c).to(h.dtype.element_ty)
    tl.store(h + row[:, None] * r + rank[None, :], narrow, mask=there)
    tl.store(xh + row[:, None] * (width + r) + width + rank[None, :], narrow, mask=there)


@triton.jit
def _gradients_kernel(
    x, a, bits, dh, dx, parts, x_s, dh_s, dx_s, tokens, width, words, r, c, per_program,
    DX: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BK columns of some tokens: dx += c (dh A) m, and their part of dA = c dh^T (x m)."""
    program = tl.program_id(0).to(tl.int64)
    first = program * per_program
    column, rank = tl.program_id(1) * BK + tl.arange(0, BK), tl.arange(0, BR)
    of_a = (rank < r)[:, None] & (column < width)[None, :]
    at = rank[:, None] * width + column[None, :]
    factor = tl.load(a + at, mask=of_a, other=0.0)
    total = tl.zeros((BR, BK), tl.float32)
    for start in range(0, per_program, BT):
        row = first + start + tl.arange(0, BT)
        inside = (row < tokens)[:, None] & (column < width)[None, :]
        slope = tl.load(
            dh + row[:, None] * dh_s + rank[None, :], mask=(row < tokens)[:, None] & (rank < r)[None, :], other=0.0
        )
        value = tl.load(x + row[:, None] * x_s + column[None, :], mask=inside, other=0.0)
        kept = _mask(bits, row, tl.program_id(1) * BK, tokens, words, BT, BK)
        value = tl.where(kept, value, 0.0).to(slope.dtype)
        total += tl.dot(tl.trans(slope), value, input_precision=PRECISION)
        if DX:
            place = dx + row[:, None] * dx_s + column[None, :]
            more = tl.where(kept, tl.dot(slope, factor, input_precision=PRECISION) * c, 0.0)
            more += tl.load(place, mask=inside, other=0.0).to(tl.float32)
            tl.store(place, more.to(dx.dtype.element_ty), mask=inside)
    tl.store(parts + program * r * width + at, total * c, mask=of_a)


def mask_bits(tokens: int, width: int, p: float, device: torch.device) -> tuple[Tensor, float]:
    """The bits of a mask (tokens, width) that drops a share p, and the exact share that it keeps."""
    keep = min(max(round((1 - p) * _STEPS), 1), _STEPS - 1)
    bits = torch.empty(tokens, -(-width // 32), dtype=torch.int32, device=device)
    seed = torch.randint(2**31 - 1, (1,), device=device)  # on the GPU: a CUDA graph draws it anew at each launch
    with on(bits):
        _mask_kernel[(-(-bits.numel() // 512),)](seed, bits, bits.numel(), KEEP=keep, BLOCK=512, num_warps=4)
    return bits, keep / _STEPS


def project(x: Tensor, a: Tensor, bits: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """[x | h] (tokens, in + r) and h = c (x m) A^T (tokens, r): x (tokens, in), A (r, in), all of one dtype."""
    (tokens, width), r = x.shape, len(a)
    xh, h = (torch.empty(tokens, size, dtype=x.dtype, device=x.device) for size in (width + r, r))
    with on(x):
        _project_kernel[(-(-tokens // 32),)](
            x, a, bits, xh, h, x.stride(0), tokens, width, bits.shape[1], r, c, BT=32, BK=_narrow(x, 128), BR=_rank(r),
            PRECISION=product_precision(x.dtype), num_warps=4,
        )  # fmt: skip
    return xh, h


def gradients(x: Tensor, a: Tensor, bits: Tensor, c: float, dh: Tensor, dx: Tensor | None) -> Tensor:
    """The gradient of A (r, in), float32; what the adapter adds to that of x is added to `dx`, in place.

    dh (tokens, r), without the factor c, and dx (tokens, in) may be parts of a wider tensor.
    """
    (tokens, width), r = x.shape, len(a)
    programs = -(-tokens // _PER_PROGRAM)
    parts = torch.empty(programs, r, width, dtype=torch.float32, device=x.device)
    into = x if dx is None else dx  # any memory, where nothing is added
    with on(x):
        columns = _narrow(x, 64)
        _gradients_kernel[(programs, -(-width // columns))](
            x, a, bits, dh, into, parts, x.stride(0), dh.stride(0), into.stride(0), tokens, width, bits.shape[1], r, c,
            _PER_PROGRAM, DX=dx is not None, BT=_narrow(x, 64), BK=columns, BR=_rank(r),
            PRECISION=product_precision(x.dtype), num_warps=4,
        )  # fmt: skip
    return parts.sum(0)


def _narrow(x: Tensor, size: int) -> int:
    """The size of a tile in bf16; in float32 half of it, as exact products need more registers."""
    return size if x.dtype == torch.bfloat16 else size // 2


def _rank(r: int) -> int:
    return max(16, triton.next_power_of_2(r))


class LoRALinear(torch.autograd.Function):
    """`lora_linear` with dropout p: x (..., in) -> (..., out). weight and bias get no gradient, and A gets one."""

    @staticmethod
    def forward(ctx, x, A, B, weight, bias, scale, p, dtype, recipe: Recipe | None):
        flat, a, width = rows_contiguous(x.reshape(-1, x.shape[-1]).to(dtype)), A.to(dtype).contiguous(), x.shape[-1]
        bits, kept = mask_bits(len(flat), width, p, x.device)
        wb = torch.empty(len(weight), width + len(A), dtype=dtype, device=x.device)
        wb[:, :width] = weight
        wb[:, width:] = B
        xh, h = project(flat, a, bits, scale / kept)
        y = F.linear(xh, wb, None if bias is None else bias.to(dtype))
        ctx.save_for_backward(bits, wb, a, h, *(recipe.inputs if recipe else [flat]))
        ctx.c, ctx.compute, ctx.shape = scale / kept, recipe and recipe.compute, x.shape
        ctx.dtypes = (x.dtype, A.dtype, B.dtype)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @handwritten_backward
    def backward(ctx, dy):
        bits, wb, a, h, *kept = ctx.saved_tensors
        dy, width = dy.reshape(-1, dy.shape[-1]), a.shape[1]
        x = ctx.compute(*kept).view(-1, width).to(wb.dtype) if ctx.compute else kept[0]
        dB = dy.t() @ h if ctx.needs_input_grad[2] else None
        if ctx.needs_input_grad[0]:
            dx, dh = (dy @ wb).split([width, len(a)], dim=1)
        else:
            dx, dh = None, dy @ wb[:, width:]
        dA = gradients(x, a, bits, ctx.c, dh, dx)
        dx = None if dx is None else dx.view(ctx.shape)
        found = [None if t is None else t.to(dtype) for t, dtype in zip((dx, dA, dB), ctx.dtypes, strict=True)]
        return *found, *[None] * 6
