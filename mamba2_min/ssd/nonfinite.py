"""NaN and infinity stay where they belong: they never reach another document, nor an earlier token.

A matrix product hides a later token, or another document's, by a zero. But 0 times NaN is NaN. So where the values on a
CPU are not all finite, the scan runs on inputs without them, and what depends on them becomes NaN afterwards: the
outputs of the same document and head from there on, and the state if that document is the last one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mamba2_min.ops.autograd import is_traced
from mamba2_min.ops.seq_idx import document_numbers
from mamba2_min.ssd.arguments import check


def contained(scan: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`scan`, a form of the map with the arguments of `ssd_plain`, such that NaN and infinity in x, dt, B, C or
    initial_state stay in their document and head, and after their token.

    No gradient flows through an output that is NaN for this reason. The values are looked at on a CPU only: on a GPU
    that would wait for the device, and a compiler, or a transform of torch.func, cannot look.
    """

    @functools.wraps(scan)
    def run(x, dt, A, B, C, D=None, initial_state=None, seq_idx=None, *args, **kwargs):
        if x.device.type != "cpu" or torch.compiler.is_compiling() or is_traced():
            return scan(x, dt, A, B, C, D, initial_state, seq_idx, *args, **kwargs)
        if all(t is None or _is_finite(t) for t in (x, dt, B, C, initial_state)):
            return scan(x, dt, A, B, C, D, initial_state, seq_idx, *args, **kwargs)
        check(x, dt, A, B, C, D, initial_state, seq_idx)
        clean = [t if t is None else t.masked_fill(~t.isfinite(), 0) for t in (x, dt, B, C, initial_state)]
        y, state = scan(*clean[:2], A, *clean[2:4], D, clean[4], seq_idx, *args, **kwargs)
        in_y, in_state = _reached(x, dt, B, C, initial_state, seq_idx)
        return y.masked_fill(in_y[..., None], torch.nan), state.masked_fill(in_state[..., None, None], torch.nan)

    return run


def _is_finite(t: Tensor) -> bool:
    """Whether the sum is: faster than to look at each value. (Huge values may exceed it; then the careful way runs.)"""
    return bool(t.detach().sum().isfinite())


def _reached(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The outputs (b, l, h) and final states (b, h) that depend on a value that is not finite."""
    b, l, h, _ = x.shape
    written, read = (~t.isfinite().all(-1).repeat_interleave(h // t.shape[2], 2) for t in (B, C))  # (b, l, h)
    written = written | ~x.isfinite().all(-1) | ~dt.isfinite()
    if initial_state is not None:
        written[:, 0] |= ~initial_state.isfinite().flatten(2).all(-1)
    document = document_numbers(seq_idx, b, l, x.device)
    at = torch.arange(l, device=x.device)
    starts = torch.where(document.diff(dim=1, prepend=document[:, :1] - 1) > 0, at, 0).cummax(1).values  # (b, l)
    last = torch.where(written, at[:, None], -1).cummax(1).values  # (b, l, h), the last token that wrote one
    in_state = last >= starts[..., None]
    return in_state | read, in_state[:, -1]
