"""Helpers for hand-written backward passes: autocast, compilers, and the dtypes of sums."""

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
    if device == "meta" or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def without_autocast(function: Callable) -> Callable:
    """Runs `function` without autocast on the device of its first tensor argument."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        with autocast_off(tensors[0]):
            return function(*args, **kwargs)

    return run


def handwritten_backward(backward: Callable) -> Callable:
    """Runs the `backward` of an autograd function without autocast, which would round its products and convolutions.

    It has no derivative of its own: asking for one (create_graph=True) is a RuntimeError. (torch.func.grad, once or
    twice, takes the plain definitions, which have one.) PyTorch's `once_differentiable` notices that in `backward()`
    alone, not in `torch.autograd.grad`, and gives a wrong result.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "mamba2_min's hand-written gradients have no gradients of their own (create_graph): "
                "take both by torch.func, as in docs/interop.md"
            )
        with autocast_off(gradients[0]):
            return backward(ctx, *gradients)

    return run


def no_compile(function: Callable) -> Callable:
    """Keeps `torch.compile` out of `function`, which takes positional arguments.

    Code that is written for a CPU's caches and works in place gains nothing from a compiler, and PyTorch 2.11's loses
    the gradients of results that are changed in place.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        return (torch.compiler.disable(function) if torch.compiler.is_compiling() else function)(*args)

    return run


# PyTorch 2.11 answers torch.compiler.is_exporting() with True within torch.compile too.
_TELLS_EXPORT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)


def is_traced() -> bool:
    """Whether PyTorch looks inside: a transform of torch.func, torch.export, torch.jit.trace, make_fx, fake tensors.

    None of them can be asked for the value of a tensor. What they see is the plain definition of each operation.
    """
    if torch.compiler.is_compiling():
        return _TELLS_EXPORT and torch.compiler.is_exporting()
    return (
        torch._C._functorch.maybe_current_level() is not None
        or torch.jit.is_tracing()
        or any(torch._C._get_dispatch_mode(mode) is not None for mode in _TRACING_MODES)
    )


_TRACING_MODES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def is_rounded() -> bool:
    """Whether a CPU may round the operands of float32 matrix products to bf16 (`devices.matmul_precision`)."""
    try:
        return torch.get_float32_matmul_precision() == "medium"
    except RuntimeError:  # raised once PyTorch's newer switches have been used
        return False


@contextlib.contextmanager
def unrounded() -> Iterator[None]:
    """A context without that rounding. In a product with one column, it takes longer than it saves."""
    rounded = is_rounded()
    if rounded:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if rounded:
            torch.set_float32_matmul_precision("medium")


def pack_saved(t: Tensor) -> Tensor:
    """t as it should be passed to `ctx.save_for_backward`: a view as integers, first and last dimension exchanged.

    A compiler sees forward and backward together. It would keep what both compute from t (t widened, t shifted) for the
    backward pass, although t is enough. It does not see through this view, so it keeps only t.
    """
    return t.view(_INTEGERS[t.element_size()]).transpose(0, -1)


def unpack_saved(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, of that dtype, that `pack_saved` was given."""
    return t.view(dtype).transpose(0, -1)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def materialize(t: Tensor) -> Tensor:
    """t, contiguous. A compiler then writes it to memory, instead of computing it again at every use."""
    return t.contiguous().as_strided(t.shape, [math.prod(t.shape[i + 1 :]) for i in range(t.dim())])


def widen(t: Tensor) -> Tensor:
    """t in float32, or in its own dtype where that is wider."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def widest(device: torch.device) -> torch.dtype:
    """The dtype of long sums and their differences: float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
