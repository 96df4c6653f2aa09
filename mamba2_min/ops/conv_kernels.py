"""The convolution of ops/conv.py on a GPU: one kernel forward, one backward, and only the input is kept."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba2_min.ops.autograd import handwritten_backward
from mamba2_min.ops.gpu_kernels import in_units, on, operator, rows_contiguous, unit_of

_TOKENS, _CHANNELS = 32, 128  # of a tile of the forward
_SEGMENT, _WIDTH = 128, 256  # tokens and channels of a program of the backward


@triton.jit
def _forward_kernel(
    u, weight, bias, before, documents, out, u_sb, u_sl, l, c, blocks, K: tl.constexpr, BIAS: tl.constexpr,
    BEFORE: tl.constexpr, DOCUMENTS: tl.constexpr, UNIT: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """silu(bias + sum_k weight[:, k] u_{t - (K - 1) + k}): BT tokens of BC channels. The taps overlap in the cache.

    BEFORE: before (b, K - 1, c), inputs before the first, of document 0. DOCUMENTS: a tap reads its own document only.
    """
    program = tl.program_id(0).to(tl.int64)
    b, first = program // blocks, (program % blocks) * BT
    tokens, channels = first.to(tl.int32) + tl.arange(0, BT), tl.program_id(1) * BC + tl.arange(0, BC)
    there = (channels < c)[None, :]
    u += b * (u_sb * UNIT) + first * (u_sl * UNIT)
    at = tl.arange(0, BT)[:, None] * (u_sl * UNIT) + channels[None, :]
    total = tl.zeros((BT, BC), tl.float32)
    if BIAS:
        total += tl.load(bias + channels, mask=channels < c, other=0.0).to(tl.float32)[None, :]
    documents += b * l
    if DOCUMENTS:
        mine = tl.load(documents + tokens, mask=tokens < l, other=0)
    for k in tl.static_range(K):
        past = tokens - (K - 1) + k
        seen = past < l
        if DOCUMENTS:
            seen = seen & (tl.load(documents + past, mask=(past >= 0) & seen, other=0) == mine)
        inside = ((past >= 0) & seen)[:, None] & there
        tap = tl.load(u + (k - (K - 1)) * (u_sl * UNIT) + at, mask=inside, other=0.0)
        if BEFORE:
            earlier = before + (b * (K - 1) + past + (K - 1))[:, None] * c + channels[None, :]
            tap += tl.load(earlier, mask=((past < 0) & seen)[:, None] & there, other=0.0)
        w = tl.load(weight + channels * K + k, mask=channels < c, other=0.0).to(tl.float32)
        total += tap.to(tl.float32) * w[None, :]
    y = total / (1 + tl.exp(-total))
    place = out + (b * l + first) * c + (tl.arange(0, BT)[:, None] * c + channels[None, :])
    tl.store(place, y.to(out.dtype.element_ty), mask=(tokens < l)[:, None] & there)


@triton.jit
def _slope(v, dy):
    """dy times the derivative of SiLU at v."""
    gate = 1 / (1 + tl.exp(-v))
    return dy * gate * (1 + v * (1 - gate))


@triton.jit
def _backward_kernel(
    u, dy, weight, bias, before, documents, du, dtaps, dbias, u_sb, u_sl, dy_sb, dy_sl, du_sb, du_sl, l, c, segments,
    BIAS: tl.constexpr, BEFORE: tl.constexpr, DOCUMENTS: tl.constexpr, UNIT: tl.constexpr, S: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Four taps, S tokens of BC channels, from the last to the first: what a token needs of its neighbours is at hand.

    With v the sum before SiLU and dv its gradient, du_t = sum_s weight[:, 3 - s] dv_{t + s}. dtaps (b segments, 4, c)
    and dbias (b segments, c) are parts of the sums over tokens.
    """
    program = tl.program_id(0).to(tl.int64)
    b, first = program // segments, ((program % segments) * S).to(tl.int32)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    there = channels < c
    u_sl, dy_sl, du_sl = u_sl * UNIT, dy_sl * UNIT, du_sl * UNIT
    u += b * (u_sb * UNIT) + channels
    dy += b * (dy_sb * UNIT) + channels
    du += b * (du_sb * UNIT) + channels
    before += b * 3 * c + channels
    documents += b * l
    w0 = tl.load(weight + channels * 4, mask=there, other=0.0).to(tl.float32)
    w1 = tl.load(weight + channels * 4 + 1, mask=there, other=0.0).to(tl.float32)
    w2 = tl.load(weight + channels * 4 + 2, mask=there, other=0.0).to(tl.float32)
    w3 = tl.load(weight + channels * 4 + 3, mask=there, other=0.0).to(tl.float32)
    offset = tl.zeros((BC,), tl.float32)
    if BIAS:
        offset = tl.load(bias + channels, mask=there, other=0.0).to(tl.float32)
    # The gradients of the taps and of the bias, and dv of the next three tokens. Each is made on its own: Triton 3.6
    # takes variables that begin as one value for one that does not change, where they only pass values on.
    g0, g1, g2, g3 = _zeros(BC), _zeros(BC), _zeros(BC), _zeros(BC)
    total, d1, d2, d3 = _zeros(BC), _zeros(BC), _zeros(BC), _zeros(BC)
    last = first + S + 2  # the three tokens after the segment reach into it
    x3 = _input(u, before, last, u_sl, l, c, there, BEFORE)
    x2 = _input(u, before, last - 1, u_sl, l, c, there, BEFORE)
    x1 = _input(u, before, last - 2, u_sl, l, c, there, BEFORE)
    next_x, next_dy = _input(u, before, last - 3, u_sl, l, c, there, BEFORE), _row(dy, last, dy_sl, l, there)
    for k in range(0, S + 3):
        t = last - k
        x0, slope = next_x, next_dy
        next_x, next_dy = _input(u, before, t - 4, u_sl, l, c, there, BEFORE), _row(dy, t - 1, dy_sl, l, there)
        # Of the neighbours, what is of this token's document.
        y0 = _if_same(x0, documents, t - 3, t, l, DOCUMENTS)
        y1 = _if_same(x1, documents, t - 2, t, l, DOCUMENTS)
        y2 = _if_same(x2, documents, t - 1, t, l, DOCUMENTS)
        dv = _slope(offset + w0 * y0 + w1 * y1 + w2 * y2 + w3 * x3, slope)
        if k > 2:
            g0 += dv * y0
            g1 += dv * y1
            g2 += dv * y2
            g3 += dv * x3
            total += dv
            e1 = _if_same(d1, documents, t, t + 1, l, DOCUMENTS)
            e2 = _if_same(d2, documents, t, t + 2, l, DOCUMENTS)
            e3 = _if_same(d3, documents, t, t + 3, l, DOCUMENTS)
            value = w3 * dv + w2 * e1 + w1 * e2 + w0 * e3
            tl.store(du + tl.cast(t, tl.int64) * du_sl, value.to(du.dtype.element_ty), mask=there & (t < l))
        d3, d2, d1 = d2, d1, dv
        x3, x2, x1 = x2, x1, x0
    dtaps += program * 4 * c + channels
    tl.store(dtaps, g0, mask=there)
    tl.store(dtaps + c, g1, mask=there)
    tl.store(dtaps + 2 * c, g2, mask=there)
    tl.store(dtaps + 3 * c, g3, mask=there)
    tl.store(dbias + program * c + channels, total, mask=there)


