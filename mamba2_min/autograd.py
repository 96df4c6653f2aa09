"""What the hand-written derivatives here need, and the dtype that long sums take."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def autocast_off(t: Tensor) -> contextlib.AbstractContextManager:
    """A context without autocast on t's device: a state, a sum or a decay in bf16 would lose what it is there to keep.
    """
    device = t.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def without_autocast(function: Callable) -> Callable:
    """Runs `function` without autocast on the device of the first tensor that it is given."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        with autocast_off(tensors[0]):
            return function(*args, **kwargs)

    return run


def uncompiled(function: Callable) -> Callable:
    """Keeps `torch.compile` out of `function`: what is laid out by hand for a CPU's caches, and writes where it is told
    to, gains nothing from it (and the compiler of PyTorch 2.11 loses gradients of results that are changed in place).
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        return (torch.compiler.disable(function) if torch.compiler.is_compiling() else function)(*args)

    return run


def widest(device: torch.device) -> torch.dtype:
    """What long sums and their differences are had in: float64, and on Apple's GPUs, which have none, float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def refuse_second_derivative() -> None:
    """Says so where the derivative of a `backward` is asked for (create_graph=True), instead of giving it wrong.

    The first line of each `backward` here. PyTorch's `once_differentiable` says it only to `backward()`, while
    `torch.autograd.grad` goes around it.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("mamba2_min's hand-written derivatives have no derivative of their own (create_graph)")
