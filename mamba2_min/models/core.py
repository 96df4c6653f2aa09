"""What lies between the two projections of a mixer, by our kernels, as one function with one backward pass.

It computes what `Mamba2Mixer.forward` does there and launches the same kernels. Alone, each operation returns the
gradient of its part of in_proj's output, and PyTorch copies the parts into one tensor. Here each is written to its
place in that tensor. For training on a GPU, not compiled.

Frozen parameters (LoRA) get no gradient, and the output of a frozen convolution is computed again instead of kept:
that is an eighth of what a layer keeps, for a twentieth of the time of its kernels.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba2_min.ops import gpu_kernels
from mamba2_min.ops.autograd import autocast_off, handwritten_backward
from mamba2_min.ops.conv import KERNEL_TAPS, conv_silu_by_taps, kernel_documents, last_inputs
from mamba2_min.ops.norm import LONGEST, writes_bf16
from mamba2_min.ops.recipes import with_recipe
from mamba2_min.ssd import Shape, chosen
from mamba2_min.ssd.stretches import Crossing, inputs_before, is_spread

if TYPE_CHECKING:
    from mamba2_min.models.mamba2 import Mamba2Mixer


def takes(mixer: Mamba2Mixer, zxBCdt: Tensor, conv_state: Tensor | None, ssm_state: Tensor | None) -> bool:
    """Whether `core` computes the mixer's part from these states."""
    if ssm_state is not None and ssm_state.dtype not in (torch.float32, torch.bfloat16):
        return False
    c = mixer.config
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not gpu_kernels.takes(zxBCdt):
        return False
    weights = (mixer.conv1d.weight, mixer.dt_bias, mixer.A_log, mixer.D, mixer.norm.weight)
    return (
        c.d_conv == KERNEL_TAPS
        and not c.norm_before_gate
        and c.d_inner // mixer.norm.groups <= LONGEST
        and all(type(w) in (nn.Parameter, Tensor) and w.dtype in (torch.float32, torch.bfloat16) for w in weights)
        and zxBCdt.is_contiguous()
        and len(zxBCdt) > 0
        and mixer.has_plain_norm()
        and mixer.reads_conv1d()
        and chosen(zxBCdt.device, zxBCdt.dtype, shape_of(mixer, zxBCdt)) == "triton"
    )


def shape_of(mixer: Mamba2Mixer, zxBCdt: Tensor) -> Shape:
    c, (b, l, _) = mixer.config, zxBCdt.shape
    return Shape(b, l, c.nheads, c.headdim, c.ngroups, c.d_state, c.chunk_size)


