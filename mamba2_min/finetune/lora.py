"""LoRA: a matrix keeps its weight, and a product of two thin matrices learns what is to be added to it.

    y = W x + b + (alpha / r) B A x            W (out, in) frozen, A (r, in), B (out, r)        arXiv:2106.09685, eq. 3

r is much smaller than in and out, so that A and B have few numbers: r (in + out) instead of in * out. A starts random
and B at zero, so that the model starts as it was, and yet both get a gradient: B's is that of the output times A x, and
A's is zero in the first step alone. Scaling by alpha / r keeps the size of an update when r changes.

Afterwards B A can be added to W for good (`merge_lora`): the model then costs what it did before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba2_min.models.base import LanguageModel
from mamba2_min.models.bypass import forwards, is_plain
from mamba2_min.ops.lora import lora_linear

_LINEAR = forwards(nn.Linear)


@dataclass(frozen=True)
class LoRAConfig:
    """Rank `r`, the scale's `alpha`, `dropout` on what A reads, and the projections by name. Bad values: ValueError."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.1
    targets: tuple[str, ...] = ("in_proj", "out_proj")

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or not 1 <= self.r <= 1 << 16:
            raise ValueError(f"lora_r must be an integer from 1 to {1 << 16}, not {self.r!r}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora_alpha must be a number above 0, not {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), not {self.dropout!r}")
        if not self.targets or not all(isinstance(name, str) and name for name in self.targets):
            raise ValueError("LoRA needs the name of at least one projection")

    @property
    def scale(self) -> float:
        return self.alpha / self.r


class LoRALinear(nn.Linear):
    """An nn.Linear with its own `weight` and `bias`, frozen, and an adapter `lora_A`, `lora_B` beside them."""

    row_wise = True

    def __init__(self, linear: nn.Linear, config: LoRAConfig, generator: torch.Generator | None = None):
        nn.Module.__init__(self)  # not nn.Linear's: the parameters are those of `linear`
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.dropout, self.scale = config.dropout, config.scale
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Linear(self.in_features, config.r, bias=False, **like)
        self.lora_B = nn.Linear(config.r, self.out_features, bias=False, **like)
        with torch.no_grad():
            bound = 1 / math.sqrt(self.in_features)  # as a projection of this input starts
            drawn = torch.empty(self.lora_A.weight.shape).uniform_(-bound, bound, generator=generator)
            self.lora_A.weight.copy_(drawn)
            self.lora_B.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        A, B = self.lora_A, self.lora_B
        if not torch.compiler.is_compiling() and is_plain(A, _LINEAR) and is_plain(B, _LINEAR) and self._is_frozen():
            p = self.dropout if self.training else 0.0
            return lora_linear(x, self.weight, self.bias, A.weight, B.weight, self.scale, p)
        added = B(A(F.dropout(x, self.dropout, self.training)))
        return F.linear(x, self.weight, self.bias) + self.scale * added

    def _is_frozen(self) -> bool:
        return not self.weight.requires_grad and (self.bias is None or not self.bias.requires_grad)

    def delta(self) -> Tensor:
        """(alpha / r) B A, what a merge adds to the weight: (out, in), summed in float64."""
        return self.scale * (self.lora_B.weight.double() @ self.lora_A.weight.double())


def add_lora(model: LanguageModel, config: LoRAConfig, seed: int = 0) -> list[str]:
    """Freezes the model, puts an adapter on every projection that `config.targets` names, and returns their names.

    Raises ValueError for a name that matches no projection (the message lists those that there are), for a table that
    is tied to another, and for a model that has adapters already.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if any(isinstance(module, LoRALinear) for module in linears.values()):
        raise ValueError("the model has adapters already; merge them first")
    chosen = []
    for target in config.targets:
        found = [name for name in linears if name == target or name.endswith("." + target)]
        if not found:
            known = sorted({name.rpartition(".")[2] for name in linears})
            raise ValueError(f"no projection is called {target!r}; the model has {', '.join(known)}")
        chosen += found
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name in chosen:
        if id(linears[name].weight) in shared:
            raise ValueError(f"{name} is tied to the embedding: an adapter there would change one and not the other")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(set(chosen)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(linears[name], config, generator))
    return sorted(set(chosen))


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The name and module of every projection that has an adapter."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


@torch.no_grad()
def merge_lora(model: LanguageModel) -> LanguageModel:
    """Adds every adapter to its weight, in place, and puts a plain nn.Linear back; returns the model."""
    for name, module in list(adapters(model)):
        module.weight += module.delta().to(module.weight.dtype)
        plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        plain.weight, plain.bias = module.weight, module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    return model


def trainable(model: nn.Module) -> tuple[int, int]:
    """The numbers of trained and of all parameters; of a table of which some rows are trained, those count."""
    parameters = list(model.parameters())
    learning = [p for p in parameters if p.requires_grad]
    trained = sum(p.trained_rows * p.shape[1] if hasattr(p, "trained_rows") else p.numel() for p in learning)
    return trained, sum(p.numel() for p in parameters)
