"""One token at a time: the model's equations with as few operators as possible, in memory that is allocated once.

The matrix products of a token are small. An operator's overhead (1 to 5 microseconds on a CPU) and new memory for its
result would take longer than they do. A `Decoder` is therefore prepared for one state: it allocates all intermediate
tensors, and the views of them, in advance, and updates the state in place.

It keeps no value of a parameter from one token to the next, not even A: an optimizer may change them unnoticed
(PyTorch's fused ones do not count their writes). `fits` sees everything else that can happen to a model: a tensor or a
module that is replaced, a hook, a forward. It goes around the modules, so it takes a model only while all are plain.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba2_min.models.base import LanguageModel, RMSNorm
from mamba2_min.models.bypass import Watch, forwards, is_hooked, is_plain
from mamba2_min.models.mamba2 import Block, GatedRMSNorm, Mamba2Backbone, Mamba2LM, Mamba2Mixer, State
from mamba2_min.ops.autograd import widen, without_autocast

_KNOWN = forwards(
    Mamba2Backbone, Block, Mamba2Mixer, RMSNorm, GatedRMSNorm, nn.Linear, nn.Conv1d, nn.Embedding, nn.ModuleList,
    nn.ParameterList,
)  # fmt: skip


def takes(model: Mamba2LM) -> bool:
    """Whether a `Decoder` computes what the forward of `model` does, now."""
    return (
        not model.is_called()
        and type(model).hidden is LanguageModel.hidden
        and all(is_plain(m, _KNOWN) or _is_row_wise(m) for m in model.modules() if m is not model)
        and all(block.mixer.reads_conv1d() for block in model.backbone.blocks)
    )


def _is_row_wise(module: nn.Module) -> bool:
    """Whether a module may be called on (b, d) for one token: its class says so by `row_wise = True`."""
    return "row_wise" in vars(type(module)) and not module.training and not is_hooked(module)


class StepBuffers:
    """The tensors for steps of one model and one state. Where either has changed, they must be built again."""

    turns = 1  # steps after which the same memory is read and written again

    def __init__(self, model: Mamba2LM, state: State, state_dtype: torch.dtype | None = None):
        """state_dtype: of the state's `ssm` in memory; as wide as the model computes it if None."""
        self.model, self.batch = model, state.batch
        with torch.inference_mode(False), torch.no_grad():  # so that the state may still be trained from
            state.conv[:] = map(Tensor.contiguous, state.conv)  # a prompt may leave views
            state.ssm[:] = [(widen(t) if state_dtype is None else t.to(state_dtype)).contiguous() for t in state.ssm]
        self.conv, self.ssm = list(state.conv), list(state.ssm)
        self._watch = Watch(model)
        self._called = [module for module in model.modules() if _is_row_wise(module)]
        backbone, embedding = model.backbone, model.backbone.embedding
        if is_plain(embedding, _KNOWN) and embedding.max_norm is None:  # half the time of the module's call
            self._start = lambda ids: backbone.start_of_stream(torch.embedding(embedding.weight, ids))
        else:
            self._start = lambda ids: backbone.start_of_stream(embedding(ids))

    def fits(self, model: Mamba2LM, state: State) -> bool:
        """Whether this was built for this model and this state, and neither has changed."""
        return (
            all(a is b for a, b in zip(state.conv, self.conv, strict=True))
            and all(a is b for a, b in zip(state.ssm, self.ssm, strict=True))
            and self._watch.sees_no_change(model)
            and not any(module.training for module in self._called)
        )

    def __call__(self, ids: Tensor) -> Tensor:
        """Reads one token per row, ids (b,), and returns the next logits (b, padded_vocab_size). The new state is in
        `conv` and `ssm`."""
        return self._logits(self._start(ids))

    def _logits(self, x: Tensor) -> Tensor:
        """The residual stream's start, x (b, d_model), which it may change -> the logits."""
        raise NotImplementedError


