"""Mamba-2 as a language model: token ids in, logits and a state of constant size out.

    ids ─► embedding ─►(+)──────────────►(+)─► ... ─► norm_f ─► lm_head ─► logits
                        └► norm ─► mixer ─┘
                        (one block, n_layer times; the residual stream is float32)

The mixer (arXiv:2405.21060, figure 6, the parallel block), for l tokens of width d_model:

    in_proj ─► z | x B C | dt
               │   └────────── causal convolution, SiLU ─► x, B, C ─┐
               │                   softplus(dt + dt_bias) ─► dt ────┤ A = -exp(A_log)
               │                                             y = SSD(x, dt, A, B, C) + D x
               └──────────────► RMSNorm(y * silu(z)) ─► out_proj

Parameters have the names and shapes of the official checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba2_min.checkpoints import checkpoint
from mamba2_min.config import Mamba2Config
from mamba2_min.models.base import LanguageModel
from mamba2_min.ops.autograd import widen
from mamba2_min.ops.conv import causal_conv_silu
from mamba2_min.ops.norm import gated_rms_norm, rms_norm
from mamba2_min.ssd import ssd_chunked, ssd_step
from mamba2_min.ssd.hippo import a_log_init, dt_bias_init


@dataclass(eq=False)
class State:
    """What a model remembers of the tokens so far: of constant size, however many there were.

    conv: a tensor (b, d_conv - 1, conv_dim) per layer, the convolution's last inputs; ssm: one (b, h, p, n) per layer.
    """

    conv: list[Tensor]
    ssm: list[Tensor]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.conv, *self.ssm))

    def clone(self) -> State:
        return State([t.clone() for t in self.conv], [t.clone() for t in self.ssm])

    def detach(self) -> State:
        """The same numbers without their history: what is carried from window to window."""
        return State([t.detach() for t in self.conv], [t.detach() for t in self.ssm])


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """RMSNorm(y * silu(z)), or RMSNorm(y) * silu(z) with norm_before_gate; over each of `groups` parts separately."""

    def __init__(self, width: int, eps: float, norm_before_gate: bool, groups: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.norm_before_gate, self.groups = eps, norm_before_gate, groups

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(y, z, self.weight, self.eps, self.norm_before_gate, self.groups)


class Mamba2Mixer(nn.Module):
    """The Mamba-2 layer: (b, l, d_model) -> (b, l, d_model)."""

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.config = c = config
        self.in_proj = nn.Linear(c.d_model, c.d_in_proj, bias=c.proj_bias)
        # Holds the convolution's parameters under their official names; conv.py does the work.
        self.conv1d = nn.Conv1d(c.conv_dim, c.conv_dim, c.d_conv, groups=c.conv_dim, bias=c.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(c.nheads))
        self.A_log = nn.Parameter(torch.empty(c.nheads))
        self.D = nn.Parameter(torch.empty(c.nheads))
        norm_groups = c.ngroups if c.norm_per_group else 1
        self.norm = GatedRMSNorm(c.d_inner, c.norm_eps, c.norm_before_gate, norm_groups)
        self.out_proj = nn.Linear(c.d_inner, c.d_model, bias=c.proj_bias)

    def forward(
        self, u: Tensor, conv_state: Tensor | None, ssm_state: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        z, xBC, dt = self.in_proj(u).split([c.d_inner, c.conv_dim, c.nheads], dim=-1)
        xBC, conv_state = causal_conv_silu(xBC, self.conv1d.weight[:, 0], self.conv1d.bias, conv_state, seq_idx)
        x, B, C = self._split_heads(xBC)
        dt, A = self._dt(dt), self._A()
        if u.shape[1] == 1 and ssm_state is not None:
            y, ssm_state = ssd_step(ssm_state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], self.D)
            y = y[:, None]
        else:
            y, ssm_state = ssd_chunked(x, dt, A, B, C, self.D, ssm_state, seq_idx, chunk_size=c.chunk_size)
        return self.out_proj(self.norm(y.flatten(-2), z)), conv_state, ssm_state

    def _split_heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views: x (..., h, p), B and C (..., g, n)."""
        c = self.config
        x, B, C = xBC.split([c.d_inner, c.ngroups * c.d_state, c.ngroups * c.d_state], dim=-1)
        return x.unflatten(-1, (-1, c.headdim)), B.unflatten(-1, (c.ngroups, -1)), C.unflatten(-1, (c.ngroups, -1))

    # The two quantities whose rounding the recurrence multiplies up: float32 or wider, whatever autocast does.
    def _dt(self, dt: Tensor) -> Tensor:
        return F.softplus(widen(dt) + widen(self.dt_bias))

    def _A(self) -> Tensor:
        return -widen(self.A_log).exp()


