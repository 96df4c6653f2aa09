"""The model's shape: every number that fixes a Mamba-2, checked at construction."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from dataclasses import dataclass
from typing import Any

_LARGEST = 1 << 24  # of every size: beyond it stands a slip, or a file that means harm


@dataclass(frozen=True)
class Mamba2Config:
    """The hyper-parameters of a `Mamba2LM`. Unknown names and impossible values raise ValueError.

    Names in brackets are the symbols of the Mamba-2 paper (arXiv:2405.21060).
    """

    vocab_size: int
    d_model: int = 256  # (D) width of the residual stream
    n_layer: int = 4
    d_state: int = 64  # (N) size of a head's state a channel
    d_conv: int = 4  # taps of the causal depthwise convolution
    expand: int = 2  # (E) d_inner = expand * d_model
    headdim: int = 64  # (P) channels a head
    ngroups: int = 1  # (G) groups of heads that share B and C
    chunk_size: int = 64  # (Q) tokens a chunk of the scan; it changes speed and memory, never the result
    a_init: str = "hippo"  # "hippo": S4D-Real, A_h = -(h + 1) across heads; "uniform": A ~ -U(1, 16)
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dropout: float = 0.0  # on each block's output, before it joins the residual stream
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 1  # rows of the embedding are rounded up to this; the extra ids are never produced
    norm_eps: float = 1e-5
    norm_before_gate: bool = False  # False: RMSNorm(y * silu(z)), as the official models do
    norm_per_group: bool = True  # that norm runs over each of the ngroups groups on its own, as the official code does
    conv_bias: bool = True
    proj_bias: bool = False
    residual_in_fp32: bool = True

    def __new__(cls, *args: Any, **values: Any) -> Mamba2Config:
        _refuse_unknown(values, [field.name for field in dataclasses.fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "d_model",
            "n_layer",
            "d_state",
            "d_conv",
            "expand",
            "headdim",
            "ngroups",
            "chunk_size",
            "pad_vocab_size_multiple",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
                raise ValueError(f"{name} must be a whole number from 1 to {_LARGEST}, not {value!r}")
        for name in ("dt_min", "dt_max", "dt_init_floor", "dropout", "norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
                raise ValueError(f"{name} must be a finite number, not {value!r}")
        for name in (
            "tie_embeddings",
            "norm_before_gate",
            "norm_per_group",
            "conv_bias",
            "proj_bias",
            "residual_in_fp32",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.d_inner % self.headdim:
            good = _nearest_divisor(self.d_inner, self.headdim)
            raise ValueError(
                f"headdim must divide expand * d_model = {self.expand} * {self.d_model} = {self.d_inner}, "
                f"and {self.headdim} does not; the nearest that does is {good}"
            )
        if self.nheads % self.ngroups:
            good = _nearest_divisor(self.nheads, self.ngroups)
            raise ValueError(
                f"ngroups must divide the number of heads, {self.d_inner} / {self.headdim} = {self.nheads}, "
                f"and {self.ngroups} does not; the nearest that does is {good}"
            )
        if self.a_init not in ("hippo", "uniform"):
            raise ValueError(f'a_init must be "hippo" or "uniform", not {self.a_init!r}')
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"0 < dt_min <= dt_max must hold, not dt_min {self.dt_min}, dt_max {self.dt_max}")
        if not 0 < self.dt_init_floor <= self.dt_max:
            raise ValueError(f"dt_init_floor must lie in (0, dt_max], not {self.dt_init_floor}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps must be positive, not {self.norm_eps}")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def nheads(self) -> int:
        return self.d_inner // self.headdim

    @property
    def conv_dim(self) -> int:
        """Channels that pass through the convolution: x, B and C."""
        return self.d_inner + 2 * self.ngroups * self.d_state

    @property
    def d_in_proj(self) -> int:
        """Rows of in_proj: z, x, B, C, dt, in that order."""
        return 2 * self.d_inner + 2 * self.ngroups * self.d_state + self.nheads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of pad_vocab_size_multiple."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    def num_parameters(self) -> int:
        """Parameters of the model, counted from the shapes alone, so that it can be asked before anything is built."""
        mixer = (
            self.d_in_proj * self.d_model
            + self.d_model * self.d_inner
            + self.proj_bias * (self.d_in_proj + self.d_model)
            + self.conv_dim * (self.d_conv + self.conv_bias)
            + 3 * self.nheads
            + self.d_inner
        )
        heads = 1 if self.tie_embeddings else 2
        return heads * self.padded_vocab_size * self.d_model + self.n_layer * (mixer + self.d_model) + self.d_model

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Mamba2Config:
        """The config that `to_dict` gave. An unknown key is a ValueError that names the nearest known one."""
        _refuse_unknown(values, [field.name for field in dataclasses.fields(cls)])
        if "vocab_size" not in values:
            raise ValueError("the config has no vocab_size")
        return cls(**values)


def _refuse_unknown(values: dict[str, Any], known: list[str]) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(f"unknown config key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _nearest_divisor(n: int, near: int) -> int:
    divisors = {d for i in range(1, math.isqrt(n) + 1) if n % i == 0 for d in (i, n // i)}
    return min(divisors, key=lambda d: (abs(d - near), d))
