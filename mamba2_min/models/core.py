"""What lies between the two projections of a mixer, by our kernels, as one function with one backward pass.

It computes what `Mamba2Mixer.forward` does there and launches the same kernels. Alone, each operation returns the
gradient of its part of in_proj's output, and PyTorch copies the parts into one tensor. Here each is written to its
place in that tensor. For training on a GPU; a state to start from, packed documents and compilers go the usual way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba2_min.ops import gpu_kernels
from mamba2_min.ops.autograd import autocast_off, handwritten_backward
from mamba2_min.ops.norm import writes_bf16
from mamba2_min.ssd import Shape, chosen
from mamba2_min.ssd.stretches import is_spread

if TYPE_CHECKING:
    from mamba2_min.models.mamba2 import Mamba2Mixer

_TAPS = 4  # that the kernel of the convolution has


def takes(mixer: Mamba2Mixer, zxBCdt: Tensor, *unusual: Tensor | None) -> bool:
    """Whether `core` computes the mixer's part: without the `unusual` arguments, states and documents."""
    if is_spread() or any(t is not None for t in unusual):
        return False
    c = mixer.config
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not gpu_kernels.takes(zxBCdt):
        return False
    weights = (mixer.conv1d.weight, mixer.dt_bias, mixer.A_log, mixer.D, mixer.norm.weight)
    return (
        c.d_conv == _TAPS
        and not c.norm_before_gate
        and c.d_inner // mixer.norm.groups <= 8192
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


def core(mixer: Mamba2Mixer, zxBCdt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """in_proj's output (b, l, d_in_proj) -> what out_proj reads (b, l, d_inner), and both states after the last token.

    As the norm's kernel, it writes bf16 under autocast, and otherwise the dtype of the norm's weight.
    """
    c, conv, norm = mixer.config, mixer.conv1d, mixer.norm
    l = zxBCdt.shape[1]
    window = zxBCdt[:, max(0, l - (_TAPS - 1)) :, c.d_inner : c.d_inner + c.conv_dim]
    window = F.pad(window, (0, 0, _TAPS - 1 - window.shape[1], 0))
    about = {"sizes": shape_of(mixer, zxBCdt), "eps": norm.eps, "parts": norm.groups, "narrow": writes_bf16()}
    with autocast_off(zxBCdt):
        weights = (conv.weight[:, 0], conv.bias, mixer.dt_bias, mixer.A_log, mixer.D, norm.weight)
        y, ssm_state = Core.apply(zxBCdt, *weights, about)
    return y, window, ssm_state


def _parts(t: Tensor, s: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Views of z (b, l, h p), x B C (b, l, h p + 2 g n) and dt (b, l, h)."""
    return t.split([s.h * s.p, s.h * s.p + 2 * s.g * s.n, s.h], dim=-1)  # type: ignore[return-value]


def _heads(xBC: Tensor, s: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Views: x (b, l, h, p), B and C (b, l, g, n)."""
    x, B, C = xBC.split([s.h * s.p, s.g * s.n, s.g * s.n], dim=-1)
    return x.unflatten(-1, (s.h, s.p)), B.unflatten(-1, (s.g, s.n)), C.unflatten(-1, (s.g, s.n))


class Core(torch.autograd.Function):
    @staticmethod
    def forward(ctx, zxBCdt, taps, bias, dt_bias, A_log, D, weight, about: dict[str, Any]):
        from mamba2_min.ops import conv_kernels, norm_kernels
        from mamba2_min.ssd import triton

        s, dtype = about["sizes"], zxBCdt.dtype
        z, xBC, dt = _parts(zxBCdt, s)
        taps_, bias_ = taps.to(dtype).contiguous(), None if bias is None else bias.to(dtype)
        convolved = conv_kernels.forward(xBC, taps_, bias_)
        D_ = D.float()
        start = zxBCdt.new_zeros(s.b, s.h, s.p, s.n, dtype=torch.float32)
        x, B, C = _heads(convolved, s)
        y, last, H, *decays = triton.forward(x, dt, A_log, B, C, D_, start, None, dt_bias=dt_bias)
        flat_y, flat_z = y.view(s.b * s.l, -1), z.flatten(0, 1)
        out, scale = norm_kernels.forward(flat_y, flat_z, weight, about["eps"], about["parts"], about["narrow"])
        ctx.save_for_backward(zxBCdt, taps_, bias_, weight, convolved, A_log, D_, y, scale, H, *decays)
        ctx.about, ctx.dtypes = about, [None if t is None else t.dtype for t in (taps, bias, dt_bias, A_log, D)]
        return out.view(s.b, s.l, -1), last

    @staticmethod
    @handwritten_backward
    def backward(ctx, dout, dlast):
        from mamba2_min.ops import conv_kernels, norm_kernels
        from mamba2_min.ssd import triton

        zxBCdt, taps, bias, weight, convolved, A_log, D, y, scale, H, *decays = ctx.saved_tensors
        s: Shape = ctx.about["sizes"]
        z, xBC, _ = _parts(zxBCdt, s)
        gradient = torch.empty_like(zxBCdt)
        dz, dxBC, ddt = _parts(gradient, s)
        dconvolved = torch.empty_like(convolved)

        flat_y, flat_z, flat_dz = y.view(s.b * s.l, -1), z.flatten(0, 1), dz.flatten(0, 1)
        flat_dout = gpu_kernels.rows_contiguous(dout.flatten(0, 1))
        dy, _, dweight = norm_kernels.backward(flat_y, flat_z, weight, scale, flat_dout, ctx.about["parts"], flat_dz)
        x, B, C = _heads(convolved, s)
        into = (*_heads(dconvolved, s), ddt)
        dy, dlast = dy.view(y.shape), dlast.contiguous()
        _, ddt_bias, dA_log, _, _, _, dD = triton.backward(dy, dlast, x, A_log, B, C, D, None, H, *decays, into=into)
        _, dtaps, dbias = conv_kernels.backward(xBC, dconvolved, taps, bias, du=dxBC)
        small = [dtaps, None if bias is None else dbias, ddt_bias, dA_log, dD]
        narrowed = [None if t is None else t.to(dtype) for t, dtype in zip(small, ctx.dtypes, strict=True)]
        return gradient, *narrowed, dweight.to(weight.dtype), None
