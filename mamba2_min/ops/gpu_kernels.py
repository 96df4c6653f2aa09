"""What all kernels in Triton share: whether they can run, and how PyTorch's compiler sees them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mamba2_min.ops.autograd import is_traced

_OLDEST = (3, 2)  # of Triton


@functools.cache
def _triton_is_new_enough() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    with contextlib.suppress(Exception):  # a package that is broken is one that is not there
        import triton

        return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= _OLDEST
    return False


def constant_when_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Has a compiler call `function` while it compiles, and take the result for a constant.

    This is `torch.compiler.assume_constant_result`, which would import the compiler here: over a second at each start.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def has_triton() -> bool:
    """Whether there is a Triton that is new enough."""
    return _triton_is_new_enough()


def takes(t: Tensor) -> bool:
    """Whether a kernel can take this tensor: on a GPU, bf16 or float32, where no transform of torch.func runs."""
    return t.is_cuda and t.dtype in (torch.bfloat16, torch.float32) and has_triton() and not is_traced()


def is_right(kernels: str, device: torch.device, check: Callable[[], Iterable[float]], tolerance: float) -> bool:
    """Whether `kernels` run on this device and the errors that `check` finds are at most the tolerance. Otherwise a
    warning says why not, and the device goes without them.

    The check comes at first use, which may lie in a block that is checkpointed, under autocast or in inference mode. It
    runs in a thread of its own, where none of that holds: a checkpoint would count what the check saves for its
    gradients, and miss it when the block runs again.
    """
    try:
        with ThreadPoolExecutor(1) as apart:
            errors = apart.submit(_checked, check).result()
        too_large = [error for error in errors if not error <= tolerance]
    except Exception as fault:  # whatever a compiler or a driver raises
        reason = (str(fault).splitlines() or [type(fault).__name__])[0]
    else:
        if not too_large:
            return True
        reason = f"they are off by {too_large[0]:.1e}"
    warnings.warn(f"{device} goes without {kernels}: {reason}", stacklevel=3)
    return False


def _checked(check: Callable[[], Iterable[float]]) -> list[float]:
    # Its own backward pass runs in this thread: that of the device may be the one that waits for the check.
    with torch.autograd.set_multithreading_enabled(False):
        return list(check())


def operator(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as the operator of PyTorch named in `schema`: a compiler calls it and does not look into it.

    fake: what it returns, without values. Outside of a compiler the function is called as it is, which costs less.
    """
    name, _, arguments = schema.partition("(")
    registered = torch.library.custom_op(f"mamba2_min::{name}", function, mutates_args=(), schema=f"({arguments}")
    registered.register_fake(fake)

    def call(*args: Any) -> Any:
        return registered(*args) if torch.compiler.is_compiling() else function(*args)

    return call


def on(t: Tensor) -> contextlib.AbstractContextManager:
    """A context in which the device of t is the current one; kernels are launched on that."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block of threads can have; any number where there is no GPU."""
    if device.type != "cuda":
        return 1 << 30
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) or 65_536


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a kernel of ours can multiply matrices of bf16 there: of NVIDIA's GPUs on those from Ampere on."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return not nvidia or torch.cuda.get_device_capability(device) >= (8, 0)


def rows_contiguous(t: Tensor) -> Tensor:
    """t with its last dimension contiguous."""
    return t if t.stride(-1) == 1 else t.contiguous()


def unit_of(*tensors: Tensor) -> int:
    """8 where all rows of these begin at multiples of 8 numbers, or 1.

    Triton notices multiples of 16 alone, and reads what it does not know to be aligned number by number.
    """
    return 8 if all(stride % 8 == 0 for t in tensors for stride in t.stride()[:-1]) else 1


def in_units(unit: int, t: Tensor) -> list[int]:
    """The strides of all but the last dimension, in units."""
    return [stride // unit for stride in t.stride()[:-1]]


def product_precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as PyTorch is told to multiply matrices."""
    if dtype == torch.float32:
        with contextlib.suppress(RuntimeError):  # raised once PyTorch's newer switches have been used
            return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "ieee"