class Block(nn.Module):
    """x + mixer(norm(x)), with dropout on what is added."""

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mamba2Mixer(config)
        self.dropout = config.dropout

    def forward(self, x, conv_state, ssm_state, seq_idx):
        out, conv_state, ssm_state = self.mixer(self.norm(x), conv_state, ssm_state, seq_idx)
        return x + F.dropout(out, self.dropout, self.training), conv_state, ssm_state


class Backbone(nn.Module):
    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)


class Mamba2LM(LanguageModel):
    """The language model. `config` fixes its shape; `seed` draws its parameters, or torch's own generator if None."""

    def __init__(self, config: Mamba2Config, seed: int | None = None):
        super().__init__()
        self._build(config, Backbone, init_parameters, seed)

    def hidden(
        self, input_ids: Tensor, state: State | None = None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """What the head reads: (b, l, d_model) after the last norm, and the state. Arguments as for `forward`."""
        self._check_ids(input_ids)
        if seq_idx is not None and seq_idx.shape != input_ids.shape:
            raise ValueError(f"seq_idx must be {tuple(input_ids.shape)}, as input_ids is, not {tuple(seq_idx.shape)}")
        if state is not None and len(state.ssm[0]) != len(input_ids):
            raise ValueError(f"the state is of {len(state.ssm[0])} rows, and input_ids of {len(input_ids)}")
        x = self._embed(input_ids)
        new = State([], [])
        for i, layer in enumerate(self.backbone.layers):
            conv, ssm = (None, None) if state is None else (state.conv[i], widen(state.ssm[i]))
            x, conv, ssm = self._run_block(layer, x, conv, ssm, seq_idx)
            new.conv.append(conv)
            new.ssm.append(ssm)
        return self.backbone.norm_f(x), new

    def _embed(self, ids: Tensor) -> Tensor:
        """The start of the residual stream, whose dtype all that is added to it takes."""
        x = self.backbone.embedding(ids)
        return widen(x) if self.config.residual_in_fp32 else x

    def initial_state(self, batch: int = 1) -> State:
        """The state before any token: zeros, as if nothing had ever been read."""
        c, p = self.config, self.backbone.norm_f.weight
        wide = torch.promote_types(p.dtype, torch.float32)
        return State(
            [p.new_zeros(batch, c.d_conv - 1, c.conv_dim) for _ in range(c.n_layer)],
            [p.new_zeros(batch, c.nheads, c.headdim, c.d_state, dtype=wide) for _ in range(c.n_layer)],
        )

    @torch.inference_mode()
    def step(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """One token per row, ids (b,): logits (b, vocab_size) and the state, which is changed in place and returned.

        Computed by the stepper that `mamba2_min.inference` has registered, where it takes this model; otherwise by the
        ordinary forward with l = 1.
        """
        if _stepper is not None and (logits := _stepper(self, ids, state)) is not None:
            return logits[:, : self.config.vocab_size], state
        if len(ids) != len(state.ssm[0]):
            raise ValueError(f"the state is of {len(state.ssm[0])} rows, and ids of {len(ids)}")
        logits, new = self(ids[:, None], state)
        state.conv[:], state.ssm[:] = new.conv, new.ssm
        return logits[:, 0], state

    compiled_steps: tuple[bool, torch.dtype | None] = (False, None)  # what `compile_steps` was asked for

    def compile_steps(self, on: bool = True, state_dtype: torch.dtype | None = None) -> None:
        """Compiles `step` on a GPU, for every text begun from now on: half a minute once, then over twice the speed.

        state_dtype: the dtype in which such a step keeps State.ssm in memory, float32 if None. Reading and writing the
        state is half the time of a step of 64 texts, so bfloat16 is faster; a trained small model then has 1.0001 times
        the perplexity.
        """
        self.compiled_steps = (on, state_dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Mamba2LM:
        """The float32 model in a folder: what `save_pretrained` or `train.py` left there, or a published Mamba-2.

        The layout is told from the files: our own, the official one (state-spaces) or Hugging Face's. Raises UserError,
        of one line, where anything is missing, damaged, or asks for what this model does not have.
        """
        config, weights = checkpoint.load_model(folder)
        model = cls(config)
        checkpoint.load_weights(model, weights, folder)
        return model.eval()

    def save_pretrained(self, folder: str | Path, format: str = "own") -> None:
        """Writes the config and the weights: format "own", "official" (mamba_ssm) or "hf" (transformers, extra `hf`).

        Raises UserError where that layout has no words for this model, or the folder cannot be written.
        """
        checkpoint.save_model(folder, self.config, self.state_dict(), format)


# A faster `Mamba2LM.step`: (model, ids (b,), state) -> logits (b, padded_vocab_size), with the state changed in place;
# or None where it does not take the model.
Stepper = Callable[[Mamba2LM, Tensor, State], Tensor | None]
_stepper: Stepper | None = None


def register_stepper(stepper: Stepper | None) -> None:
    """Has every `Mamba2LM.step` ask `stepper` first; None takes it away again."""
    global _stepper
    _stepper = stepper


@torch.no_grad()
def init_parameters(model: Mamba2LM, generator: torch.Generator) -> None:
    """Draws every parameter of a new model.

    parameter          drawn from                       why
    embedding, head    N(0, 0.02)                       logits start small, so the loss starts at log(vocab_size)
    in_proj            U(+-1/sqrt(d_model))             outputs of variance 1/3 from inputs of variance 1
    out_proj           U(+-1/sqrt(d_inner))/sqrt(n_layer)  the residual stream keeps its scale, however deep (GPT-2)
    conv1d             U(+-1/sqrt(d_conv))              the same, over its taps
    A_log              S4D-Real or log U(1, 16)         hippo.py: one time scale a head
    dt_bias            softplus^-1 of log-uniform dt    a head's step, and so its memory, from 10 to 1000 tokens
    D, norms           1                                the skip and the scales start neutral
    biases             0 (in_proj, out_proj)            nothing to learn from yet
    """
    c = model.config

    def uniform_(parameter: Tensor, bound: float) -> None:
        parameter.uniform_(-bound, bound, generator=generator)

    model.backbone.embedding.weight.normal_(0, 0.02, generator=generator)
    if not c.tie_embeddings:
        model.lm_head.weight.normal_(0, 0.02, generator=generator)
    for layer in model.backbone.layers:
        mixer = layer.mixer
        uniform_(mixer.in_proj.weight, 1 / math.sqrt(c.d_model))
        uniform_(mixer.out_proj.weight, 1 / math.sqrt(c.d_inner * c.n_layer))
        for projection in (mixer.in_proj, mixer.out_proj):
            if projection.bias is not None:
                projection.bias.zero_()
        uniform_(mixer.conv1d.weight, 1 / math.sqrt(c.d_conv))
        if c.conv_bias:
            uniform_(mixer.conv1d.bias, 1 / math.sqrt(c.d_conv))
        mixer.A_log.copy_(a_log_init(c.nheads, c.a_init, generator))
        mixer.dt_bias.copy_(dt_bias_init(c.nheads, c.dt_min, c.dt_max, c.dt_init_floor, generator))
        for ones in (mixer.D, mixer.norm.weight, layer.norm.weight):
            ones.fill_(1)
    model.backbone.norm_f.weight.fill_(1)
