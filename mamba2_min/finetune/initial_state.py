"""Initial-state tuning: nothing of the model is trained but the state from which every text begins.

A text begins with H_0 = 0, one (p, n) matrix per head and layer. A learnt H_0 acts as a prompt of no length: the model
reads each text as if it had read something before, at no cost per token. Only a model with a state has this
(arXiv:2604.01168). The convolution's window still begins empty.
"""

from __future__ import annotations

import torch
from torch import nn

from mamba2_min.models.mamba2 import Mamba2LM, State
from mamba2_min.ops.autograd import widen


class TunedStateLM(Mamba2LM):
    """A Mamba2LM whose texts begin with the learnt `first_state`: one (h, p, n) parameter per layer, zeros at first."""

    first_state: nn.ParameterList

    @classmethod
    def of(cls, model: Mamba2LM) -> TunedStateLM:
        """Turns `model` into one, in place, with all its other parameters frozen."""
        model.requires_grad_(False)
        model.__class__ = cls
        assert isinstance(model, cls)
        c, like = model.config, model.backbone.norm_f.weight
        wide = torch.promote_types(like.dtype, torch.float32)
        shape = (c.nheads, c.headdim, c.d_state)
        model.first_state = nn.ParameterList(
            nn.Parameter(torch.zeros(shape, dtype=wide, device=like.device)) for _ in range(c.n_layer)
        )
        return model

    def initial_state(self, batch: int = 1) -> State:
        """The state before any token: an empty window, and the learnt state in each of `batch` rows."""
        state = super().initial_state(batch)
        return State(state.conv, [widen(first).expand(batch, *first.shape).clone() for first in self.first_state])

    def start(self, batch: int) -> State:
        """Every text begins with the learnt state. With `seq_idx` only the first document of a row does, so that a row
        must hold one document, and padding after it."""
        return self.initial_state(batch)
