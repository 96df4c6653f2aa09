"""What the hand-written derivatives need, of autograd and of compilers, and how wide sums are."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def autocast_off(t: Tensor) -> contextlib.AbstractContextManager:
    """A context without autocast on the device of t: states, sums and decays must not be rounded to bf16."""
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


def handwritten_backward(backward: Callable) -> Callable:
    """What each hand-written `backward` here is: without autocast, which would round its products and convolutions, and
    without a derivative of its own. Where that is asked for (create_graph=True) it says so instead of giving it wrong:
    PyTorch's `once_differentiable` says it to `backward()` only, and `torch.autograd.grad` goes around it.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("mamba2_min's hand-written derivatives have no derivative of their own (create_graph)")
        with autocast_off(gradients[0]):
            return backward(ctx, *gradients)

    return run


def no_compile(function: Callable) -> Callable:
    """Keeps `torch.compile` out of `function`: what is laid out by hand for a CPU's caches, and writes where it is told
    to, gains nothing from it (and the compiler of PyTorch 2.11 loses gradients of results that are changed in place).
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        return (torch.compiler.disable(function) if torch.compiler.is_compiling() else function)(*args)

    return run


def is_traced() -> bool:
    """Whether a transform of torch.func runs, or torch.export: neither can be asked for the value of a tensor."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._functorch.maybe_current_level() is not None


def is_rounded() -> bool:
    """Whether a CPU may round float32 matrices to bf16 in their products, as `devices.matmul_precision` has it."""
    try:
        return torch.get_float32_matmul_precision() == "medium"
    except RuntimeError:  # where PyTorch's newer switches have been used, this one does not answer
        return False


@contextlib.contextmanager
def unrounded() -> Iterator[None]:
    """A context in which it may not: for products with one column, of which the rounding takes longer than it saves."""
    rounded = is_rounded()
    if rounded:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if rounded:
            torch.set_float32_matmul_precision("medium")


def as_bits(t: Tensor) -> Tensor:
    """t as integers, first and last dimension exchanged, for `ctx.save_for_backward`: a view that `of_bits` turns back.

    A compiler sees forward and backward at once, takes what both compute from t for one thing, and keeps that for the
    backward (t widened, t shifted) where t alone would do. It does not look through the integers, turned as they are.
    """
    return t.view(_INTEGERS[t.element_size()]).transpose(0, -1)


def of_bits(t: Tensor, dtype: torch.dtype) -> Tensor:
    """What `as_bits` was given."""
    return t.view(dtype).transpose(0, -1)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def materialize(t: Tensor) -> Tensor:
    """t, contiguous. A compiler writes it to memory here, instead of working it out anew wherever it is used."""
    return t.contiguous().as_strided(t.shape, [math.prod(t.shape[i + 1 :]) for i in range(t.dim())])


def widen(t: Tensor) -> Tensor:
    """t in float32, or in its own type where that is wider."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def widest(device: torch.device) -> torch.dtype:
    """What long sums and their differences are had in: float64, and on Apple's GPUs, which have none, float32."""
    return torch.float32 if device.type == "mps" else torch.float64