def core(
    mixer: Mamba2Mixer, zxBCdt: Tensor, conv_state: Tensor | None, ssm_state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """in_proj's output (b, l, d_in_proj) -> what out_proj reads (b, l, d_inner), and both states after the last token.

    As the norm's kernel, it writes bf16 under autocast, and otherwise the dtype of the norm's weight.
    """
    c, conv, norm = mixer.config, mixer.conv1d, mixer.norm
    before = None if conv_state is None else conv_state.to(zxBCdt.dtype).contiguous()
    start = None if ssm_state is None else ssm_state.float().contiguous()
    documents = kernel_documents(zxBCdt, seq_idx)
    xBC = zxBCdt[..., c.d_inner : c.d_inner + c.conv_dim]
    if is_spread():
        before, window = inputs_before(xBC, c.d_conv - 1, before, seq_idx)
        before = before.contiguous()
    else:
        window = last_inputs(xBC, before, documents)
    about: dict[str, Any] = {
        "sizes": shape_of(mixer, zxBCdt),
        "eps": norm.eps,
        "parts": norm.groups,
        "narrow": writes_bf16(),
        "crossing": Crossing(seq_idx) if is_spread() else None,
    }
    with autocast_off(zxBCdt):
        weights = (conv.weight[:, 0], conv.bias, mixer.dt_bias, mixer.A_log, mixer.D, norm.weight)
        out, ssm_state = Core.apply(zxBCdt, start, *weights, before, documents, about)
    y = about.pop("y")  # what the norm reads
    return with_recipe(out, norm.weight, partial(_normed, about), y, zxBCdt, norm.weight), window, ssm_state


def _normed(about: dict[str, Any], y: Tensor, zxBCdt: Tensor, weight: Tensor) -> Tensor:
    """(b, l, h, p) -> (b, l, d_inner)"""
    s, z = about["sizes"], _parts(zxBCdt, about["sizes"])[0]
    return _norm(about, y, z, weight)[0].view(s.b, s.l, -1)


def _norm(about: dict[str, Any], y: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    from mamba2_min.ops import norm_kernels

    flat_y = y.view(z.shape[0] * z.shape[1], -1)
    return norm_kernels.forward(flat_y, z.flatten(0, 1), weight, about["eps"], about["parts"], about["narrow"])


def _parts(t: Tensor, s: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Views of z (b, l, h p), x B C (b, l, h p + 2 g n) and dt (b, l, h)."""
    return t.split([s.h * s.p, s.h * s.p + 2 * s.g * s.n, s.h], dim=-1)  # type: ignore[return-value]


def _heads(xBC: Tensor, s: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Views: x (b, l, h, p), B and C (b, l, g, n)."""
    x, B, C = xBC.split([s.h * s.p, s.g * s.n, s.g * s.n], dim=-1)
    return x.unflatten(-1, (s.h, s.p)), B.unflatten(-1, (s.g, s.n)), C.unflatten(-1, (s.g, s.n))


class Core(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, zxBCdt, start, taps, bias, dt_bias, A_log, D, weight, before, documents, about: dict[str, Any]
    ):  # fmt: skip
        from mamba2_min.ops import conv_kernels
        from mamba2_min.ssd import triton

        s, dtype = about["sizes"], zxBCdt.dtype
        z, xBC, dt = _parts(zxBCdt, s)
        taps_, bias_ = taps.to(dtype).contiguous(), None if bias is None else bias.to(dtype)
        convolved = conv_kernels.forward(xBC, taps_, bias_, before, documents)
        D_ = D.float()
        ctx.from_a_state = start is not None
        if start is None:
            start = zxBCdt.new_zeros(s.b, s.h, s.p, s.n, dtype=torch.float32)
        x, B, C = _heads(convolved, s)
        y, last, H, *decays = triton.forward(
            x, dt, A_log, B, C, D_, start, documents, dt_bias=dt_bias, crossing=about["crossing"]
        )
        out, scale = _norm(about, y, z, weight)
        about["y"] = y
        ctx.frozen = not any(ctx.needs_input_grad[2:8])
        inputs = (before, documents, zxBCdt, taps_, bias_, weight, None if ctx.frozen else convolved)
        ctx.save_for_backward(*inputs, A_log, D_, y, scale, H, *decays)
        ctx.about, ctx.dtypes = about, [None if t is None else t.dtype for t in (taps, bias, dt_bias, A_log, D)]
        return out.view(s.b, s.l, -1), last

    @staticmethod
    @handwritten_backward
    def backward(ctx, dout, dlast):
        from mamba2_min.ops import conv_kernels, norm_kernels
        from mamba2_min.ssd import triton

        before, documents, *kept = ctx.saved_tensors
        zxBCdt, taps, bias, weight, convolved, A_log, D, y, scale, H, *decays = kept
        s: Shape = ctx.about["sizes"]
        z, xBC, _ = _parts(zxBCdt, s)
        gradient = torch.empty_like(zxBCdt)
        dz, dxBC, ddt = _parts(gradient, s)
        trained = not ctx.frozen
        if convolved is None:
            convolved = conv_kernels.forward(xBC, taps, bias, before, documents)
        dconvolved = torch.empty_like(convolved)

        flat_y, flat_z, flat_dz = y.view(s.b * s.l, -1), z.flatten(0, 1), dz.flatten(0, 1)
        flat_dout = gpu_kernels.rows_contiguous(dout.flatten(0, 1))
        dy, _, dweight = norm_kernels.backward(
            flat_y, flat_z, weight, scale, flat_dout, ctx.about["parts"], flat_dz, trained=trained
        )
        x, B, C = _heads(convolved, s)
        into = (*_heads(dconvolved, s), ddt)
        dy, dlast = dy.view(y.shape), dlast.contiguous()
        arguments = (dy, dlast, x, A_log, B, C, D, documents, H, *decays)
        _, ddt_bias, dA_log, _, _, dstart, dD = triton.backward(
            *arguments, into=into, trained=trained, crossing=ctx.about["crossing"]
        )
        _, dtaps, dbias = conv_kernels.backward(xBC, dconvolved, taps, bias, before, documents, dxBC, trained)
        small = [dtaps, None if bias is None else dbias, ddt_bias, dA_log, dD]
        narrowed = [None if t is None else t.to(dtype) for t, dtype in zip(small, ctx.dtypes, strict=True)]
        dstart = dstart if ctx.from_a_state else None
        dweight = None if dweight is None else dweight.to(weight.dtype)
        dbefore = None
        if ctx.needs_input_grad[8]:
            dbefore = _gradient_of_before(before, xBC, taps, bias, documents, dconvolved).to(before.dtype)
        return gradient, dstart, *narrowed, dweight, dbefore, None, None


def _gradient_of_before(
    before: Tensor, xBC: Tensor, taps: Tensor, bias: Tensor | None, documents: Tensor | None, dconvolved: Tensor
) -> Tensor:
    """The gradient of the inputs before the text: they reach as many of the first outputs, by the definition."""
    few = min(before.shape[1], xBC.shape[1])
    numbers = None if documents is None else F.pad(documents[:, :few], (before.shape[1], 0))
    with torch.enable_grad():
        past = before.detach().float().requires_grad_()
        padded = torch.cat([past, xBC[:, :few].detach().float()], 1)
        first = conv_silu_by_taps(
            padded, taps.detach().float(), None if bias is None else bias.detach().float(), numbers
        )
        return torch.autograd.grad(first, past, dconvolved[:, :few].float())[0]
