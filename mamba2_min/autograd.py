"""Two decorators that the hand-written derivatives here need."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def without_autocast(function: Callable) -> Callable:
    """Runs `function` without autocast: a state, a sum or a decay in bf16 would lose what it is there to keep."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).device.type
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


def first_order(backward: Callable) -> Callable:
    """A `backward` that says so where its own derivative is asked for (create_graph=True), instead of giving it wrong.

    PyTorch's `once_differentiable` says it only to `backward()`; `torch.autograd.grad` goes around it.
    """

    @functools.wraps(backward)
    def run(*args: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("mamba2_min's hand-written derivatives have no derivative of their own (create_graph)")
        return backward(*args)

    return run
