"""The norms of ops/norm.py on a GPU: one kernel forward, one backward, which keep their inputs and one number per row.

A row is a part of the last axis over which the mean is taken: with groups, a token has several.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba2_min.ops.autograd import handwritten_backward
from mamba2_min.ops.gpu_kernels import in_units, on, operator, rows_contiguous, unit_of

_PROGRAMS = 1024  # of the backward: each adds up the gradient of the weight over its rows. Constant, for equal bits.


@triton.jit
def _forward_kernel(
    y, z, weight, out, scale, added, y_s, z_s, d, groups, eps, GATE: tl.constexpr, ADD: tl.constexpr,
    UNIT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out = u / rms(u) * weight, scale = 1 / rms(u), one row: u = y, y silu(z) with GATE, or y + z with ADD, which is
    stored in `added`."""
    row = tl.program_id(0).to(tl.int64)
    token, group = row // groups, row % groups
    at = tl.arange(0, BD)
    y_s, z_s, d = y_s * UNIT, z_s * UNIT, d * UNIT
    inside = at < d
    u = tl.load(y + token * y_s + group * d + at, mask=inside, other=0.0).to(tl.float32)
    if GATE:
        gate = tl.load(z + token * z_s + group * d + at, mask=inside, other=0.0).to(tl.float32)
        u *= gate / (1 + tl.exp(-gate))
    if ADD:
        total = u + tl.load(z + token * z_s + group * d + at, mask=inside, other=0.0).to(tl.float32)
        narrow = total.to(added.dtype.element_ty)
        tl.store(added + row * d + at, narrow, mask=inside)
        u = narrow.to(tl.float32)
    factor = tl.rsqrt(tl.sum(u * u, axis=0) / d + eps)
    tl.store(scale + row, factor)
    w = tl.load(weight + group * d + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * d + at, (u * factor * w).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    y, z, weight, scale, dout, dy, dz, dweight, y_s, z_s, dout_s, dz_s, d, groups, tokens, per_program,
    GATE: tl.constexpr, STREAM: tl.constexpr, ADD: tl.constexpr, UNIT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """With n = u / rms(u) and dn = dout weight: du = (dn - n mean(n dn)) / rms(u). One program for some tokens of a
    group; dweight (programs, groups d) is a part of the sum over tokens.

    STREAM: z is the gradient of u that comes by another way, and is added. ADD: u was a sum; dz = dy, in its dtype."""
    program, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BD)
    y_s, z_s, dout_s, dz_s, d = y_s * UNIT, z_s * UNIT, dout_s * UNIT, dz_s * UNIT, d * UNIT
    inside = at < d
    w = tl.load(weight + group * d + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BD,), tl.float32)
    first = program * per_program
    y += group * d + at
    z += group * d + at
    dout += group * d + at
    dz += group * d + at
    for k in range(0, tl.minimum(per_program, tokens - first).to(tl.int32)):
        token = first + k
        row = token * groups + group
        value = tl.load(y + token * y_s, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(dout + token * dout_s, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(scale + row)
        if GATE:
            x = tl.load(z + token * z_s, mask=inside, other=0.0).to(tl.float32)
            share = 1 / (1 + tl.exp(-x))
            gate = x * share
            n = value * gate * factor
        else:
            n = value * factor
        product = slope * n
        total += product
        du = (slope * w - n * (tl.sum(product * w, axis=0) / d)) * factor
        if GATE:
            tl.store(dy + row * d + at, (du * gate).to(dy.dtype.element_ty), mask=inside)
            dgate = du * value * share * (1 + x * (1 - share))
            tl.store(dz + token * dz_s, dgate.to(dz.dtype.element_ty), mask=inside)
        else:
            if STREAM:
                du += tl.load(z + token * z_s, mask=inside, other=0.0).to(tl.float32)
            if ADD:
                tl.store(dz + token * dz_s, du.to(dz.dtype.element_ty), mask=inside)
            tl.store(dy + row * d + at, du.to(dy.dtype.element_ty), mask=inside)
    tl.store(dweight + program * groups * d + group * d + at, total, mask=inside)


def _block(d: int) -> dict[str, int]:
    """How wide a program is."""
    size = max(128, triton.next_power_of_2(d))
    return {"BD": size, "num_warps": 4 if size <= 2048 else 8}


def forward(
    y: Tensor, z: Tensor | None, weight: Tensor, eps: float, groups: int, narrow: bool, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The norm of y silu(z), or of y + z, which is stored in `added` where that is given; and 1 / rms."""
    tokens, width = y.shape
    out = torch.empty(tokens, width, dtype=torch.bfloat16 if narrow else weight.dtype, device=y.device)
    scale = torch.empty(tokens * groups, dtype=torch.float32, device=y.device)
    z_or_y = y if z is None else z
    unit = unit_of(y, z_or_y) if width // groups % 8 == 0 else 1
    with on(y):
        _forward_kernel[(tokens * groups,)](
            y, z_or_y, weight, out, scale, scale if added is None else added, *in_units(unit, y),
            *in_units(unit, z_or_y), width // groups // unit, groups, eps, GATE=z is not None and added is None,
            ADD=added is not None, UNIT=unit, **_block(width // groups),
        )  # fmt: skip
    return out, scale


def backward(
    y: Tensor, z: Tensor | None, weight: Tensor, scale: Tensor, dout: Tensor, groups: int, dz: Tensor | None = None,
    stream: Tensor | None = None, trained: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The gradients of y, z and weight; that of z in `dz`, of any stride between rows, where it is given.

    stream: a gradient of y to be added. With a `dz` and no z, y was a sum, and dz becomes the gradient of its second
    part. trained: whether the weight's gradient is wanted; else it is None.
    """
    add = z is None and dz is not None
    tokens, width = y.shape
    per_program = max(1, -(-tokens // _PROGRAMS))
    programs = -(-tokens // per_program)
    dy = torch.empty(tokens, width, dtype=y.dtype, device=y.device)
    if dz is None:
        dz = dy[:0] if z is None else torch.empty(tokens, width, dtype=z.dtype, device=y.device)
    dweight = torch.empty(programs, width, dtype=torch.float32, device=y.device)
    z_or_y = z if z is not None else y if stream is None else stream
    unit = unit_of(y, z_or_y, dout, dz) if width // groups % 8 == 0 else 1
    with on(y):
        _backward_kernel[(programs, groups)](
            y, z_or_y, weight, scale, dout, dy, dz, dweight, *in_units(unit, y), *in_units(unit, z_or_y),
            *in_units(unit, dout), *in_units(unit, dz), width // groups // unit, groups, tokens, per_program,
            GATE=z is not None, STREAM=stream is not None, ADD=add, UNIT=unit, **_block(width // groups),
        )  # fmt: skip
    return dy, dz.clone() if len(dz) == 0 else dz, dweight.sum(0) if trained else None


def _fake_forward(y, z, weight, eps, groups, narrow):
    dtype = torch.bfloat16 if narrow else weight.dtype
    return y.new_empty(y.shape, dtype=dtype), y.new_empty(y.shape[0] * groups, dtype=torch.float32)


def _fake_backward(y, z, weight, scale, dout, groups):
    dz = y.new_empty(0, y.shape[1]) if z is None else z.new_empty(z.shape)
    return y.new_empty(y.shape), dz, y.new_empty(y.shape[1], dtype=torch.float32)


_norm = operator(
    "rms_norm(Tensor y, Tensor? z, Tensor weight, float eps, int groups, bool narrow) -> (Tensor, Tensor)", forward,
    _fake_forward,
)  # fmt: skip
_gradients = operator(
    "rms_norm_backward(Tensor y, Tensor? z, Tensor weight, Tensor scale, Tensor dout, int groups)"
    " -> (Tensor, Tensor, Tensor)", backward, _fake_backward,
)  # fmt: skip


class RMSNorm(torch.autograd.Function):
    """rms_norm(y) or, with z, rms_norm(y silu(z)): y, z (..., width), weight (width,) -> (..., width).

    In weight's dtype, or in bf16 with `narrow`.
    """

    @staticmethod
    def forward(ctx, y, z, weight, eps, groups, narrow):
        shape = y.shape
        y, z = (None if t is None else _flat(t) for t in (y, z))
        out, scale = _norm(y, z, weight, eps, groups, narrow)
        ctx.save_for_backward(y, z, weight, scale)
        ctx.groups, ctx.shape = groups, shape
        return out.view(shape)

    @staticmethod
    @handwritten_backward
    def backward(ctx, dout):
        y, z, weight, scale = ctx.saved_tensors
        dy, dz, dweight = _gradients(y, z, weight, scale, _flat(dout), ctx.groups)
        dz = None if z is None else dz.view(ctx.shape)
        return dy.view(ctx.shape), dz, dweight.to(weight.dtype), None, None, None


class AddRMSNorm(torch.autograd.Function):
    """x + more, or x if there is no more, and its norm: x and more (..., width) of two dtypes, weight (width,).

    The backward adds the gradient that comes to the sum from elsewhere in the same kernel.
    """

    @staticmethod
    def forward(ctx, x, more, weight, eps, narrow):
        ctx.set_materialize_grads(False)
        flat_x, flat_more = _flat(x), None if more is None else _flat(more)
        added = None if more is None else torch.empty(flat_x.shape, dtype=x.dtype, device=x.device)
        out, scale = forward(flat_x, flat_more, weight, eps, 1, narrow, added)
        ctx.save_for_backward(flat_x if added is None else added, weight, scale)
        ctx.shape, ctx.dtype = x.shape, None if more is None else more.dtype
        return x if added is None else added.view(x.shape), out.view(x.shape)

    @staticmethod
    def backward(ctx, dstream, dout):
        if dout is None:
            return dstream, None if ctx.dtype is None or dstream is None else dstream.to(ctx.dtype), None, None, None
        return AddRMSNorm._backward(ctx, dout, dstream)

    @staticmethod
    @handwritten_backward
    def _backward(ctx, dout, dstream):
        added, weight, scale = ctx.saved_tensors
        dmore = None if ctx.dtype is None else torch.empty(added.shape, dtype=ctx.dtype, device=added.device)
        stream = None if dstream is None else _flat(dstream)
        trained = ctx.needs_input_grad[2]
        dx, _, dweight = backward(added, None, weight, scale, _flat(dout), 1, dmore, stream, trained)
        dmore = None if dmore is None else dmore.view(ctx.shape)
        return dx.view(ctx.shape), dmore, None if dweight is None else dweight.to(weight.dtype), None, None


def _flat(t: Tensor) -> Tensor:
    """(tokens, width), rows contiguous: a view wherever the tokens are evenly spaced."""
    return rows_contiguous(t.flatten(0, -2))
