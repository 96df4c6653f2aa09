"""One token at a time by our own kernels (step_kernels.py), and for more than four texts the head by PyTorch.

A CUDA graph records them (cuda_graph.py). It needs no compiler and no half minute of waiting. Where a model, a size or
a GPU is not for them, `Decoder` or `CompiledDecoder` computes the same.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from mamba2_min.config import Mamba2Config
from mamba2_min.inference.decoding import Decoder, StepBuffers, product
from mamba2_min.models.base import RMSNorm
from mamba2_min.models.mamba2 import Mamba2LM, Mamba2Mixer, State
from mamba2_min.ops.autograd import autocast_off
from mamba2_min.ops.gpu_kernels import has_triton, is_right, on, product_precision, shared_memory

_ROWS = 4  # up to so many rows, a product reads its matrix for each: `project_rows`
_LONGEST = 8192  # numbers of a row that it holds
_TILE = 8192  # numbers of a weight that one of its programs holds
_LARGEST_STATE = 512  # numbers of a channel's state that a program holds
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-2}  # of the self-check; float32 may be TF32


class KernelDecoder(StepBuffers):
    """As a `Decoder`. state_dtype: of the state in memory, float32 if None; the computation is in float32."""

    def __init__(self, model: Mamba2LM, state: State, state_dtype: torch.dtype | None = None):
        super().__init__(model, state, state_dtype)
        c, b, like = model.config, self.batch, model.lm_head.weight
        new = functools.partial(torch.empty, dtype=like.dtype, device=like.device)
        self._projected, self._gated, self._result = new(b, c.d_in_proj), new(b, c.d_inner), new(b, c.padded_vocab_size)
        self._normed = new(b, c.d_model)
        self._added = new(sections(c.d_model, c.d_inner), b, c.d_model, dtype=torch.float32)
        self._state_size = state_sizes(b, c.headdim, c.d_state)
        self._squares = new(b, c.nheads * -(-c.headdim // self._state_size["BP"]), dtype=torch.float32)
        self._pairing = {"PAIRED": True, "launch_pdl": True} if _can_pair(like.device) else {"PAIRED": False}

    def _logits(self, x: Tensor) -> Tensor:
        with autocast_off(x), on(x):
            if self.batch <= _ROWS:
                self._by_rows(x)
            else:
                self._by_tiles(x)
        return self._result

    def _by_rows(self, x: Tensor) -> None:
        backbone = self.model.backbone
        for block, window, ssm in zip(backbone.blocks, self.conv, self.ssm, strict=True):
            m = block.mixer
            self._project_rows(x, block.norm, m.in_proj, self._projected, window=window, conv=m.conv1d)
            self._advance(m, ssm)
            self._project_rows(self._gated, m.norm, m.out_proj, x, m.norm.groups, add=True)
        self._project_rows(x, backbone.norm_f, self.model.lm_head, self._result)

    def _by_tiles(self, x: Tensor) -> None:
        from mamba2_min.ops import norm_kernels

        backbone = self.model.backbone
        norms = [*(block.norm for block in backbone.blocks), backbone.norm_f]
        self._join(x, norms[0])
        for block, norm, window, ssm in zip(backbone.blocks, norms[1:], self.conv, self.ssm, strict=True):
            m, gated = block.mixer, self._gated
            self._project_tiles(self._normed, m.in_proj, self._projected[None], m.in_proj.bias, window, m.conv1d)
            self._advance(m, ssm)
            if m.norm.groups > 1:  # after the product, it is too late to divide by an rms for each group
                gated, _ = norm_kernels.forward(gated, None, m.norm.weight, m.norm.eps, m.norm.groups, False)
            self._project_tiles(gated, m.out_proj, self._added)
            self._join(x, norm, m)
        product(self.model.lm_head)(self._normed, self._result)  # large enough for PyTorch's product

    def _project_rows(
        self, u: Tensor, norm: Any, linear: nn.Linear, out: Tensor, parts: int = 1, add: bool = False,
        window: Tensor | None = None, conv: nn.Conv1d | None = None,
    ) -> None:  # fmt: skip
        """out (b, outputs) = linear(norm(u)), with `add` added to it; with a window, its x, B and C convolved."""
        from mamba2_min.inference import step_kernels as kernels

        outputs, k = linear.weight.shape
        size = row_sizes(k)
        places, flags = self._convolution(window, conv)
        kernels.project_rows[(-(-outputs // size["BR"]), self.batch)](
            u, norm.weight, linear.weight, linear.weight if linear.bias is None else linear.bias, out, k, outputs,
            norm.eps, *places, BIAS=linear.bias is not None, ADD=add, PARTS=parts, **flags, **self._pairing, **size,
        )  # fmt: skip

    def _project_tiles(
        self, u: Tensor, linear: nn.Linear, out: Tensor, bias: Tensor | None = None, window: Tensor | None = None,
        conv: nn.Conv1d | None = None,
    ) -> None:  # fmt: skip
        """out (sections, b, outputs): u weight^T + bias, as a sum of sections; with a window, its x, B and C convolved
        as well."""
        from mamba2_min.inference import step_kernels as kernels

        weight, (outputs, k), sections = linear.weight, linear.weight.shape, len(out)
        size = tile_sizes(self.batch, outputs, weight.element_size(), shared_memory(weight.device))
        width = -(-k // (sections * size["BK"])) * size["BK"]
        places, flags = self._convolution(window, conv)
        kernels.project_tiles[(-(-outputs // size["BR"]), -(-self.batch // size["BM"]), sections)](
            u, weight, weight if bias is None else bias, out, self.batch, k, width, outputs, *places,
            BIAS=bias is not None, PRECISION=product_precision(weight.dtype), **flags, **self._pairing, **size,
        )  # fmt: skip

    def _convolution(self, window: Tensor | None, conv: nn.Conv1d | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a projection needs to convolve some of its outputs, or not."""
        c, unused = self.model.config, self._gated
        taps, bias = (unused, None) if conv is None else (conv.weight, conv.bias)
        places = unused if window is None else window, taps, unused if bias is None else bias, c.d_inner, c.conv_dim
        return places, {"CONVOLVE": window is not None, "CONV_BIAS": bias is not None, "TAPS": c.d_conv}

    def _join(self, x: Tensor, norm: RMSNorm, m: Mamba2Mixer | None = None) -> None:
        """The norm of x, to which what the mixer m computed is added first."""
        from mamba2_min.inference import step_kernels as kernels

        c, (b, d), parts = self.model.config, x.shape, self._squares.shape[1]
        bias, inner_eps = (None, 0.0) if m is None else (m.out_proj.bias, m.norm.eps)
        kernels.join[(b,)](
            x, self._added, x if bias is None else bias, self._squares, parts, c.d_inner, inner_eps, norm.weight,
            norm.eps, self._normed, d, ADD=0 if m is None else len(self._added), BIAS=bias is not None,
            DIVIDE=m is not None and m.norm.groups == 1, BD=_power(d), BS=_power(parts), num_warps=4, **self._pairing,
        )  # fmt: skip

    def _advance(self, m: Mamba2Mixer, ssm: Tensor) -> None:
        from mamba2_min.inference import step_kernels as kernels

        c = m.config
        kernels.advance[(self.batch * c.nheads, -(-c.headdim // self._state_size["BP"]))](
            self._projected, ssm, m.dt_bias, m.A_log, m.D, m.norm.weight, self._gated, self._squares, c.nheads,
            c.nheads // c.ngroups, c.headdim, c.d_state, c.d_in_proj,
            SQUARES=self.batch > _ROWS and m.norm.groups == 1, **self._pairing, **self._state_size,
        )  # fmt: skip


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


# Sizes of the tiles, for equal bits a function of shapes alone.


def row_sizes(k: int) -> dict[str, int]:
    """Of `project_rows`, for rows of k numbers."""
    width = _power(k)
    return {"BR": max(1, min(8, _TILE // width)), "BK": width, "num_warps": 4}


def tile_sizes(batch: int, outputs: int, number: int, shared: int) -> dict[str, int]:
    """Of `project_tiles`, for numbers of so many bytes and a GPU of so much shared memory. Measured on an H200."""
    rows, columns, width, most = max(16, min(64, _power(batch))), 32, 128, 6
    if outputs < 2048:
        columns, width, most = 16, 256, 4
    stages = min(most, shared // ((rows + columns) * width))  # how far loads run ahead changes no bit
    return {"BM": rows, "BR": columns, "BK": width // number, "num_warps": 4, "num_stages": stages}


def sections(outputs: int, k: int) -> int:
    """Into how many parts `project_tiles` cuts the sum over k, so that most multiprocessors have something to do."""
    return 2 if outputs < 2048 and k >= 1024 else 1


def state_sizes(batch: int, p: int, n: int) -> dict[str, Any]:
    """Of `advance`, for states (p, n). Those of many texts are larger than the cache, and leave it to the weights."""
    rows, kept = (8, "") if batch <= _ROWS else (32, "evict_first")
    return {"BP": min(_power(p), rows), "BN": _power(n), "KEPT": kept, "num_warps": 4}


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

    def check() -> list[float]:
        return [error for batch in (1, _ROWS + 1) for error in self_check(device, dtype, p, n, taps, batch)]

    return is_right("the decoding kernels", device, check, _TOLERANCE[dtype])


@torch.inference_mode()
def self_check(device: torch.device, dtype: torch.dtype, p: int, n: int, taps: int, batch: int) -> list[float]:
    """Relative errors of the third token's logits and states of a small model, against a `Decoder` in float32."""
    sizes: dict[str, Any] = {"d_model": p, "n_layer": 1, "headdim": p, "d_state": n, "d_conv": taps, "ngroups": 2}
    config = Mamba2Config(vocab_size=40, norm_per_group=batch <= _ROWS, **sizes)  # a norm that `join` ends, or of parts
    model = Mamba2LM(config, seed=0).to(device, dtype).eval()
    wide = Mamba2LM(config, seed=0).to(device)
    wide.load_state_dict(model.state_dict())
    steps = KernelDecoder(model, state := model.initial_state(batch)), Decoder(wide, other := wide.initial_state(batch))
    ids = torch.arange(batch, device=device) % config.vocab_size
    for _ in range(3):
        got, wanted = [decoder(ids).float() for decoder in steps]
    pairs = [(got, wanted), (state.ssm[0], other.ssm[0]), (state.conv[0].float(), other.conv[0])]
    return [float((a - b).norm() / b.norm()) for a, b in pairs if b.numel()]