@triton.jit
def _zeros(BC: tl.constexpr):
    return tl.zeros((BC,), tl.float32)


@triton.jit
def _row(t, token, stride, l, there):
    """One token's channels, zeros outside of the text."""
    inside = there & (token >= 0) & (token < l)
    return tl.load(t + tl.cast(token, tl.int64) * stride, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _input(u, before, token, stride, l, c, there, BEFORE: tl.constexpr):
    """As `_row`, and before the text one of the three inputs in `before`."""
    row = _row(u, token, stride, l, there)
    if BEFORE:
        row += _row(before, token + 3, c, 3, there & (token < 0))
    return row


@triton.jit
def _if_same(value, documents, earlier, later, l, DOCUMENTS: tl.constexpr):
    """value if two tokens are of one document, else 0; what is before the text belongs to document 0."""
    if DOCUMENTS:
        one = tl.load(documents + earlier, mask=(earlier >= 0) & (earlier < l), other=0)
        other = tl.load(documents + later, mask=(later >= 0) & (later < l), other=0)
        return tl.where(one == other, value, 0.0)
    return value


def forward(
    u: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None = None, documents: Tensor | None = None
) -> Tensor:
    (b, l, c), K = u.shape, weight.shape[1]
    out = torch.empty(b, l, c, dtype=u.dtype, device=u.device)
    blocks, unit = -(-l // _TOKENS), unit_of(u)
    with on(u):
        _forward_kernel[(b * blocks, -(-c // _CHANNELS))](
            u, weight, u if bias is None else bias, *_context(u, before, documents), out, *in_units(unit, u), l, c,
            blocks, K=K, BIAS=bias is not None, BEFORE=before is not None, DOCUMENTS=documents is not None, UNIT=unit,
            BT=_TOKENS, BC=_CHANNELS, num_warps=4,
        )  # fmt: skip
    return out


def backward(
    u: Tensor,
    dy: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None = None,
    documents: Tensor | None = None,
    du: Tensor | None = None,
    trained: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of u, weight and bias; that of u in `du`, with any strides of rows, where it is given.

    trained: whether the gradients of weight and bias are wanted; else they are None.
    """
    b, l, c = u.shape
    if du is None:
        du = torch.empty(b, l, c, dtype=u.dtype, device=u.device)
    segments, unit = -(-l // _SEGMENT), unit_of(u, dy, du)
    dtaps = torch.empty(b * segments, 4, c, dtype=torch.float32, device=u.device)
    dbias = torch.empty(b * segments, c, dtype=torch.float32, device=u.device)
    with on(u):
        _backward_kernel[(b * segments, -(-c // _WIDTH))](
            u, dy, weight, u if bias is None else bias, *_context(u, before, documents), du, dtaps, dbias,
            *in_units(unit, u), *in_units(unit, dy), *in_units(unit, du), l, c, segments, BIAS=bias is not None,
            BEFORE=before is not None, DOCUMENTS=documents is not None, UNIT=unit, S=_SEGMENT, BC=_WIDTH, num_warps=4,
        )  # fmt: skip
    return (du, dtaps.sum(0).t().contiguous(), dbias.sum(0)) if trained else (du, None, None)


def _context(u: Tensor, before: Tensor | None, documents: Tensor | None) -> list[Tensor]:
    return [u if t is None else t for t in (before, documents)]


def _fake_backward(u, dy, weight, bias, before, documents) -> tuple[Tensor, Tensor, Tensor]:
    b, l, c = u.shape
    wide = torch.float32
    return u.new_empty(b, l, c), u.new_empty(c, 4, dtype=wide), u.new_empty(c, dtype=wide)


_convolve = operator(
    "conv_silu(Tensor u, Tensor weight, Tensor? bias, Tensor? before, Tensor? documents) -> Tensor", forward,
    lambda u, *_: u.new_empty(u.shape),
)  # fmt: skip
_gradients = operator(
    "conv_silu_backward(Tensor u, Tensor dy, Tensor weight, Tensor? bias, Tensor? before, Tensor? documents)"
    " -> (Tensor, Tensor, Tensor)", backward, _fake_backward,
)  # fmt: skip


class ConvSiLU(torch.autograd.Function):
    """silu(conv(u)): u (b, l, c), weight (c, 4), bias (c,) or None, all of one dtype.

    before (b, 3, c) or None: the inputs before the first, which get no gradient. documents (b, l) int32 or None: the
    numbers of `document_numbers`.
    """

    @staticmethod
    def forward(ctx, u, weight, bias, before=None, documents=None):
        u = rows_contiguous(u)
        weight = weight.contiguous()
        ctx.save_for_backward(u, weight, bias, before, documents)
        return _convolve(u, weight, bias, before, documents)

    @staticmethod
    @handwritten_backward
    def backward(ctx, dy):
        u, weight, bias, before, documents = ctx.saved_tensors
        du, dweight, dbias = _gradients(u, rows_contiguous(dy), weight, bias, before, documents)
        return du, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype), None, None
