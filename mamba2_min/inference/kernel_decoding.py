"""One token at a time by our own kernels (step_kernels.py): three a layer, and one norm and one product at the end.

A CUDA graph records them (cuda_graph.py). It needs no compiler and no half minute of waiting. Where a model, a size or
a GPU is not for them, `Decoder` or `CompiledDecoder` computes the same.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba2_min.config import Mamba2Config
from mamba2_min.inference.decoding import Decoder, StepBuffers
from mamba2_min.models.mamba2 import Mamba2LM, Mamba2Mixer, State
from mamba2_min.ops.autograd import autocast_off
from mamba2_min.ops.gpu_kernels import has_triton, on, product_precision
from mamba2_min.ops.norm import rms_norm

_ROWS = 2  # up to so many rows are read by `project_rows`, each by its own programs
_LONGEST = 8192  # numbers of a row that it holds
_TILE = 8192  # numbers of a weight that one of its programs holds
_LARGEST_STATE = 512  # numbers of a channel's state that a program holds
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-2}  # of the self-check; float32 may be TF32


class KernelDecoder(StepBuffers):
    """As a `Decoder`. state_dtype: of the state in memory, float32 if None; the computation is in float32."""

    def __init__(self, model: Mamba2LM, state: State, state_dtype: torch.dtype | None = None):
        super().__init__(model, state, state_dtype)
        c, weight = model.config, model.lm_head.weight
        self._projected = torch.empty(self.batch, c.d_in_proj, dtype=weight.dtype, device=weight.device)
        self._gated = torch.empty(self.batch, c.d_inner, dtype=weight.dtype, device=weight.device)
        self._result = torch.empty(self.batch, c.padded_vocab_size, dtype=weight.dtype, device=weight.device)
        self._paired = _can_pair(weight.device)

    def _logits(self, x: Tensor) -> Tensor:
        backbone, head = self.model.backbone, self.model.lm_head
        with autocast_off(x), on(x):
            for block, window, ssm in zip(backbone.blocks, self.conv, self.ssm, strict=True):
                m = block.mixer
                self._project(x, block.norm, m.in_proj, self._projected, window=window, conv=m.conv1d)
                self._advance(m, ssm)
                self._project(self._gated, m.norm, m.out_proj, x, m.norm.groups, add=True)
            if self.batch > _ROWS:  # the head is large enough for the library's products
                x = rms_norm(x, backbone.norm_f.weight, backbone.norm_f.eps)
                return F.linear(x, head.weight, head.bias)
            self._project(x, backbone.norm_f, head, self._result)
        return self._result

    def _project(
        self, u: Tensor, norm: Any, linear: nn.Linear, out: Tensor, parts: int = 1, add: bool = False,
        window: Tensor | None = None, conv: nn.Conv1d | None = None,
    ) -> None:  # fmt: skip
        """out (b, outputs) = linear(norm(u)), with `add` added to it; with a window, its x, B and C convolved."""
        from mamba2_min.inference import step_kernels as kernels

        c, unused, weight = self.model.config, self._projected, linear.weight
        outputs, k = weight.shape
        taps, bias = (unused, None) if conv is None else (conv.weight, conv.bias)
        arguments = (
            u, norm.weight, weight, unused if linear.bias is None else linear.bias, out, k, outputs, norm.eps,
            unused if window is None else window, taps, unused if bias is None else bias, c.d_inner, c.conv_dim,
        )  # fmt: skip
        how: dict[str, Any] = {
            "BIAS": linear.bias is not None, "ADD": add, "PARTS": parts, "CONVOLVE": window is not None,
            "CONV_BIAS": bias is not None, "TAPS": c.d_conv, **self._pairing(),
        }  # fmt: skip
        if self.batch <= _ROWS:
            size = row_sizes(k)
            kernels.project_rows[(-(-outputs // size["BR"]), self.batch)](*arguments, **how, **size)
            return
        size = tile_sizes(self.batch, outputs)
        kernels.project_tiles[(-(-outputs // size["BR"]), -(-self.batch // size["BM"]))](
            *arguments, self.batch, **how, PRECISION=product_precision(weight.dtype), **size
        )

    def _advance(self, m: Mamba2Mixer, ssm: Tensor) -> None:
        from mamba2_min.inference import step_kernels as kernels

        c = m.config
        size = state_sizes(self.batch, c.headdim, c.d_state)
        kernels.advance[(self.batch * c.nheads, -(-c.headdim // size["BP"]))](
            self._projected, ssm, m.dt_bias, m.A_log, m.D, self._gated, c.nheads, c.nheads // c.ngroups, c.headdim,
            c.d_state, c.d_in_proj, **self._pairing(), **size,
        )  # fmt: skip

    def _pairing(self) -> dict[str, Any]:
        return {"PAIRED": True, "launch_pdl": True} if self._paired else {"PAIRED": False}


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


# Sizes of the tiles, for equal bits a function of shapes alone.


def row_sizes(k: int) -> dict[str, int]:
    """Of `project_rows`, for rows of k numbers."""
    width = _power(k)
    return {"BR": max(1, min(8, _TILE // width)), "BK": width, "num_warps": 4}


def tile_sizes(batch: int, outputs: int) -> dict[str, int]:
    """Of `project_tiles`: small enough that there are about as many programs as multiprocessors."""
    tokens = 16 if batch <= 16 else 32
    return {"BM": tokens, "BR": 32 if outputs >= 2048 else 16, "BK": 128, "num_warps": 4, "num_stages": 3}


def state_sizes(batch: int, p: int, n: int) -> dict[str, int]:
    """Of `advance`, for states (p, n)."""
    return {"BP": min(_power(p), 8 if batch <= _ROWS else 32), "BN": _power(n), "num_warps": 4}


def _can_pair(device: torch.device) -> bool:
    """Whether a kernel may begin before the one before it has ended: on NVIDIA's GPUs from Hopper on."""
    from mamba2_min.inference import step_kernels

    return (
        step_kernels.CAN_PAIR
        and device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def takes(model: Mamba2LM) -> bool:
    """Whether the kernels compute the step of this model, whose projections are nn.Linear, on the GPU where it is."""
    c, head = model.config, model.lm_head
    weights = {(p.dtype, p.device) for p in model.parameters()}
    dtype, device = head.weight.dtype, head.weight.device
    return (
        device.type == "cuda"
        and weights == {(dtype, device)}
        and all(p.is_contiguous() for p in model.parameters())
        and fits(c, dtype)
        and has_triton()
        and _works(device, dtype, c.headdim, c.d_state, c.d_conv)
    )


def fits(c: Mamba2Config, dtype: torch.dtype) -> bool:
    """Whether the kernels are for a model of these sizes and this dtype."""
    return (
        dtype in _TOLERANCE
        and not c.norm_before_gate
        and c.d_state <= _LARGEST_STATE
        and max(c.d_model, c.d_inner) <= _LONGEST
        and c.d_conv <= 8
    )


@functools.cache
def _works(device: torch.device, dtype: torch.dtype, p: int, n: int, taps: int) -> bool:
    """Whether the kernels run on this GPU and are right: once for each dtype and size of a state."""
    for batch in (1, 3):
        try:
            error = self_check(device, dtype, p, n, taps, batch)
        except Exception as fault:  # whatever a compiler or a driver raises: another decoder does the work
            reason = (str(fault).splitlines() or [type(fault).__name__])[0]
            warnings.warn(f"the decoding kernels do not run on {device}: {reason}", stacklevel=2)
            return False
        if not error <= _TOLERANCE[dtype]:
            warnings.warn(f"the decoding kernels are off by {error:.1e} on {device} and are not used", stacklevel=2)
            return False
    return True


@torch.inference_mode()
def self_check(device: torch.device, dtype: torch.dtype, p: int, n: int, taps: int, batch: int) -> float:
    """The relative error of the third token's logits and state of a small model, against a `Decoder` in float32."""
    sizes: dict[str, Any] = {
        "d_model": p,
        "n_layer": 1,
        "headdim": p,
        "d_state": n,
        "d_conv": taps,
        "expand": 2,
        "ngroups": 2,
    }
    model = Mamba2LM(Mamba2Config(vocab_size=40, **sizes), seed=0).to(device, dtype).eval()
    wide = Mamba2LM(model.config, seed=0).to(device)
    wide.load_state_dict(model.state_dict())
    steps = KernelDecoder(model, state := model.initial_state(batch)), Decoder(wide, other := wide.initial_state(batch))
    ids = torch.arange(batch, device=device)
    for _ in range(3):
        got, wanted = [decoder(ids).float() for decoder in steps]
    pairs = [(got, wanted), (state.ssm[0], other.ssm[0])]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)
