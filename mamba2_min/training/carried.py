"""The state that each row of a batch hands on to its next window, without its history (truncated backpropagation)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mamba2_min.models.mamba2 import Mamba2LM, State
from mamba2_min.training.distributed import Team


def handed_on(state: State) -> State:
    """A state without its history and with 0 for what is not finite: a bad step must not spoil those that follow."""
    state = state.detach()
    return State(*([torch.where(t.isfinite(), t, 0) for t in tensors] for tensors in (state.conv, state.ssm)))


class CarriedState:
    """The `State` of all rows of a batch. `before` and `after` enclose each micro-batch, `commit` ends a step.

    What `after` got takes effect with `commit` alone: a step that is computed again, in other parts, starts from the
    same state. With several processes each has the rows of its own micro-batches; `gather` brings them together.
    """

    def __init__(self, model: Mamba2LM):
        self.model = model
        self.state: State | None = None
        self._next: dict[tuple[int, int], State] = {}  # by the first row and the one after the last

    def before(self, part: slice, fresh: Tensor) -> State:
        """The state from which rows `part` of a batch go on; those of `fresh` (b,) bool begin from an empty one."""
        state = self.state or self.model.initial_state(len(fresh))
        gone = fresh[part].to(state.ssm[0].device)

        def rows(tensors: list[Tensor]) -> list[Tensor]:
            return [t[part].masked_fill(gone.view(-1, *[1] * (t.dim() - 1)), 0) for t in tensors]

        return State(rows(state.conv), rows(state.ssm))

    def after(self, part: slice, state: State) -> None:
        """Takes the state after a micro-batch, as `handed_on` gives it."""
        self._next[part.start, part.stop] = state.detach()

    def forget(self) -> None:
        """Gives up what `after` got in a try that is to be repeated."""
        self._next = {}

    def commit(self, rows: int) -> None:
        """Ends a step of a batch of so many rows: its states are those from which the next one starts."""
        self.state = self.state or self.model.initial_state(rows)
        for (start, stop), new in self._next.items():
            for mine, theirs in ((self.state.conv, new.conv), (self.state.ssm, new.ssm)):
                mine[:] = [tensor.to(other.dtype) for tensor, other in zip(mine, theirs, strict=True)]
                torch._foreach_copy_([tensor[start:stop] for tensor in mine], theirs)
        self._next = {}

    def gather(self, team: Team, rows: slice) -> None:
        """Brings the rows of all processes together; `rows` are those of this one."""
        if team.size > 1 and self.state is not None:
            for tensors in (self.state.conv, self.state.ssm):
                for tensor in tensors:
                    tensor[: rows.start] = 0
                    tensor[rows.stop if team.rank % team.stretches == 0 else 0 :] = 0  # one of those that share a text
                team.total(tensors)

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Empty before the first step."""
        return {} if self.state is None else {"conv": self.state.conv, "ssm": self.state.ssm}

    def load_state_dict(self, saved: Any, rows: int) -> None:
        """Goes on from what `state_dict` gave, for a batch of `rows`. Raises ValueError for anything else."""
        if saved == {}:
            self.state = None
            return
        like = self.model.initial_state(rows)
        if not isinstance(saved, dict) or saved.keys() != {"conv", "ssm"}:
            raise ValueError("its carried state is of another kind")
        loaded = {}
        for name, layers in (("conv", like.conv), ("ssm", like.ssm)):
            tensors = saved[name]
            if not isinstance(tensors, list) or len(tensors) != len(layers):
                raise ValueError(f"its carried state has not {len(layers)} layers")
            for tensor, layer in zip(tensors, layers, strict=True):
                if not isinstance(tensor, Tensor) or tensor.shape != layer.shape or not tensor.is_floating_point():
                    raise ValueError(f"its carried state must have tensors of {tuple(layer.shape)}")
                if tensor.layout != torch.strided or tensor.is_meta or not tensor.isfinite().all():
                    raise ValueError("its carried state must have finite numbers")
            loaded[name] = [tensor.to(layer.device) for tensor, layer in zip(tensors, layers, strict=True)]
        self.state = State(loaded["conv"], loaded["ssm"])
