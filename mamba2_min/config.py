"""The model's shape: every number that fixes a Mamba-2, checked at construction."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any

from mamba2_min import validate

LARGEST_SIZE = 1 << 24  # of every size: a larger one is a typing error, or a malicious file
A_INITS = ("hippo", "uniform")
DROPOUTS = ("dropout", "embedding_dropout", "variational_dropout")


def _value(default: Any, help: str, **more: Any) -> Any:  # the metadata is for the flags of train.py
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Mamba2Config:
    """The hyper-parameters of a `Mamba2LM`. Unknown names and impossible values raise ValueError.

    Letters in brackets are the symbols of the Mamba-2 paper (arXiv:2405.21060).
    """

    vocab_size: int
    d_model: int = _value(256, "(D) width of the residual stream")
    n_layer: int = _value(4, "number of blocks")
    d_state: int = _value(64, "(N) size of the state per channel")
    d_conv: int = _value(4, "taps of the causal depthwise convolution")
    expand: int = _value(2, "(E) d_inner = expand * d_model")
    headdim: int = _value(64, "(P) channels per head")
    ngroups: int = _value(1, "(G) groups of heads that share B and C")
    chunk_size: int = _value(64, "(Q) tokens per chunk of the scan: changes speed and memory, never the result")
    a_init: str = _value(
        "hippo", "hippo: S4D-Real, A_h = -(h + 1) across heads; uniform: A ~ -U(1, 16)", choices=A_INITS
    )
    dt_min: float = _value(1e-3, "smallest step size that a head starts with")
    dt_max: float = _value(0.1, "largest step size that a head starts with")
    dt_init_floor: float = _value(1e-4, "no head starts with a smaller step size, whatever dt_min is")
    dropout: float = _value(0.0, "on each block's output, before it joins the residual stream")
    embedding_dropout: float = _value(0.0, "of words: a word is absent from a whole batch")
    variational_dropout: float = _value(0.0, "of channels before and after the blocks, held over a window")
    tie_embeddings: bool = _value(True, "the head's weight is the embedding's")
    pad_vocab_size_multiple: int = _value(1, "rows of the embedding are rounded up to this; no extra id is produced")
    norm_eps: float = _value(1e-5, "added to the mean square in every RMSNorm")
    norm_before_gate: bool = _value(False, "false: RMSNorm(y * silu(z)), as in the official models")
    norm_per_group: bool = _value(True, "each of the ngroups groups has its own rms, as in the official code")
    conv_bias: bool = _value(True, "a bias in the convolution")
    proj_bias: bool = _value(False, "biases in in_proj and out_proj")
    residual_in_fp32: bool = _value(True, "the residual stream is float32 or wider")

    def __new__(cls, *args: Any, **values: Any) -> Mamba2Config:
        _refuse_unknown(cls, values)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # annotations are strings here
            value = getattr(self, field.name)
            if field.type == "int":
                validate.integer(field.name, value, 1, LARGEST_SIZE)
            elif field.type == "bool":
                validate.boolean(field.name, value)
            elif field.type == "float":
                validate.number(field.name, value, 0, math.inf)
        validate.one_of("a_init", self.a_init, A_INITS)
        _check_divisor("headdim", self.headdim, f"expand * d_model = {self.expand} * {self.d_model}", self.d_inner)
        _check_divisor("ngroups", self.ngroups, f"the number of heads, {self.d_inner} / {self.headdim}", self.nheads)
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"0 < dt_min <= dt_max must hold, not dt_min {self.dt_min}, dt_max {self.dt_max}")
        if not 0 < self.dt_init_floor <= self.dt_max:
            raise ValueError(f"dt_init_floor must lie in (0, dt_max], not {self.dt_init_floor}")
        for name in DROPOUTS:
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)}")
        if self.norm_eps == 0:
            raise ValueError("norm_eps must be positive")

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
        """Parameters of the model, counted from the shapes alone, before anything is built."""
        projections = (self.d_in_proj + self.d_inner) * self.d_model + self.proj_bias * (self.d_in_proj + self.d_model)
        convolution = self.conv_dim * (self.d_conv + self.conv_bias)
        mixer = projections + convolution + 3 * self.nheads + self.d_inner  # A_log, D, dt_bias; the norm
        heads = 1 if self.tie_embeddings else 2
        return heads * self.padded_vocab_size * self.d_model + self.n_layer * (mixer + self.d_model) + self.d_model

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Mamba2Config:
        """The config that `to_dict` gave. An unknown key is a ValueError that names the nearest known one."""
        _refuse_unknown(cls, values)
        if "vocab_size" not in values:
            raise ValueError("the config has no vocab_size")
        return cls(**values)


def _refuse_unknown(cls: type[Mamba2Config], values: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(f"unknown config key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _check_divisor(name: str, value: int, whole: str, n: int) -> None:
    if n % value:
        divisors = {d for i in range(1, math.isqrt(n) + 1) if n % i == 0 for d in (i, n // i)}
        good = min(divisors, key=lambda d: (abs(d - value), d))
        raise ValueError(f"{name} must divide {whole} = {n}, and {value} does not; the nearest that does is {good}")
