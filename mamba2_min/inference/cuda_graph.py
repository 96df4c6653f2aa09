"""One token at a time on a GPU: all kernels of a step in one CUDA graph, which is launched at once.

A step's kernels take a few microseconds each, and launching one from Python takes as long. `GraphDecoder` records the
step of a `KernelDecoder` once and replays it, or that of a `Decoder` where our kernels are not for the model. After
`Mamba2LM.compile_steps` it records that of a `CompiledDecoder`, which `torch.compile` turns into four kernels per layer
for one text, and seven for many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba2_min.inference import kernel_decoding
from mamba2_min.inference.decoding import Decoder, StepBuffers
from mamba2_min.models.mamba2 import Mamba2LM, State
from mamba2_min.ops.autograd import autocast_off, widen

# Up to this many rows, a product is a sum over each weight row, which a compiler fuses with what is around it.
_ROWS_OF_SUMS = 2


class GraphDecoder:
    """As a `Decoder`, for a model on a CUDA device."""

    def __init__(self, model: Mamba2LM, state: State, compiled: bool, state_dtype: torch.dtype | None = None):
        self._device = state.ssm[0].device
        with torch.inference_mode(), torch.cuda.device(self._device):
            self._steps = _steps(model, state, compiled, state_dtype)
            self._ids = torch.zeros(self._steps.batch, dtype=torch.long, device=self._device)
            before = [t.clone() for t in (*self._steps.conv, *self._steps.ssm)]
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2 * self._steps.turns):  # kernels are compiled and loaded outside of the recording
                    self._steps(self._ids)
            torch.cuda.current_stream().wait_stream(aside)
            self._recorded = []
            for _ in range(self._steps.turns):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=aside):
                    logits = self._steps(self._ids)
                self._recorded.append((graph, logits, self._steps.conv))
            for t, old in zip((*self._steps.conv, *self._steps.ssm), before, strict=True):
                t.copy_(old)
        self._turn = 0

    @property
    def conv(self) -> list[Tensor]:
        return self._steps.conv

    def fits(self, model: Mamba2LM, state: State) -> bool:
        return self._steps.fits(model, state)

    def __call__(self, ids: Tensor) -> Tensor:
        """ids (b,) -> logits (b, padded_vocab_size)"""
        self._ids.copy_(ids)
        graph, logits, self._steps.conv = self._recorded[self._turn]
        with torch.cuda.device(self._device):
            graph.replay()
        self._turn = (self._turn + 1) % len(self._recorded)
        return logits.clone()


def _steps(model: Mamba2LM, state: State, compiled: bool, state_dtype: torch.dtype | None) -> StepBuffers:
    if not compiled and kernel_decoding.takes(model):
        return kernel_decoding.KernelDecoder(model, state, state_dtype)
    narrow = state_dtype is not None and torch.finfo(state_dtype).bits < 32  # a `Decoder` keeps no such state
    return CompiledDecoder(model, state, state_dtype) if compiled or narrow else Decoder(model, state)


def is_recordable(model: Mamba2LM) -> bool:
    """Whether all projections are nn.Linear: the Python code of others may differ from call to call."""
    mixers = [block.mixer for block in model.backbone.blocks]
    projections = [linear for mixer in mixers for linear in (mixer.in_proj, mixer.out_proj)]
    return all(type(linear) is nn.Linear for linear in (*projections, model.lm_head))


class CompiledDecoder(StepBuffers):
    """Token after token by four compiled functions.

    Each ends where its result must be in memory: a compiler would compute the convolution again for every element of
    the state that it updates. The convolution's inputs move between two buffers by turns: to shift them in place, a
    compiler would copy them first. state_dtype: of the state in memory; the computation is in float32.
    """

    turns = 2

    def __init__(self, model: Mamba2LM, state: State, state_dtype: torch.dtype | None = None, compiled: bool = True):
        super().__init__(model, state, state_dtype)
        with torch.inference_mode(False):  # so that the state may still be trained from
            buffers = [self.conv, [torch.empty_like(t) for t in self.conv]]
        self._buffers = [(buffer, [t.unbind(1) for t in buffer]) for buffer in buffers]  # as a whole, and by tokens
        options: dict[str, Any] = {"coordinate_descent_tuning": True}  # tries a few sizes for each kernel

        def made(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, dynamic=False, options=options) if compiled else function

        self._project, self._convolve, self._update = made(_project), made(_convolve), made(_update)
        self._join = made(_join)

    def _logits(self, x: Tensor) -> Tensor:
        backbone, (_, before), (self.conv, after) = self.model.backbone, *self._buffers
        self._buffers.reverse()
        starts = [(block.norm, block.mixer.in_proj) for block in backbone.blocks]
        starts.append((backbone.norm_f, self.model.lm_head))
        norms = [(norm.weight, norm.eps, linear.weight, linear.bias) for norm, linear in starts]
        with autocast_off(x):
            projected = self._project(x, *norms[0])
            for block, old, new, ssm, following in zip(
                backbone.blocks, before, after, self.ssm, norms[1:], strict=True
            ):
                m, c, norm = block.mixer, block.mixer.config, block.mixer.norm
                z, xBC, dt = projected.split([c.d_inner, c.conv_dim, c.nheads], dim=-1)
                xBC = self._convolve([*old, xBC], new, m.conv1d.weight[:, 0], m.conv1d.bias)
                y = self._update(xBC, dt, ssm, m.dt_bias, m.A_log, m.D, c.ngroups)
                how = (norm.eps, norm.groups, norm.norm_before_gate)
                out = (norm.weight, m.out_proj.weight, m.out_proj.bias, how)
                x, projected = self._join(x, y, z, *out, *following)
        return projected


# One token per row. Letters as in ssd/plain.py.


def _project(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """weight norm(x) + bias: (b, d) -> (b, outputs)"""
    return _normed_linear(widen(x), norm, eps, 1, weight, bias)


def _convolve(window: list[Tensor], kept: list[Tensor], taps: Tensor, bias: Tensor | None) -> Tensor:
    """K inputs (b, c), the newest last -> (b, c); writes the last K - 1 to `kept`, for the next token."""
    for new, old in zip(kept, window[1:], strict=True):
        new.copy_(old)
    first, *later = [widen(old) * tap for old, tap in zip(window, widen(taps).unbind(1), strict=True)]
    y = sum(later, first)
    return F.silu(y if bias is None else y + bias).to(window[-1].dtype)


def _update(xBC: Tensor, dt: Tensor, ssm: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, g: int) -> Tensor:
    """H = exp(dt A) H + dt x B^T;  y = H C + D x: (b, c) -> (b, d_inner); writes ssm (b, h, p, n)."""
    b, h, p, n = ssm.shape
    x, B, C = widen(xBC).split([h * p, g * n, g * n], dim=-1)
    x, B, C = x.view(b, g, h // g, p), B.view(b, g, 1, 1, n), C.view(b, g, 1, 1, n)
    dt = F.softplus(widen(dt) + dt_bias).view(b, g, -1, 1)
    decay = (dt * -widen(A_log).exp().view(g, -1, 1)).exp()
    state = widen(ssm).view(b, g, -1, p, n) * decay[..., None] + (dt * x)[..., None] * B
    y = (state * C).sum(-1) + D.view(g, -1, 1) * x
    ssm.copy_(state.view(ssm.shape))
    return y.view(b, -1)


def _join(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    norm: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    how: tuple[float, int, bool],
    next_norm: Tensor,
    next_eps: float,
    next_weight: Tensor,
    next_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The end of one layer, x + weight RMSNorm(y * silu(z)) + bias, (b, d_model) with y and z (b, d_inner), and the
    start of the next, `_project` of that."""
    eps, groups, norm_before_gate = how
    gate = F.silu(widen(z))
    u, scale = (y, norm * gate) if norm_before_gate else (y * gate, norm)
    x = x + _normed_linear(u, scale, eps, groups, weight, bias)
    return x, _project(x, next_norm, next_eps, next_weight, next_bias)


def _normed_linear(u: Tensor, scale: Tensor, eps: float, g: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    """weight (u / rms(u) * scale) + bias, an rms for each of g parts of u: (b, d) -> (b, outputs), in weight's dtype.

    For few rows the division by the rms comes after the product, because each output can then sum u's squares beside
    its own products, in one kernel; a norm before the product would be a second one.
    """
    if len(u) > _ROWS_OF_SUMS:
        parts = u.unflatten(-1, (g, -1))
        normed = (parts * (parts.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2) * scale
        return F.linear(normed.to(weight.dtype), weight, bias)
    products = (u * scale)[:, None, :] * weight
    squares = u.square()[:, None, :].expand_as(products)
    sums, means = products.unflatten(-1, (g, -1)).sum(-1), squares.unflatten(-1, (g, -1)).mean(-1)
    y = (sums * (means + eps).rsqrt()).sum(-1)
    return (y if bias is None else y + bias).to(weight.dtype)
