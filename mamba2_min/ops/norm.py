"""RMSNorm, and RMSNorm with the gate of a Mamba-2 block, each with a backward that keeps nothing but its inputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba2_min.ops.autograd import as_bits, handwritten_backward, materialize, of_bits


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (arXiv:1910.07467): x (..., d), weight (d,), in weight's dtype."""
    if not torch.is_grad_enabled():  # token by token, what `apply` itself costs would show
        x = x.to(weight.dtype)
        return (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt_()).mul_(weight)
    return _RMSNorm.apply(x, weight, eps, 1)


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, norm_before_gate: bool = False, groups: int = 1
) -> Tensor:
    """rms_norm(y * silu(z)), or rms_norm(y) * silu(z) with norm_before_gate; y and z (..., d), in weight's dtype.

    Each of `groups` equal parts of the last dimension has an rms of its own.
    """
    if groups == 1 and not torch.is_grad_enabled():
        gate, y = F.silu(z.to(weight.dtype)), y.to(weight.dtype)
        if norm_before_gate:
            return rms_norm(y, weight, eps).mul_(gate)
        return rms_norm(gate.mul_(y), weight, eps)
    if norm_before_gate:
        return _RMSNorm.apply(y, weight, eps, groups) * F.silu(z.to(weight.dtype))
    return _GatedRMSNorm.apply(y, z, weight, eps, groups)


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
        ctx.save_for_backward(y, as_bits(z), weight, scale)
        ctx.dtype = z.dtype
        return _scaled(u, scale) * weight

    @staticmethod
    @handwritten_backward
    def backward(ctx, dout):
        y, bits, weight, scale = ctx.saved_tensors
        wide_z = of_bits(bits, ctx.dtype).to(weight.dtype)
        gate = F.silu(wide_z)
        du, dweight = _normed_backward(gate * y, weight, scale, dout)
        dz = torch.ops.aten.silu_backward(du * y, wide_z)
        return materialize(du.mul_(gate).to(y.dtype)), materialize(dz.to(ctx.dtype)), dweight, None, None


def _inverse_rms(u: Tensor, eps: float, groups: int) -> Tensor:
    """(..., groups, 1)"""
    parts = u.unflatten(-1, (groups, -1))
    return (parts.square().mean(-1, keepdim=True) + eps).rsqrt_()


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