class Decoder(StepBuffers):
    """Token after token by single operators, the state changed in place."""

    def __init__(self, model: Mamba2LM, state: State):
        super().__init__(model, state)
        self._layers = [
            _BlockStep(block, conv, ssm)
            for block, conv, ssm in zip(model.backbone.blocks, state.conv, state.ssm, strict=True)
        ]
        norm = model.backbone.norm_f
        self._norm_f = _RMSNormStep(norm.weight, norm.eps, self.batch)
        self._head = product(model.lm_head)
        self._weight_dtype = norm.weight.dtype

    @without_autocast
    def _logits(self, x: Tensor) -> Tensor:
        for layer in self._layers:
            layer(x)
        return self._head(self._norm_f(x.to(self._weight_dtype)))


class _BlockStep:
    """x + mixer(norm(x)) for one token. Letters as in ssd/plain.py."""

    def __init__(self, block: Block, conv_state: Tensor, ssm_state: Tensor):
        mixer = block.mixer
        c, b = mixer.config, len(ssm_state)
        dtype, wide = block.norm.weight.dtype, ssm_state.dtype
        new = ssm_state.new_empty

        self.dtype = dtype
        self.norm = _RMSNormStep(block.norm.weight, block.norm.eps, b)

        self.in_proj = product(mixer.in_proj)
        self.projected = new(b, c.d_in_proj, dtype=dtype)
        self.z, xBC, self.dt_in = self.projected.split([c.d_inner, c.conv_dim, c.nheads], dim=-1)

        self.conv_state = conv_state  # (b, K - 1, c)
        self.window = new(b, c.d_conv, c.conv_dim, dtype=dtype)
        self.window_parts, self.window_end = [conv_state, xBC[:, None]], self.window[:, 1:]
        self.weight, self.bias = mixer.conv1d.weight[:, 0].t(), mixer.conv1d.bias
        self.taps = new(c.d_conv, c.conv_dim, dtype=dtype)  # the weight in the window's order, which is faster
        self.xBC = new(b, c.conv_dim, dtype=dtype)
        self.wide_xBC = self.xBC if wide == dtype else new(b, c.conv_dim)
        x, B, C = self.wide_xBC.split([c.d_inner, c.ngroups * c.d_state, c.ngroups * c.d_state], dim=-1)
        self.x = x.unflatten(-1, (c.nheads, c.headdim))  # (b, h, p)
        self.B = B.unflatten(-1, (c.ngroups, 1, c.d_state))  # (b, g, 1, n)
        self.C = C.unflatten(-1, (c.ngroups, c.d_state, 1))  # (b, g, n, 1)

        self.A_log, self.dt_bias, self.D = mixer.A_log, mixer.dt_bias, mixer.D[:, None]
        self.A = new(c.nheads)
        self.zero = new(()).zero_()
        self.dt, self.decay = new(b, c.nheads), new(b, c.nheads)
        self.dt_of_channels, self.decay_of_states = self.dt[:, :, None], self.decay[:, :, None, None]
        self.dt_x = new(b, c.nheads, c.headdim)
        self.dt_x_column = self.dt_x.view(b, c.ngroups, c.d_inner // c.ngroups, 1)  # (b, g, r p, 1)
        self.state = ssm_state
        self.state_rows = ssm_state.view(b, c.ngroups, c.d_inner // c.ngroups, c.d_state)  # (b, g, r p, n)

        self.gated_norm = _GatedRMSNormStep(mixer.norm, b)
        self.out_proj = product(mixer.out_proj)
        self.shape = (b, c.nheads, c.headdim)

    def __call__(self, x: Tensor) -> None:
        self.in_proj(self.norm(x.to(self.dtype)), self.projected)
        # The convolution: a window of K tokens, K products, their sum.
        torch.cat(self.window_parts, 1, out=self.window)
        self.conv_state.copy_(self.window_end)
        torch.sum(self.window.mul_(self.taps.copy_(self.weight)), 1, out=self.xBC)
        F.silu(self.xBC if self.bias is None else self.xBC.add_(self.bias), inplace=True)
        if self.wide_xBC is not self.xBC:
            self.wide_xBC.copy_(self.xBC)
        # dt = softplus(dt + dt_bias); logaddexp with 0 is a softplus that has an `out` argument.
        torch.add(self.dt_in.to(self.dt.dtype), self.dt_bias, out=self.dt)
        torch.logaddexp(self.dt, self.zero, out=self.dt)
        # H = exp(dt A) H + dt x B^T;  y = H C + D x
        torch.exp(self.A.copy_(self.A_log), out=self.A)
        torch.mul(self.dt, self.A, out=self.decay).neg_().exp_()
        torch.mul(self.x, self.dt_of_channels, out=self.dt_x)
        self.state.mul_(self.decay_of_states)
        self.state_rows.addcmul_(self.dt_x_column, self.B)
        y = (self.state_rows @ self.C).view(self.shape).addcmul_(self.D, self.x)
        x.add_(self.out_proj(self.gated_norm(y.flatten(1).to(self.dtype), self.z)))


class _RMSNormStep:
    """x / rms(x) * weight, with the rms as |(x, sqrt(d eps))| / sqrt(d): one operator, where a mean square is three."""

    def __init__(self, weight: Tensor, eps: float, batch: int, groups: int = 1):
        d = len(weight) // groups
        self.weight = weight.view(groups, d) if groups > 1 else weight
        self.shape = (batch, *self.weight.shape)
        self.least, self.sqrt_d = weight.new_full((), math.sqrt(d * eps)), weight.new_full((), math.sqrt(d))
        self.rms = weight.new_empty(*self.shape[:-1], 1)

    def __call__(self, x: Tensor) -> Tensor:
        """(b, d) -> a new (b, d)"""
        parts = x.view(self.shape)
        torch.linalg.vector_norm(parts, dim=-1, keepdim=True, out=self.rms)
        torch.hypot(self.rms, self.least, out=self.rms).div_(self.sqrt_d)
        return (parts / self.rms).mul_(self.weight).view(x.shape)


class _GatedRMSNormStep:
    """RMSNorm(y * silu(z)), or RMSNorm(y) * silu(z) with norm_before_gate; changes y."""

    def __init__(self, norm: GatedRMSNorm, batch: int):
        self.norm = _RMSNormStep(norm.weight, norm.eps, batch, norm.groups)
        self.norm_before_gate = norm.norm_before_gate

    def __call__(self, y: Tensor, z: Tensor) -> Tensor:
        gate = F.silu(z)
        return self.norm(y).mul_(gate) if self.norm_before_gate else self.norm(y.mul_(gate))


@torch.no_grad()
def lay_out_columns(model: Mamba2LM) -> Mamba2LM:
    """Stores a CPU model's matrices column by column, in place, and returns it; names, shapes and values stay.

    A product with one vector then reads from several places of the matrix at once instead of one, which is faster. Only
    for a model that is not trained afterwards: an optimizer's moments would be stored row by row.
    """
    if model.backbone.norm_f.weight.device.type == "cpu":
        mixers = [block.mixer for block in model.backbone.blocks]
        projections = [linear for mixer in mixers for linear in (mixer.in_proj, mixer.out_proj)]
        for linear in (*projections, model.lm_head):  # a tied embedding is the head's weight
            if type(linear) is nn.Linear:
                linear.weight.data = linear.weight.data.t().contiguous().t()
    return model


def product(module: nn.Module) -> Callable[..., Tensor]:
    """`module` as a function (x, out=None)."""
    if not is_plain(module, _KNOWN):
        return lambda x, out=None: module(x) if out is None else out.copy_(module(x))
    assert isinstance(module, nn.Linear)
    weight, bias, transposed = module.weight, module.bias, module.weight.t()

    def product(x: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            return F.linear(x, weight, bias)
        return torch.mm(x, transposed, out=out) if bias is None else torch.addmm(bias, x, transposed, out=out)

    return product
