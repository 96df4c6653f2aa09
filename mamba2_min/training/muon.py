"""Muon: every direction of a matrix takes a step of the same length (Jordan and others, 2024; arXiv:2502.16982).

    M <- mu M + (1 - mu) G                       G (r, c): the gradient; M: its mean
    U S V^T = mu M + (1 - mu) G                  Nesterov's look ahead
    W <- (1 - lr decay) W - lr 0.2 sqrt(max(r, c)) U V^T

A few directions make up most of a matrix's gradient, and of AdamW's step too. U V^T is the matrix nearest to it whose
directions all count the same, so that rare ones are learnt as fast. The factor makes a step as large as AdamW's usual
one (arXiv:2502.16982, equation 4): a learning rate and a decay that are good for AdamW serve here too.

Only the matrices of the layers are trained so; the embedding and all vectors have AdamW.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mamba2_min.models.base import Backbone
from mamba2_min.models.mamba2 import Mamba2Mixer

MOMENTUM = 0.95
_SIZE = 0.2  # root mean square of AdamW's usual step, as a share of the learning rate
_STEPS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Newton and Schulz's iteration, by Jordan: fast, to within a third


class Muon(torch.optim.AdamW):
    """AdamW for `groups`, Muon for `matrices`: {parameter (r, c): how many rows each of its parts has}.

    Rows that different things are made of, such as the z, x, B, C and dt of an in_proj, are different matrices. Of a
    matrix only the mean is kept, as "exp_avg".
    """

    def __init__(self, groups: list[dict[str, Any]], matrices: Mapping[Tensor, list[int]], **options: Any):
        by_parts: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for matrix, rows in matrices.items():
            key = (*rows, matrix.shape[1])
            by_parts[key].append(matrix)
        weight_decay = groups[0]["weight_decay"]
        groups = [
            *({**group, "params": [p for p in group["params"] if p not in matrices], "rows": ()} for group in groups),
            *({"params": ps, "weight_decay": weight_decay, "rows": key[:-1]} for key, ps in by_parts.items()),
        ]
        super().__init__([group for group in groups if group["params"]], **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["rows"]]
            result = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["rows"]:
                self._step(group, [p for p in group["params"] if p.grad is not None])
        return result

    def _step(self, group: dict[str, Any], matrices: list[Tensor]) -> None:
        if not matrices:
            return
        means = [self._mean(p) for p in matrices]
        gradients = [p.grad for p in matrices if p.grad is not None]
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        at = 0
        for rows in group["rows"]:  # of all matrices at once: few large products in place of many small ones
            part = slice(at, at + rows)
            at += rows
            ahead = torch._foreach_lerp([g[part] for g in gradients], [mean[part] for mean in means], MOMENTUM)
            steps = orthogonal(torch.stack(ahead))
            del ahead
            length = group["lr"] * _SIZE * math.sqrt(max(steps.shape[1:]))
            torch._foreach_add_([p[part] for p in matrices], list(steps.to(matrices[0].dtype)), alpha=-length)
            del steps

    def _mean(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state["step"], state["exp_avg"] = torch.zeros(()), torch.zeros_like(p)
        assert p.grad is not None
        state["step"] += 1
        mean: Tensor = state["exp_avg"].lerp_(p.grad, 1 - MOMENTUM)
        return mean


def orthogonal(matrices: Tensor) -> Tensor:
    """(k, r, c): of each matrix U S V^T about U V^T, with singular values between 0.7 and 1.2; 0 where all is 0.

    An odd polynomial of a matrix is that of its singular values. This one, five times, brings those from 0.003 of the
    norm on near to 1. On a GPU the products are in bf16, which is enough.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # a copy, which the steps below change
    for _ in range(_STEPS):
        gram = x @ x.mT
        square = c * gram @ gram
        gram.mul_(b).add_(square)  # in place: all layers at once are a third of the model
        del square
        more = gram @ x
        x.mul_(a).add_(more)
    return x if wide else x.mT


def layer_matrices(model: nn.Module) -> dict[Tensor, list[int]]:
    """The trained matrices of the layers of a language model, or of what has one in it, with the rows of their
    parts."""
    found: dict[Tensor, list[int]] = {}
    for block in (block for part in model.modules() if isinstance(part, Backbone) for block in part.layers):
        for linear, rows in (_of_mamba2 if isinstance(block.mixer, Mamba2Mixer) else _of_transformer)(block):
            if type(linear) is nn.Linear and linear.weight.requires_grad:
                found[linear.weight] = rows
    return found


def _of_mamba2(block: Any) -> list[tuple[nn.Module, list[int]]]:
    """The projections, each with how many of its rows make one thing: of in_proj z, x, B, C and dt."""
    mixer, c = block.mixer, block.mixer.config
    n = c.ngroups * c.d_state
    return [(mixer.in_proj, [c.d_inner, c.d_inner, n, n, c.nheads]), (mixer.out_proj, [c.d_model])]


def _of_transformer(block: Any) -> list[tuple[nn.Module, list[int]]]:
    """Queries, keys and values; gate and up."""
    mixer, mlp, d = block.mixer, block.mlp, block.mixer.config.d_model
    gate_up = [block.mixer.config.d_ff] * 2
    return [(mixer.qkv_proj, [d] * 3), (mixer.out_proj, [d]), (mlp.gate_up_proj, gate_up), (mlp.out_proj, [d])]
