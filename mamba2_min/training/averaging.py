"""The average of a model's weights over the last steps (EMA): it is what is validated, kept as the best, and saved.

    average <- d average + (1 - d) weights    after every step; d = min(decay, (1 + n) / (10 + n)) after n of them

A constant learning rate leaves the weights walking around a minimum; their average lies nearer to it (Polyak and
Juditsky, 1992). The first averages forget faster, so that the random start is gone from them soon.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mamba2_min.training.sharding import own_part, part_of


class Average:
    """Keeps the average of the parameters of `model` that are trained, beside them. A decay of 0 keeps none."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad and decay}
        self._names = list(trained)
        self._parameters: list[Tensor] = list(trained.values())
        self._average = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self, n: int) -> None:
        """Takes in the weights after another step; `n` steps were taken in before."""
        if self._average:
            weight = 1 - min(self.decay, (1 + n) / (10 + n))
            average, parameters = ([own_part(t) for t in tensors] for tensors in (self._average, self._parameters))
            torch._foreach_lerp_(average, parameters, weight)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model has the averaged weights. Nothing may be trained then."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self._parameters, self._average, strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self._names, self._average, strict=True))

    def load_state_dict(self, saved: Any) -> None:
        """Goes on from what `state_dict` gave. Raises ValueError for anything else, and is then as it was."""
        if not isinstance(saved, dict) or saved.keys() != set(self._names):
            raise ValueError("its average has other names than the model's parameters")
        for name, mine in self.state_dict().items():
            theirs = saved[name]
            if not isinstance(theirs, Tensor) or theirs.shape != mine.shape or theirs.dtype != mine.dtype:
                raise ValueError(f"its average of {name} must be a {mine.dtype} tensor of {tuple(mine.shape)}")
            if theirs.layout != torch.strided or theirs.is_meta or not theirs.isfinite().all():
                raise ValueError(f"its average of {name} must have finite numbers")

        for name, mine in self.state_dict().items():
            mine.copy_(part_of(saved[name], mine))
