"""The arguments that every form of the scan takes: their shapes are checked here, once for all forms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Shape(NamedTuple):
    """The sizes of a scan, in the letters of plain.py; q is the largest chunk that the caller asks for."""

    b: int
    l: int
    h: int
    p: int
    g: int
    n: int
    q: int


def check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = 1,
) -> Tensor:
    """The state to start from: `initial_state` or zeros, (b, h, p, n), in the dtype in which the scan computes.

    That is the wider of x's and the state's dtype, and at least float32.
    Raises ValueError where a shape does not fit the others, or chunk_size is not an integer >= 1.
    """
    if x.dim() != 4 or x.shape[1] < 1:
        raise ValueError(f"x must be (b, l, h, p) with l >= 1, not {tuple(x.shape)}")
    b, l, h, p = x.shape
    if B.dim() != 4 or B.shape[:2] != (b, l) or B.shape[2] < 1 or h % B.shape[2]:
        raise ValueError(f"B must be (b, l, g, n) = ({b}, {l}, g, n) with g a divisor of h = {h}, not {tuple(B.shape)}")
    n = B.shape[3]
    expected = {
        "dt": (dt, (b, l, h)),
        "A": (A, (h,)),
        "C": (C, tuple(B.shape)),
        "D": (D, (h,)),
        "initial_state": (initial_state, (b, h, p, n)),
        "seq_idx": (seq_idx, (b, l)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, not {tuple(tensor.shape)}")
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be an integer >= 1, not {chunk_size!r}")
    wide = torch.promote_types(x.dtype, torch.float32)
    if initial_state is None:
        return x.new_zeros(b, h, p, n, dtype=wide)
    return initial_state.to(torch.promote_types(wide, initial_state.dtype))


def pad_to_chunks(
    q: int, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, segment: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The arguments with their length l extended to a multiple of q, by tokens of dt = 0.

    Such a token neither decays the state nor adds to it. It belongs to the last document: segment (b, l) has the
    document's number for each token, or is None.
    """
    pad = -x.shape[1] % q
    if not pad:
        return x, dt, B, C, segment
    x, B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x, B, C))
    if segment is not None:
        segment = torch.cat([segment, segment[:, -1:].expand(-1, pad)], dim=1)
    return x, F.pad(dt, (0, 0, 0, pad)), B, C, segment


def to_inner(state: Tensor, g: int) -> Tensor:
    """(b, h, p, n) -> (b, g, n, r, p), a view: the heads of a group side by side, as one matrix of n rows."""
    return state.unflatten(1, (g, -1)).permute(0, 1, 4, 2, 3)


def to_outer(state: Tensor) -> Tensor:
    """(b, g, n, r, p) -> (b, h, p, n), contiguous, in memory of its own."""
    return state.permute(0, 1, 3, 4, 2).clone(memory_format=torch.contiguous_format).flatten(1, 2)
