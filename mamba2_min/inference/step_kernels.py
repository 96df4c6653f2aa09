"""One token per row on a GPU, three kernels a layer:

    project   normed(x) W^T for in_proj, and of its x, B and C the convolution and SiLU
    advance   softplus(dt), decay, the state's update, C h + D x, and the gate
    project   x + normed(y silu(z)) W^T for out_proj

`project` is one of two kernels: `project_rows` for one or two texts, `project_tiles` with matrix products for more.
What a norm needs, the sum of squares of its input, each program sums itself beside its products. A channel of the
convolution belongs to one program, so its window is moved in place.

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
    u, scale, weight, bias, out, k, outputs, eps, window, taps, conv_bias, first, c, b, BIAS: tl.constexpr,
    ADD: tl.constexpr, PARTS: tl.constexpr, CONVOLVE: tl.constexpr, CONV_BIAS: tl.constexpr, TAPS: tl.constexpr,
    PAIRED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """As `project_rows`: one program per BM rows of u and BR outputs. The division by the rms follows the products."""
    rows, outs = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BR + tl.arange(0, BR)
    here, there = rows < b, outs < outputs
    u += rows.to(tl.int64)[:, None] * k
    weight += outs.to(tl.int64)[None, :] * k
    if PAIRED:
        gdc_wait()
        gdc_launch_dependents()
    width = k // PARTS
    total = tl.zeros((BM, BR), tl.float32)
    for part in tl.static_range(PARTS):
        products = tl.zeros((BM, BR), tl.float32)
        squares = tl.zeros((BM,), tl.float32)
        for start in range(0, width, BK):
            K = start + tl.arange(0, BK)
            inside, K = K < width, K + part * width
            value = tl.load(u + K[None, :], mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)
            s = tl.load(scale + K, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(weight + K[:, None], mask=inside[:, None] & there[None, :], other=0.0)
            squares += tl.sum(value * value, axis=1)
            products = tl.dot((value * s[None, :]).to(w.dtype), w, products, input_precision=PRECISION)
        total += products * tl.rsqrt(squares / width + eps)[:, None]
    if BIAS:
        total += tl.load(bias + outs, mask=there, other=0.0).to(tl.float32)[None, :]
    inside = here[:, None] & there[None, :]
    place = out + rows.to(tl.int64)[:, None] * outputs + outs[None, :]
    if ADD:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if CONVOLVE:
        channels = (outs - first)[None, :] + tl.zeros((BM, 1), tl.int32)
        convolved = here[:, None] & (channels >= 0) & (channels < c)
        window += rows.to(tl.int64)[:, None] * (TAPS - 1) * c + channels
        now = total.to(out.dtype.element_ty).to(tl.float32)
        past = _of_the_past(window, taps, conv_bias, channels, convolved, c, CONV_BIAS, TAPS)
        total = _convolved(past, now, window, taps, channels, convolved, c, TAPS)
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def advance(
    projected, ssm, dt_bias, A_log, D, out, h, heads_a_group, p, n, width, PAIRED: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """H = exp(dt A) H + dt x B^T and out = (H C + D x) silu(z): one program per row, head and BP channels of it.

    projected (b, width) is z | x B C | dt, of which x, B and C went through the convolution; ssm (b, h, p, n) is
    changed in place.
    """
    row, head = (tl.program_id(0) // h).to(tl.int64), tl.program_id(0) % h
    group, inner = head // heads_a_group, h * p
    P, N = tl.program_id(1) * BP + tl.arange(0, BP), tl.arange(0, BN)
    channels, states = P < p, N < n
    tile, inside = P[:, None] * n + N[None, :], channels[:, None] & states[None, :]
    ssm += (row * h + head) * p * n
    state = tl.load(ssm + tile, mask=inside, other=0.0).to(tl.float32)
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
    tl.store(ssm + tile, state.to(ssm.dtype.element_ty), mask=inside)
    y = tl.sum(state * C[None, :], axis=1) + skip * x
    tl.store(out + row * inner + head * p + P, (y * z / (1 + tl.exp(-z))).to(out.dtype.element_ty), mask=channels)
