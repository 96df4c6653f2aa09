"""One token per row on a GPU, three or four kernels a layer.

For up to four texts, each row by programs of its own:

    project_rows   normed(x) W^T for in_proj, and of its x, B and C the convolution and SiLU
    advance        softplus(dt), decay, the state's update, C h + D x, and the gate
    project_rows   x + normed(y silu(z)) W^T for out_proj

What a norm needs, the sum of squares of its input, each program sums itself beside its products. For more texts the
products go through the matrix units:

    join           x + what the layer before adds to it, and its norm
    project_tiles  in_proj, and of its x, B and C the convolution and SiLU
    advance        as above; where one rms is taken over all of y silu(z), also the parts of its sum of squares
    project_tiles  out_proj, of numbers that have not been divided by the rms: the next `join` does it

A channel of the convolution belongs to one program, so its window is moved in place.

On GPUs that can (PAIRED), a kernel begins while the one before it ends, and reads what that one does not write
(weights, the state, the window) before it waits for its result. Each waits before it lets the next begin, so all but
the last kernel have ended by then.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba2_min.ops.triton_functions import softplus


@triton.jit
def _nothing():
    pass


try:
    from triton.backends.nvidia.compiler import CUDAOptions
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    CAN_PAIR = hasattr(CUDAOptions, "launch_pdl")
except ImportError:  # an older Triton
    gdc_launch_dependents, gdc_wait, CAN_PAIR = _nothing, _nothing, False


@triton.jit
def _of_the_past(window, taps, bias, channels, there, c, CONV_BIAS: tl.constexpr, TAPS: tl.constexpr):
    """The convolution's sum over earlier tokens, of channels whose windows begin at `window`."""
    total = tl.zeros(there.shape, tl.float32)
    if CONV_BIAS:
        total += tl.load(bias + channels, mask=there, other=0.0).to(tl.float32)
    for k in tl.static_range(TAPS - 1):
        past = tl.load(window + k * c, mask=there, other=0.0).to(tl.float32)
        total += past * tl.load(taps + channels * TAPS + k, mask=there, other=0.0).to(tl.float32)
    return total


@triton.jit
def _convolved(past, now, window, taps, channels, there, c, TAPS: tl.constexpr):
    """SiLU of that sum and of this token, where `there`, otherwise `now`; moves the window by a token."""
    total = past + now * tl.load(taps + channels * TAPS + (TAPS - 1), mask=there, other=0.0).to(tl.float32)
    for k in tl.static_range(TAPS - 2):
        tl.store(window + k * c, tl.load(window + (k + 1) * c, mask=there, other=0.0), mask=there)
    if TAPS > 1:
        tl.store(window + (TAPS - 2) * c, now.to(window.dtype.element_ty), mask=there)
    return tl.where(there, total / (1 + tl.exp(-total)), now)


