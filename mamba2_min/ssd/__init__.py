"""State-space duality: one linear map, computed in several ways. Read plain.py first.

`ssd_recurrent`, `ssd_step`, `ssd_quadratic` and `ssd_plain` are that file's four forms; `ssd_chunked` is what training
uses, the first scan of SCANS that supports the tensors at hand.

To add a kernel: write a module with these two functions, import it here, and give it a line in SCANS.

    supports(device, dtype, shape) -> bool
        Whether `scan` is the one to use, told without values. dtype is that of x, B and C; shape is a `Shape`.
    scan(x, dt, A, B, C, D, initial_state, seq_idx, chunk_size) -> (y, final_state)
        The map. All arguments are positional, their shapes fit, and autocast is off. x, B and C have one dtype; dt, A,
        D and the states have that dtype or float32, whichever is wider. D and seq_idx may be None, the other tensors
        not; any strides. y has x's dtype, and what is returned shares no memory with the arguments.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mamba2_min.ops.autograd import is_traced, without_autocast
from mamba2_min.ssd import cpu, cuda, parts, triton
from mamba2_min.ssd.arguments import Shape, check
from mamba2_min.ssd.nonfinite import contained
from mamba2_min.ssd.plain import ssd_plain, ssd_quadratic, ssd_recurrent, ssd_step

__all__ = [
    "SCANS",
    "Shape",
    "chosen",
    "ssd_chunked",
    "ssd_plain",
    "ssd_quadratic",
    "ssd_recurrent",
    "ssd_step",
    "using",
]

# The first that supports the tensors runs. "plain" is `ssd_plain` with the memory of a few chunks: the last resort.
SCANS: dict[str, tuple[Callable[[torch.device, torch.dtype, Shape], bool], Callable[..., tuple[Tensor, Tensor]]]] = {
    "triton": (triton.supports, triton.scan),
    "cuda": (cuda.supports, cuda.scan),
    "cpu": (cpu.supports, cpu.scan),
    "plain": (parts.supports, parts.scan),
}


@without_autocast
@contained
def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The chunked scan (section 6), by the fastest scan there is for these tensors: linear time; what training uses.

    Arguments, results and errors as for `ssd_plain`. Between forward and backward it keeps the inputs and some states,
    O(l p + l n p / q) per head, and no (q, q) matrix. (Compiled on a CPU, it keeps what the compiler chooses to.) Its
    gradients have no gradients of their own, in most scans: asking for them is a RuntimeError.
    """
    state, narrow = check(x, dt, A, B, C, D, initial_state, seq_idx, chunk_size), x.dtype
    wide = state.dtype
    dtype = torch.promote_types(torch.promote_types(x.dtype, B.dtype), C.dtype)
    if torch.promote_types(dtype, torch.float32) != wide:
        dtype = wide  # a float64 state, or a float64 x: then everything is
    x, B, C = x.to(dtype), B.to(dtype), C.to(dtype)
    D = None if D is None else D.to(wide)
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    scan = _pick(x.device, dtype, Shape(b, l, h, p, g, n, chunk_size))
    y, state = scan(x, dt.to(wide), A.to(wide), B, C, D, state, seq_idx, chunk_size)
    return y.to(narrow), state


class _Forced(threading.local):
    """A name per thread. Not a context variable: a compiler can trace this, and traces again when the name changes."""

    name: str | None = None


_forced = _Forced()


def using(name: str) -> contextlib.AbstractContextManager[None]:
    """A context in which every `ssd_chunked` of this thread runs SCANS[name], whether it is the fastest or not.

    Raises ValueError for an unknown name.
    """
    if name not in SCANS:
        raise ValueError(f"unknown scan {name!r}; there are {', '.join(SCANS)}")
    return _forcing(name)


@contextlib.contextmanager
def _forcing(name: str) -> Iterator[None]:
    before, _forced.name = _forced.name, name
    try:
        yield
    finally:
        _forced.name = before


def _pick(device: torch.device, dtype: torch.dtype, shape: Shape) -> Callable[..., tuple[Tensor, Tensor]]:
    # The scans of the table ask for values, or have backward passes written by hand.
    if _forced.name is None and (is_traced() or shape.b == 0 or device.type == "meta"):
        return _without_chunk_size if isinstance(shape.l, torch.SymInt) else ssd_plain
    return SCANS[chosen(device, dtype, shape)][1]


def chosen(device: torch.device, dtype: torch.dtype, shape: Shape) -> str:
    """The name of the scan that `ssd_chunked` runs for such tensors, where nothing is traced."""
    if _forced.name is not None:
        return _forced.name
    for name, (supports, _) in SCANS.items():
        if supports(device, dtype, shape):
            return name
    raise AssertionError("unreachable: the last scan supports everything")


def _without_chunk_size(*args: Any) -> tuple[Tensor, Tensor]:
    """`ssd_quadratic`: what is exported for any length must not loop over chunks."""
    return ssd_quadratic(*args[:-1])
