"""Tensors that a backward pass can compute again, because what they come from is kept anyway.

A norm keeps its input for its own gradient, and from that its output is one pass over memory. The projection after it
needs the same output once more. If both keep what they need, the numbers lie in memory twice. So a norm whose weight is
frozen writes a recipe on its output, and a projection that can (ops/lora.py) keeps the recipe and not the output. In a
full training the output stays, because there time counts more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mamba2_min.ops.autograd import is_traced


class Recipe(NamedTuple):
    """compute(*inputs) is the tensor, with the same bits, as long as its version is this one."""

    compute: Callable[..., Tensor]
    inputs: tuple[Tensor | None, ...]
    version: int


def with_recipe(t: Tensor, weight: Tensor, compute: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """t, which is compute(*inputs) of the frozen `weight` among others; where that one is trained, t without a recipe.

    The inputs should be what the backward pass that belongs to t keeps, or the recipe costs memory.
    """
    if torch.is_grad_enabled() and not (weight.requires_grad or torch.compiler.is_compiling() or is_traced()):
        t.recipe = Recipe(compute, inputs, t._version)  # type: ignore[attr-defined]
    return t


def recipe_of(t: Tensor) -> Recipe | None:
    """What to keep instead of t; None where it has no recipe, or was changed since."""
    recipe: Recipe | None = getattr(t, "recipe", None)
    return recipe if recipe and recipe.version == t._version else None
