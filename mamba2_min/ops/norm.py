"""RMSNorm, and RMSNorm with the gate of a Mamba-2 block, each with a backward pass that keeps only its inputs."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba2_min.ops import gpu_kernels
from mamba2_min.ops.autograd import handwritten_backward, is_traced, materialize, pack_saved, unpack_saved
from mamba2_min.ops.recipes import with_recipe


def rms_norm_plain(x: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """The definition: x / rms(x) * weight (arXiv:1910.07467), over each of `groups` parts of the last axis."""
    x = x.to(weight.dtype)
    return _scaled(x, _inverse_rms(x, eps, groups)) * weight


def gated_rms_norm_plain(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, norm_before_gate: bool = False, groups: int = 1
) -> Tensor:
    """The definition: rms_norm(y silu(z)), or rms_norm(y) silu(z) with norm_before_gate (arXiv:2405.21060, 7.1)."""
    gate, y = F.silu(z.to(weight.dtype)), y.to(weight.dtype)
    if norm_before_gate:
        return rms_norm_plain(y, weight, eps, groups) * gate
    return rms_norm_plain(y * gate, weight, eps, groups)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_plain`: x (..., d), weight (d,) -> (..., d), in weight's dtype, or on a GPU in autocast's."""
    if _has_kernel(x, weight, 1):
        return _by_kernel(x, None, weight, eps, 1)
    if not torch.is_grad_enabled() or is_traced():  # one token at a time, `apply` alone would take as long
        return rms_norm_plain(x, weight, eps)
    return with_recipe(_RMSNorm.apply(x, weight, eps, 1), weight, partial(rms_norm_plain, eps=eps), x, weight)


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, norm_before_gate: bool = False, groups: int = 1
) -> Tensor:
    """`gated_rms_norm_plain`: y, z (..., d), weight (d,) -> (..., d), in weight's dtype, or on a GPU in autocast's."""
    if not norm_before_gate and _has_kernel(y, weight, groups) and z.dtype == y.dtype:
        return _by_kernel(y, z, weight, eps, groups)
    if not torch.is_grad_enabled() or is_traced():
        return gated_rms_norm_plain(y, z, weight, eps, norm_before_gate, groups)
    if norm_before_gate:
        return _RMSNorm.apply(y, weight, eps, groups) * F.silu(z.to(weight.dtype))
    compute = partial(gated_rms_norm_plain, eps=eps, groups=groups)
    return with_recipe(_GatedRMSNorm.apply(y, z, weight, eps, groups), weight, compute, y, z, weight)


def add_rms_norm_plain(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The definition: x + more, or x if there is no more, and `rms_norm_plain` of that."""
    x = x if more is None else x + more
    return x, rms_norm_plain(x, weight, eps)


def add_rms_norm(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm_plain`: x, more (..., d), weight (d,); the norm in weight's dtype, or on a GPU in autocast's."""
    if _has_kernel(x, weight, 1) and (more is None or torch.promote_types(x.dtype, more.dtype) == x.dtype):
        from mamba2_min.ops.norm_kernels import AddRMSNorm

        narrow = writes_bf16()
        x, u = AddRMSNorm.apply(x, more, weight, eps, narrow)
        return x, with_recipe(u, weight, partial(_by_kernel_again, eps=eps, groups=1, narrow=narrow), x, None, weight)
    x = x if more is None else x + more
    return x, rms_norm(x, weight, eps)


LONGEST = 8192  # numbers of a row that a kernel holds


def _has_kernel(x: Tensor, weight: Tensor, groups: int) -> bool:
    dtypes = (torch.bfloat16, torch.float32)
    return gpu_kernels.takes(x) and weight.dtype in dtypes and x.shape[-1] <= LONGEST * groups


def _by_kernel(y: Tensor, z: Tensor | None, weight: Tensor, eps: float, groups: int) -> Tensor:
    """What follows a norm is a projection, which autocast would have read in its own dtype: it is written in that."""
    from mamba2_min.ops.norm_kernels import RMSNorm

    narrow = writes_bf16()
    out = RMSNorm.apply(y, z, weight, eps, groups, narrow)
    return with_recipe(out, weight, partial(_by_kernel_again, eps=eps, groups=groups, narrow=narrow), y, z, weight)


def _by_kernel_again(y: Tensor, z: Tensor | None, weight: Tensor, eps: float, groups: int, narrow: bool) -> Tensor:
    from mamba2_min.ops.norm_kernels import forward

    flat_y = gpu_kernels.rows_contiguous(y.flatten(0, -2))
    flat_z = None if z is None else gpu_kernels.rows_contiguous(z.flatten(0, -2))
    return forward(flat_y, flat_z, weight, eps, groups, narrow)[0].view(y.shape)


def writes_bf16() -> bool:
    """Whether a norm's kernel writes bf16, whatever the dtype of its weight is."""
    return torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, groups):
        wide = x.to(weight.dtype)
        scale = _inverse_rms(wide, eps, groups)
        ctx.save_for_backward(x, weight, scale)  # as it came: bf16 takes half of the memory
        return _scaled(wide, scale) * weight

    @staticmethod
    @handwritten_backward
    def backward(ctx, dout):
        x, weight, scale = ctx.saved_tensors
        dx, dweight = _normed_backward(x.to(weight.dtype), weight, scale, dout)
        return dx.to(x.dtype), dweight, None, None


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z, weight, eps, groups):
        y = materialize(y)
        u = F.silu(z.to(weight.dtype)).mul_(y)
        scale = _inverse_rms(u, eps, groups)
        ctx.save_for_backward(y, pack_saved(z), weight, scale)
        ctx.dtype = z.dtype
        return _scaled(u, scale) * weight

    @staticmethod
    @handwritten_backward
    def backward(ctx, dout):
        y, bits, weight, scale = ctx.saved_tensors
        wide_z = unpack_saved(bits, ctx.dtype).to(weight.dtype)
        gate = F.silu(wide_z)
        du, dweight = _normed_backward(gate * y, weight, scale, dout)
        dz = torch.ops.aten.silu_backward(du * y, wide_z)
        return materialize(du.mul_(gate).to(y.dtype)), materialize(dz.to(ctx.dtype)), dweight, None, None


def _inverse_rms(u: Tensor, eps: float, groups: int) -> Tensor:
    """(..., groups, 1)"""
    parts = u.unflatten(-1, (groups, -1))
    return (parts.square().mean(-1, keepdim=True) + eps).rsqrt()


def _scaled(u: Tensor, scale: Tensor) -> Tensor:
    return (u.unflatten(-1, (scale.shape[-2], -1)) * scale).flatten(-2)


def _normed_backward(u: Tensor, weight: Tensor, scale: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of n * weight by u and weight, n = u * scale: du = scale (dn - n mean(n dn)), dn = dout weight."""
    n = _scaled(u, scale)
    product = dout * n
    dweight = product.flatten(0, -2).sum(0)
    shared = product.mul_(weight).unflatten(-1, (scale.shape[-2], -1)).mean(-1, keepdim=True)
    dn = (dout * weight).unflatten(-1, (scale.shape[-2], -1))
    return torch.addcmul(dn, n.unflatten(-1, (scale.shape[-2], -1)), shared, value=-1).mul_(scale).flatten(-2), dweight
