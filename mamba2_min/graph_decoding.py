"""One token at a time on a GPU: all kernels of a step in one CUDA graph, which is launched as one.

A step's kernels take a few microseconds each, and launching one from Python takes as long. `GraphDecoder` records the
step of a `Decoder` once and replays it; on demand (`Mamba2LM.compile_steps`) that of a `CompiledDecoder`, of which
`torch.compile` makes about six kernels a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba2_min.autograd import autocast_off
from mamba2_min.decoding import Decoder, Prepared, is_plain

if TYPE_CHECKING:
    from mamba2_min.model import Mamba2LM, State

_FEW_ROWS = 2  # up to so many, a product is a sum over each weight row, which a compiler joins with what is around it


class GraphDecoder:
    """As a `Decoder`, for a model on a CUDA device."""

    def __init__(self, model: Mamba2LM, state: State, compiled: bool):
        self._device = state.ssm[0].device
        with torch.inference_mode(), torch.cuda.device(self._device):
            self._steps = (CompiledDecoder if compiled else Decoder)(model, state)
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
        if len(ids) != len(self._ids):
            raise ValueError(f"the state is of {len(self._ids)} rows, and ids of {len(ids)}")
        self._ids.copy_(ids)
        graph, logits, self._steps.conv = self._recorded[self._turn]
        with torch.cuda.device(self._device):
            graph.replay()
        self._turn = (self._turn + 1) % len(self._recorded)
        return logits.clone()


def is_recordable(model: Mamba2LM) -> bool:
    """Whether all projections are plain: the Python of what wraps one or hooks into it is not in a recording."""
    mixers = [block.mixer for block in model.backbone.layers]
    return all(map(is_plain, [model.lm_head, *(p for mixer in mixers for p in (mixer.in_proj, mixer.out_proj))]))


class CompiledDecoder(Prepared):
    """Token after token by one compiled function a block and one for the head.

    The convolution's inputs move from one buffer to another and back, by turns: moved in place, a compiler would copy
    them first.
    """

    turns = 2

    def __init__(self, model: Mamba2LM, state: State, compiled: bool = True):
        super().__init__(model, state)
        self._buffers = [self.conv, [torch.empty_like(t) for t in self.conv]]
        options = {"coordinate_descent_tuning": True}  # tries a few sizes for each kernel

        def made(function):
            return torch.compile(function, dynamic=False, options=options) if compiled else function

        self._block, self._head = made(_block), made(_head)

    def _logits(self, x: Tensor) -> Tensor:
        model, after = self.model, self._buffers[1 if self.conv is self._buffers[0] else 0]
        with autocast_off(x):
            for block, conv, new, ssm in zip(model.backbone.layers, self.conv, after, self.ssm, strict=True):
                x = self._block(x, conv, new, ssm, _weights(block), _shape(block))
            self.conv = after
            return self._head(x, model.backbone.norm_f.weight, model.backbone.norm_f.eps, model.lm_head.weight)


def _weights(block) -> tuple[Tensor | None, ...]:
    m = block.mixer
    return (
        block.norm.weight, m.in_proj.weight, m.in_proj.bias, m.conv1d.weight[:, 0], m.conv1d.bias, m.dt_bias, m.A_log,
        m.D, m.norm.weight, m.out_proj.weight, m.out_proj.bias,
    )  # fmt: skip


def _shape(block) -> tuple:
    """The plain numbers of a block."""
    c, norm = block.mixer.config, block.mixer.norm
    return block.norm.eps, c.nheads, c.ngroups, c.d_state, norm.eps, norm.groups, norm.norm_before_gate


def _block(x, conv, new_conv, ssm, weights, shape):
    """x + mixer(norm(x)) for one token, x (b, d_model); writes new_conv and ssm. Letters as in ssd.py."""
    norm, w_in, b_in, taps, taps_bias, dt_bias, A_log, D, gated_norm, w_out, b_out = weights
    eps, h, g, n, gated_eps, norm_groups, norm_before_gate = shape
    b, d_inner = len(x), gated_norm.shape[0]
    wide = ssm.dtype
    projected = _linear(_rms_norm(x.to(wide), norm, eps).to(w_in.dtype), w_in, b_in)
    z, xBC, dt = projected.split([d_inner, d_inner + 2 * g * n, h], dim=-1)

    window = torch.cat([conv, xBC[:, None]], dim=1)  # (b, K, c)
    new_conv.copy_(window[:, 1:])
    xBC = (window.to(wide) * taps.t()).sum(1)
    xBC = F.silu(xBC if taps_bias is None else xBC + taps_bias).to(w_in.dtype).to(wide)
    xs, B, C = xBC.split([d_inner, g * n, g * n], dim=-1)
    xs, B, C = xs.view(b, g, h // g, -1), B.view(b, g, 1, 1, n), C.view(b, g, 1, 1, n)

    dt = F.softplus(dt.to(wide) + dt_bias).view(b, g, -1, 1)
    decay = (dt * -A_log.to(wide).exp().view(g, -1, 1)).exp()
    state = ssm.view(b, g, h // g, -1, n) * decay[..., None] + (dt * xs)[..., None] * B
    y = (state * C).sum(-1) + D.view(g, -1, 1) * xs
    ssm.copy_(state.view(ssm.shape))

    y, gate = y.reshape(b, d_inner), F.silu(z.to(wide))
    if norm_before_gate:
        y = _rms_norm(y, gated_norm, gated_eps, norm_groups) * gate
    else:
        y = _rms_norm(y * gate, gated_norm, gated_eps, norm_groups)
    return x + _linear(y.to(w_out.dtype), w_out, b_out)


def _head(x, norm, eps, weight):
    wide = torch.promote_types(norm.dtype, torch.float32)
    return _linear(_rms_norm(x.to(wide), norm, eps).to(weight.dtype), weight, None)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    parts = x.unflatten(-1, (groups, -1))
    return (parts * (parts.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2) * weight


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if len(x) > _FEW_ROWS:
        return F.linear(x, weight, bias)
    wide = torch.promote_types(weight.dtype, torch.float32)
    y = (x.to(wide)[:, None, :] * weight).sum(-1)
    return (y if bias is None else y + bias).to(x.dtype)
