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

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba2_min.checkpoints import checkpoint
from mamba2_min.config import Mamba2Config
from mamba2_min.models import stream
from mamba2_min.models.base import Backbone, LanguageModel, RMSNorm, register_state
from mamba2_min.models.bypass import forwards, is_plain
from mamba2_min.models.called import conv_silu_by_module
from mamba2_min.models.core import core, takes
from mamba2_min.models.evaluating import evaluating
from mamba2_min.models.init import init_mamba2
from mamba2_min.models.inputs import check_step
from mamba2_min.ops.autograd import widen
from mamba2_min.ops.conv import causal_conv_silu
from mamba2_min.ops.dropout import embedding_dropout, variational_dropout
from mamba2_min.ops.norm import gated_rms_norm
from mamba2_min.ssd import ssd_chunked, ssd_step
from mamba2_min.ssd.stretches import inputs_before, is_spread, scan_stretch

_CONV1D = forwards(nn.Conv1d)


@register_state
@dataclass(eq=False)
class State:
    """What a model remembers of the tokens so far: of constant size, however many there were.

    conv: a tensor (b, d_conv - 1, conv_dim) per layer, the convolution's last inputs; ssm: one (b, h, p, n) per layer.
    """

    conv: list[Tensor]
    ssm: list[Tensor]

    @property
    def batch(self) -> int:
        return len(self.ssm[0])

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.conv, *self.ssm))

    def clone(self) -> State:
        return State([t.clone() for t in self.conv], [t.clone() for t in self.ssm])

    def detach(self) -> State:
        """The same numbers without their history: what is carried from window to window."""
        return State([t.detach() for t in self.conv], [t.detach() for t in self.ssm])


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
        zxBCdt = self.in_proj(u)
        if takes(self, zxBCdt, conv_state, ssm_state):
            y, conv_state, ssm_state = core(self, zxBCdt, conv_state, ssm_state, seq_idx)
            return self.out_proj(y), conv_state, ssm_state
        z, xBC, dt = zxBCdt.split([c.d_inner, c.conv_dim, c.nheads], dim=-1)
        xBC, conv_state = self._convolve(xBC, conv_state, seq_idx)
        x, B, C = self._split_heads(xBC)
        # The two quantities whose rounding the recurrence multiplies up: float32 or wider, whatever autocast does.
        dt = F.softplus(widen(dt) + widen(self.dt_bias))
        A = -widen(self.A_log).exp()
        if u.shape[1] == 1 and ssm_state is not None and not is_spread():
            y, ssm_state = ssd_step(ssm_state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], self.D)
            y = y[:, None]
        elif is_spread():
            y, ssm_state = scan_stretch(ssd_chunked, x, dt, A, B, C, self.D, ssm_state, seq_idx, c.chunk_size)
        else:
            y, ssm_state = ssd_chunked(x, dt, A, B, C, self.D, ssm_state, seq_idx, chunk_size=c.chunk_size)
        return self.out_proj(self.norm(y.flatten(-2), z)), conv_state, ssm_state

    def _convolve(self, xBC: Tensor, state: Tensor | None, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
        """silu(conv1d(xBC)), by our own convolution of the module's parameters, or by the module if it is not plain."""
        if is_spread():
            before, last = inputs_before(xBC, self.config.d_conv - 1, state, seq_idx)
            return self._convolve_here(xBC, before, seq_idx)[0], last
        return self._convolve_here(xBC, state, seq_idx)

    def _convolve_here(self, xBC: Tensor, state: Tensor | None, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.reads_conv1d():
            return causal_conv_silu(xBC, self.conv1d.weight[:, 0], self.conv1d.bias, state, seq_idx)
        return conv_silu_by_module(self.conv1d, xBC, self.config.d_conv, state, seq_idx)

    def reads_conv1d(self) -> bool:
        """Whether conv1d is the plain depthwise convolution of which reading the parameters is enough."""
        c, conv = self.config, self.conv1d
        return (
            is_plain(conv, _CONV1D)
            and conv.weight.shape == (c.conv_dim, 1, c.d_conv)
            and (conv.stride, conv.padding, conv.dilation, conv.padding_mode) == ((1,), (0,), (1,), "zeros")
        )

    def has_plain_norm(self) -> bool:
        return is_plain(self.norm, _PLAIN)

    def _split_heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views: x (..., h, p), B and C (..., g, n)."""
        c = self.config
        x, B, C = xBC.split([c.d_inner, c.ngroups * c.d_state, c.ngroups * c.d_state], dim=-1)
        return x.unflatten(-1, (-1, c.headdim)), B.unflatten(-1, (c.ngroups, -1)), C.unflatten(-1, (c.ngroups, -1))


class Block(nn.Module):
    """x + mixer(norm(x)), with dropout on what is added."""

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mamba2Mixer(config)
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, conv_state: Tensor | None, ssm_state: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, conv_state, ssm_state = self.mixer(self.norm(x), conv_state, ssm_state, seq_idx)
        return x + F.dropout(out, self.dropout, self.training), conv_state, ssm_state


_PLAIN = forwards(Block, RMSNorm, GatedRMSNorm)


class Mamba2Backbone(Backbone):
    """Everything before the head: (b, l) -> (b, l, d_model) after the last norm, and the state."""

    def __init__(self, config: Mamba2Config):
        super().__init__(config, Block)

    def forward(
        self,
        input_ids: Tensor | None,
        state: State | None = None,
        seq_idx: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        x = self.start_of_stream(self._dropped_out(self._embedded(input_ids, inputs_embeds)))
        ssm = [None] * len(self.layers) if state is None else map(widen, state.ssm)
        befores = zip([None] * len(self.layers) if state is None else state.conv, ssm, strict=True)
        if stream.takes(self, x, _PLAIN):
            x, *states = stream.through(self, x, befores, seq_idx)
            return self._dropped_out(x), State(*states)
        new = State([], [])
        for block, before in zip(self.layers, befores, strict=True):
            x, conv, ssm = self.run_block(block, x, *before, seq_idx)
            new.conv.append(conv)
            new.ssm.append(ssm)
        return self._dropped_out(self.norm_f(x)), new

    def _embedded(self, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        if ids is None or embeds is not None:
            assert embeds is not None
            return embeds
        x, p = self.embedding(ids), self.config.embedding_dropout
        return embedding_dropout(x, ids, self.config.padded_vocab_size, p) if self.training and p else x

    def _dropped_out(self, x: Tensor) -> Tensor:
        p = self.config.variational_dropout
        return variational_dropout(x, p) if self.training and p else x

    @property
    def blocks(self) -> list[Block]:
        """The layers, as what they were built of."""
        return cast(list[Block], list(self.layers))

    def start_of_stream(self, x: Tensor) -> Tensor:
        """The residual stream takes the dtype of its start, and all that is added to it takes that of the stream."""
        return widen(x) if self.config.residual_in_fp32 else x


class Mamba2LM(LanguageModel):
    """The language model. `config` fixes its shape; `seed` draws its parameters, or torch's own generator if None."""

    backbone: Mamba2Backbone

    def __init__(self, config: Mamba2Config, seed: int | None = None):
        super().__init__()
        self._build(config, Mamba2Backbone, init_mamba2, seed)

    def initial_state(self, batch: int = 1) -> State:
        """The state before any token: zeros, as if nothing had ever been read."""
        c, dtype, device = self.config, self.backbone.norm_f.weight.dtype, self.ids_device
        wide = torch.promote_types(dtype, torch.float32)
        conv, ssm = (batch, c.d_conv - 1, c.conv_dim), (batch, c.nheads, c.headdim, c.d_state)
        return State(
            [torch.zeros(conv, dtype=dtype, device=device) for _ in range(c.n_layer)],
            [torch.zeros(ssm, dtype=wide, device=device) for _ in range(c.n_layer)],
        )

    @torch.inference_mode()
    def step(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """One token per row, ids (b,): logits (b, vocab_size) and the state, which is changed in place and returned.

        The registered stepper computes it, where there is one and it takes this model; otherwise it is the forward with
        l = 1, in evaluation mode. Raises ValueError for ids outside the vocabulary or not as many as the state's rows.
        """
        ids = check_step(ids, state.batch, self.config.vocab_size)
        if _stepper is not None and (logits := _stepper(self, ids, state)) is not None:
            return logits[:, : self.config.vocab_size], state
        with torch.inference_mode(False), torch.no_grad(), evaluating(self):  # the state may still be trained from
            logits, new = self(ids.clone()[:, None], state)
        state.conv[:], state.ssm[:] = new.conv, new.ssm
        return logits[:, 0], state

    compiled_steps: tuple[bool, torch.dtype | None] = (False, None)  # what `compile_steps` was asked for

    def compile_steps(self, on: bool = True, state_dtype: torch.dtype | None = None) -> None:
        """How `step` runs on a GPU, for every text begun from now on. Unasked, it runs by our own kernels.

        on: by compiled functions instead, half a minute once; where there is no Triton they are twice as fast.
        state_dtype: the dtype in which a step keeps State.ssm in memory, float32 if None. Reading and writing the state
        is half the time of a step of 64 texts, so bfloat16 is faster; a trained small model then has 1.0001 times the
        perplexity.
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