@triton.jit
def project_rows(
    u, scale, weight, bias, out, k, outputs, eps, window, taps, conv_bias, first, c, BIAS: tl.constexpr,
    ADD: tl.constexpr, PARTS: tl.constexpr, CONVOLVE: tl.constexpr, CONV_BIAS: tl.constexpr, TAPS: tl.constexpr,
    PAIRED: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out (b, outputs) = weight (u / rms(u) * scale) + bias, an rms for each of PARTS parts of u (b, k); ADD: to out.

    CONVOLVE: of the c outputs from `first` on, what the convolution and SiLU make of them; window (b, TAPS - 1, c).
    One program per row of u and BR outputs.
    """
    row = tl.program_id(1).to(tl.int64)
    outs, K = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BK)
    inside, there = K < k, outs < outputs
    w = tl.load(weight + outs.to(tl.int64)[:, None] * k + K[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    s = tl.load(scale + K, mask=inside, other=0.0).to(tl.float32)
    channels = outs - first
    convolved = (channels >= 0) & (channels < c)
    window += row * (TAPS - 1) * c + channels
    if CONVOLVE:
        past = _of_the_past(window, taps, conv_bias, channels, convolved, c, CONV_BIAS, TAPS)
    if PAIRED:
        gdc_wait()
        gdc_launch_dependents()
    value = tl.load(u + row * k + K, mask=inside, other=0.0).to(tl.float32)
    width = k // PARTS
    if PARTS == 1:
        normed = value * tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    else:
        normed = tl.zeros((BK,), tl.float32)
        for part in tl.static_range(PARTS):
            mine = tl.where(K // width == part, value, 0.0)
            normed += mine * tl.rsqrt(tl.sum(mine * mine, axis=0) / width + eps)
    total = tl.sum(w.to(tl.float32) * (normed * s)[None, :], axis=1)
    if BIAS:
        total += tl.load(bias + outs, mask=there, other=0.0).to(tl.float32)
    place = out + row * outputs + outs
    if ADD:
        total += tl.load(place, mask=there, other=0.0).to(tl.float32)
    if CONVOLVE:
        now = total.to(out.dtype.element_ty).to(tl.float32)
        total = _convolved(past, now, window, taps, channels, convolved, c, TAPS)
    tl.store(place, total.to(out.dtype.element_ty), mask=there)


@triton.jit
def project_tiles(
    u, weight, bias, out, b, k, section_width, outputs, window, taps, conv_bias, first, c, BIAS: tl.constexpr,
    CONVOLVE: tl.constexpr, CONV_BIAS: tl.constexpr, TAPS: tl.constexpr, PAIRED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out (sections, b, outputs) = u weight^T + bias, u (b, k), as a sum over sections of k; one, to CONVOLVE as above.

    One program per BM rows of u, BR outputs and section.
    """
    rows, outs = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BR + tl.arange(0, BR)
    here, there, section = rows < b, outs < outputs, tl.program_id(2)
    rows = rows.to(tl.int64)[:, None]
    u += rows * k + section * section_width
    weight += outs.to(tl.int64)[None, :] * k + section * section_width
    if CONVOLVE:
        channels = (outs - first)[None, :] + tl.zeros((BM, 1), tl.int32)
        convolved = here[:, None] & (channels >= 0) & (channels < c)
        window += rows * (TAPS - 1) * c + channels
        past = _of_the_past(window, taps, conv_bias, channels, convolved, c, CONV_BIAS, TAPS)
    if PAIRED:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros((BM, BR), tl.float32)
    end = tl.minimum(section_width, k - section * section_width)
    for start in range(0, end, BK):
        K = start + tl.arange(0, BK)
        values = tl.load(u + K[None, :], mask=here[:, None] & (K < end)[None, :], other=0.0)
        w = tl.load(weight + K[:, None], mask=(K < end)[:, None] & there[None, :], other=0.0)
        total = tl.dot(values, w, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + outs, mask=there, other=0.0).to(tl.float32)[None, :]
    if CONVOLVE:
        now = total.to(out.dtype.element_ty).to(tl.float32)
        total = _convolved(past, now, window, taps, channels, convolved, c, TAPS)
    place = out + (section.to(tl.int64) * b + rows) * outputs + outs[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=here[:, None] & there[None, :])


@triton.jit
def join(
    x, added, bias, squares, parts, inner, inner_eps, scale, eps, out, d, ADD: tl.constexpr, BIAS: tl.constexpr,
    DIVIDE: tl.constexpr, PAIRED: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """out = norm(x) for x (b, d), to which the ADD sections of added (ADD, b, d) and a bias are added first, in place.

    DIVIDE: added is divided by the rms of `inner` numbers, the parts of whose sum of squares are squares (b, parts).
    One program per row.
    """
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    inside = at < d
    s = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
    if PAIRED:
        gdc_wait()
        gdc_launch_dependents()
    value = tl.load(x + row * d + at, mask=inside, other=0.0).to(tl.float32)
    if ADD > 0:
        more = tl.zeros((BD,), tl.float32)
        for section in tl.static_range(ADD):
            more += tl.load(added + (section * tl.num_programs(0) + row) * d + at, mask=inside, other=0.0)
        if DIVIDE:
            part = tl.arange(0, BS)
            total = tl.sum(tl.load(squares + row * parts + part, mask=part < parts, other=0.0), axis=0)
            more *= tl.rsqrt(total / inner + inner_eps)
        if BIAS:
            more += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
        narrow = (value + more).to(x.dtype.element_ty)
        tl.store(x + row * d + at, narrow, mask=inside)
        value = narrow.to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value, axis=0) / d + eps) * s
    tl.store(out + row * d + at, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def advance(
    projected, ssm, dt_bias, A_log, D, norm, out, squares, h, heads_a_group, p, n, width, SQUARES: tl.constexpr,
    PAIRED: tl.constexpr, KEPT: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """H = exp(dt A) H + dt x B^T and out = (H C + D x) silu(z): one program per row, head and BP channels of it.

    projected (b, width) is z | x B C | dt, of which x, B and C went through the convolution; ssm (b, h, p, n) is
    changed in place. SQUARES: the sum of squares of a program's part of out is stored, and then out is multiplied by
    the gated norm's weight. KEPT: how long caches keep the state.
    """
    row, head = (tl.program_id(0) // h).to(tl.int64), tl.program_id(0) % h
    group, inner = head // heads_a_group, h * p
    P, N = tl.program_id(1) * BP + tl.arange(0, BP), tl.arange(0, BN)
    channels, states = P < p, N < n
    tile, inside = P[:, None] * n + N[None, :], channels[:, None] & states[None, :]
    ssm += (row * h + head) * p * n
    state = tl.load(ssm + tile, mask=inside, other=0.0, eviction_policy=KEPT).to(tl.float32)
    rate = tl.exp(tl.load(A_log + head).to(tl.float32))
    skip, offset = tl.load(D + head).to(tl.float32), tl.load(dt_bias + head).to(tl.float32)
    if PAIRED:
        gdc_wait()
        gdc_launch_dependents()
    projected += row * width
    z = tl.load(projected + head * p + P, mask=channels, other=0.0).to(tl.float32)
    x = tl.load(projected + inner + head * p + P, mask=channels, other=0.0).to(tl.float32)
    B_at = projected + 2 * inner + group * n
    C_at = B_at + (h // heads_a_group) * n
    B = tl.load(B_at + N, mask=states, other=0.0).to(tl.float32)
    C = tl.load(C_at + N, mask=states, other=0.0).to(tl.float32)
    dt = softplus(tl.load(projected + width - h + head).to(tl.float32) + offset)
    state = state * tl.exp(-dt * rate) + (dt * x)[:, None] * B[None, :]
    tl.store(ssm + tile, state.to(ssm.dtype.element_ty), mask=inside, eviction_policy=KEPT)
    y = (tl.sum(state * C[None, :], axis=1) + skip * x) * z / (1 + tl.exp(-z))
    if SQUARES:
        tl.store(squares + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1), tl.sum(y * y, axis=0))
        y *= tl.load(norm + head * p + P, mask=channels, other=0.0).to(tl.float32)
    tl.store(out + row * inner + head * p + P, y.to(out.dtype.element_ty), mask=channels)
