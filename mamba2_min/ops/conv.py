"""The short causal convolution of a Mamba block: each channel sees its own last few values, then SiLU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba2_min.ops import gpu_kernels
from mamba2_min.ops.autograd import (
    handwritten_backward,
    is_traced,
    materialize,
    no_compile,
    pack_saved,
    unpack_saved,
    unrounded,
    without_autocast,
)
from mamba2_min.ops.seq_idx import document_numbers

KERNEL_TAPS = 4  # that the GPU's kernel has
_BLOCK_ELEMENTS = 1 << 18  # of a product: it stays in a core's second-level cache until it is summed


def conv_silu_by_taps(padded: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None = None) -> Tensor:
    """The definition: silu(bias + sum_k weight[:, k] u_{t - (K - 1) + k}), one shifted product per tap.

    padded (b, K - 1 + l, c) is u with the K - 1 inputs before it, weight (c, K), bias (c,) or None; documents
    (b, K - 1 + l): a tap that would reach into another document reads zero. Returns (b, l, c).
    """
    K = weight.shape[1]
    l = padded.shape[1] - (K - 1)
    y = padded.new_zeros(()) if bias is None else bias
    for k in range(K):
        tap = padded[:, k : k + l]
        if documents is not None:
            tap = torch.where((documents[:, k : k + l] == documents[:, K - 1 :])[..., None], tap, 0)
        y = y + tap * weight[:, k]
    return F.silu(y)


@without_autocast
def causal_conv_silu(
    u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None = None, seq_idx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A depthwise convolution of K taps that never looks ahead, then SiLU (arXiv:2405.21060, section 7.1).

    u (b, l, c), weight (c, K), bias (c,) or None; state (b, K - 1, c), the inputs before the first, zeros if None;
    seq_idx (b, l): a document ends where it changes, and a tap that would reach into another one reads zero. The state
    belongs to the first document.
    Returns (b, l, c) in u's dtype, and the state after the last token (b, K - 1, c).
    """
    K, (b, l, c) = weight.shape[1], u.shape
    weight, bias = weight.to(u.dtype), None if bias is None else bias.to(u.dtype)
    fast = not is_traced()
    trains_state = torch.is_grad_enabled() and state is not None and state.requires_grad
    if K == KERNEL_TAPS and gpu_kernels.takes(u) and not trains_state:
        return _by_kernel(u, weight, bias, state, seq_idx)
    if state is None and seq_idx is None and fast and (torch.compiler.is_compiling() or not _is_cpu(u)):
        last = u[:, max(0, l - (K - 1)) :]
        last = F.pad(last, (0, 0, K - 1 - last.shape[1], 0))
        return _ShiftedConvSiLU.apply(u, weight, bias), last
    if state is None:
        state = u.new_zeros(b, K - 1, c)
    padded = torch.cat([state.to(u.dtype), u], dim=1)  # (b, K - 1 + l, c)
    new_state = padded[:, padded.shape[1] - (K - 1) :].clone()  # a view would keep all of `padded` alive
    documents = None
    if seq_idx is not None:
        documents = F.pad(document_numbers(seq_idx, b, l, u.device), (K - 1, 0))
        new_state = _of_last_document(new_state, documents)
    library = fast and _is_cpu(u) and (documents is None or (u.numel() > 0 and not torch.compiler.is_compiling()))
    form = _on_cpu if library else conv_silu_by_taps
    if not (fast and _is_cpu(u)) or torch.compiler.is_compiling() or bool(padded.detach().sum().isfinite()):
        return form(padded, weight, bias, documents), new_state
    # Else the derivative at NaN, itself NaN, would reach earlier tokens, even where nobody asks for it: 0 NaN = NaN.
    finite = padded.isfinite()
    reached = conv_silu_by_taps((~finite).to(u.dtype), torch.ones_like(weight), None, documents) > 0
    return form(padded.masked_fill(~finite, 0), weight, bias, documents).masked_fill(reached, torch.nan), new_state


def _of_last_document(last: Tensor, documents: Tensor) -> Tensor:
    """The last inputs (b, K - 1, c), zero where they are of another document than the last token: (b, K - 1 + l)."""
    own = documents[:, documents.shape[1] - last.shape[1] :] == documents[:, -1:]
    return torch.where(own[..., None], last, 0)


def _by_kernel(
    u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    from mamba2_min.ops.conv_kernels import ConvSiLU

    before = None if state is None else state.to(u.dtype).contiguous()
    documents = kernel_documents(u, seq_idx)
    return ConvSiLU.apply(u, weight, bias, before, documents), last_inputs(u, before, documents)


def kernel_documents(u: Tensor, seq_idx: Tensor | None) -> Tensor | None:
    """`document_numbers` as the kernels read them: (b, l) int32, contiguous; None where there is one document."""
    return None if seq_idx is None else document_numbers(seq_idx, u.shape[0], u.shape[1], u.device).int().contiguous()


def last_inputs(u: Tensor, before: Tensor | None, documents: Tensor | None) -> Tensor:
    """The last three inputs of the last document, (b, 3, c): of u (b, l, c), after those `before` (b, 3, c)."""
    l = u.shape[1]
    last = u[:, max(0, l - 3) :]
    if l >= 3 or before is None:
        last = F.pad(last, (0, 0, 3 - last.shape[1], 0))  # memory of its own: a view would keep all of u alive
    else:
        last = torch.cat([before[:, l:], last], dim=1)
    return last if documents is None else _of_last_document(last, F.pad(documents, (3, 0)))


def _is_cpu(t: Tensor) -> bool:
    return t.device.type == "cpu"


class _ShiftedConvSiLU(torch.autograd.Function):
    """The definition without a state, for a compiler: no shifted copy is written, and only u is kept."""

    @staticmethod
    def forward(ctx, u, weight, bias):
        ctx.save_for_backward(pack_saved(u), weight, bias)
        ctx.dtype = u.dtype
        return F.silu(_shifted(u, materialize(weight.t()), bias))

    @staticmethod
    @handwritten_backward
    def backward(ctx, dy):
        bits, weight, bias = ctx.saved_tensors
        u, taps = unpack_saved(bits, ctx.dtype), materialize(weight.t())
        K, l = weight.shape[1], u.shape[1]
        dv = materialize(torch.ops.aten.silu_backward(dy, _shifted(u, taps, bias)))
        du = dv * taps[-1]
        for s in range(1, K):
            du = du + F.pad(dv, (0, 0, 0, s))[:, s:] * taps[K - 1 - s]
        wide = torch.promote_types(u.dtype, torch.float32)
        shifts = [F.pad(u, (0, 0, s, 0))[:, :l] for s in range(K - 1, -1, -1)]
        dweight = torch.stack([(dv * shift).sum((0, 1), dtype=wide) for shift in shifts], dim=1)
        dbias = None if bias is None else dv.sum((0, 1), dtype=wide).to(bias.dtype)
        return du, dweight.to(weight.dtype), dbias


def _shifted(u: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """The sum before SiLU: u (b, l, c), taps (K, c), one contiguous row per shift -> (b, l, c)."""
    K, l = len(taps), u.shape[1]
    y = u * taps[-1] if bias is None else u * taps[-1] + bias
    for s in range(1, K):
        y = y + F.pad(u, (0, 0, s, 0))[:, :l] * taps[K - 1 - s]
    return y


@no_compile
def _on_cpu(padded: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None = None) -> Tensor:
    """`conv_silu_by_taps`. Documents become one row in which K - 1 zeros stand before each, so that no tap keeps a copy
    of its own."""
    if documents is None:
        return _ConvSiLU.apply(padded, weight, bias)
    gap = weight.shape[1] - 1
    place = torch.arange(documents.shape[1], device=documents.device)
    place = place + documents * gap  # (b, K - 1 + l): within the row, with its gaps
    lengths = place[:, -1] + 1
    place = place + (lengths.cumsum(0) - lengths)[:, None]
    apart = padded.new_zeros(int(lengths.sum()), padded.shape[2]).index_put((place,), padded)  # keeps `place` alone
    y = _ConvSiLU.apply(apart[None], weight, bias)[0]
    return y.index_select(0, (place[:, gap:] - gap).flatten()).unflatten(0, (len(padded), -1))


class _ConvSiLU(torch.autograd.Function):
    """The definition by the convolution of PyTorch's CPU library; only the input is kept."""

    @staticmethod
    def forward(ctx, padded, weight, bias):
        ctx.save_for_backward(padded, weight, bias)
        return F.silu(_convolved(padded, weight, bias), inplace=True)

    @staticmethod
    @handwritten_backward
    def backward(ctx, dy):
        padded, weight, bias = ctx.saved_tensors
        K, l = weight.shape[1], dy.shape[1]
        # An input reaches the K outputs from its own on: the same convolution, with the taps in reverse.
        zeros = dy.new_zeros(dy.shape[0], l + 2 * (K - 1), dy.shape[2])
        du = zeros[:, K - 1 : K - 1 + l]
        torch.ops.aten.silu_backward.grad_input(dy, _convolved(padded, weight, bias), grad_input=du)
        dpadded = _convolved(zeros, weight.flip(1), None)
        wide = torch.promote_types(dy.dtype, torch.float32)
        dtaps, dbias = dy.new_zeros(K, dy.shape[2], dtype=wide), dy.new_zeros(dy.shape[2], dtype=wide)
        tokens = max(1, _BLOCK_ELEMENTS // dy.shape[2])  # of several rows, or of a part of one
        ones = dy.new_ones(min(tokens, dy.shape[0] * l), dtype=wide)
        with unrounded():  # a sum over tokens is faster as a product with ones
            for rows, past in zip(*(t.split(max(1, tokens // l)) for t in (du, padded)), strict=True):
                for start in range(0, l, tokens):
                    part = rows[:, start : start + tokens]
                    n = part.shape[1]
                    one = ones[: len(part) * n]
                    dbias.addmv_(part.flatten(0, 1).to(wide).t(), one)
                    for k in range(K):
                        product = part * past[:, start + k : start + k + n]
                        dtaps[k].addmv_(product.flatten(0, 1).to(wide).t(), one)
        return dpadded, dtaps.t().to(weight.dtype), None if bias is None else dbias.to(bias.dtype)


def _convolved(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(b, K - 1 + l, c) -> (b, l, c). As an image of height 1 in the channels-last layout, it needs no copy."""
    image = padded[:, None].permute(0, 3, 1, 2)  # (b, c, 1, K - 1 + l)
    return F.conv2d(image, weight[:, None, None], bias, groups=len(weight)).permute(0, 2, 3, 1)[:, 0]
