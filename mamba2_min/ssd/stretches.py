"""One sequence over several processes: the chunked scan once more, with a process in the place of a chunk.

Each process holds a stretch of the tokens, of any length, in order of rank. What it needs of those before it is

    for the convolution   their last K - 1 inputs,
    for the scan          the state that enters its stretch: (b, h, p, n), whatever the length.

As in ssd_plain, with stretch r in the place of chunk c: (1) each process scans its stretch from an empty state, which
gives y and what the stretch adds to the state, S_r; (2) the pairs (S_r, P_r), P_r the decay over the whole stretch, go
to every process, and H_{r+1} = P_r H_r + S_r is a recurrence of as many steps as there are processes; (3) each token
reads from the state that entered its stretch, decayed up to itself. Gradients take the same ways back.

Our kernels on a GPU do it in another order (ssd/triton.py): step 1 computes the states alone, and after step 2 an
ordinary scan of the stretch begins from the state that enters, so that step 3 is part of it.

A pair is b h (p n + 1) float32 numbers: 6.3 MB per layer at b 8, h 24, p 64, n 128, whether a stretch has a thousand
tokens or a million. Attention would have to send its keys and values, which grow with the stretch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba2_min.ops.autograd import handwritten_backward, widen, without_autocast
from mamba2_min.ssd.plain import log_decay


class Stretch:
    """The processes over which sequences are spread: `group`, of `size` processes, this one at `rank`.

    It holds for all threads: the backward pass of a GPU has a thread of its own, which may compute blocks again.
    """

    group: Any = None
    rank = 0
    size = 1


_here = Stretch()


@contextlib.contextmanager
def spread_over(group: Any) -> Iterator[None]:
    """Within, each sequence is spread over the processes of a torch.distributed group, which all call the same."""
    from torch import distributed as dist

    before = (_here.group, _here.rank, _here.size)
    _here.group, _here.rank, _here.size = group, dist.get_rank(group), dist.get_world_size(group)
    try:
        yield
    finally:
        _here.group, _here.rank, _here.size = before


def is_spread() -> bool:
    """Whether sequences are spread over several processes."""
    return _here.size > 1


class Crossing:
    """How the state of one scan crosses the stretches: step 2, and the way of its gradient, from right to left.

    seq_idx (b, l): the stretch's documents. A state does not enter a stretch that begins with another document than the
    one that the stretch before it ended with.
    """

    def __init__(self, seq_idx: Tensor | None):
        self.group, self.rank, self.size = _here.group, _here.rank, _here.size
        self.goes_on = None if seq_idx is None else _goes_on(seq_idx)

    def forward(self, added: Tensor, decay: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        """added (b, h, p, n), what this stretch adds to the state; decay (b, h), over all of it; initial, the state
        before the whole sequence. Returns the state that enters this stretch, and the one after the whole sequence."""
        every_added, self.decays = _shared(added, self.group), _shared(self._entering(decay), self.group)
        H = entering = initial
        for r in range(self.size):
            if r == self.rank:
                entering = H
            H = self.decays[r][..., None, None] * H + every_added[r]
        return self._entering(entering), H

    def backward(self, read: Tensor, dend: Tensor) -> tuple[Tensor, Tensor]:
        """read: the gradient that reaches the entering state from this stretch's tokens; dend, the one that reaches the
        state after the whole sequence from this process. Returns the gradient of the state that leaves this stretch,
        and that of the initial state, which is the first process's: those of all processes are added up."""
        reads, dends = _shared(self._entering(read), self.group), _shared(dend, self.group)
        G = leaving = dends.sum(0)
        for r in reversed(range(self.size)):
            if r == self.rank:
                leaving = G
            G = self.decays[r][..., None, None] * G + reads[r]
        return leaving, G if self.rank == 0 else torch.zeros_like(G)

    def _entering(self, t: Tensor) -> Tensor:
        """t (b, ...), zero in rows whose state does not enter."""
        return t if self.goes_on is None else t * self.goes_on.view(-1, *[1] * (t.dim() - 1)).to(t.dtype)


def _goes_on(seq_idx: Tensor) -> Tensor:
    """Whether the stretch begins with the document that the one before it ended with: (b,)"""
    ends = _shared(seq_idx[:, -1])
    return seq_idx[:, 0] == ends[_here.rank - 1] if _here.rank else torch.ones_like(ends[0], dtype=torch.bool)


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, added: Tensor, decay: Tensor, initial: Tensor, crossing: Crossing) -> tuple[Tensor, Tensor]:
        entering, end = crossing.forward(added, decay, initial)
        ctx.crossing = crossing
        ctx.save_for_backward(entering)
        return entering, end

    @staticmethod
    @handwritten_backward
    def backward(ctx: Any, read: Tensor, dend: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        (entering,) = ctx.saved_tensors
        leaving, dinitial = ctx.crossing.backward(read, dend)
        return leaving, (leaving * entering).sum((-1, -2)), dinitial, None


@without_autocast
def scan_stretch(
    scan: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """`scan` of the whole sequence, of which x, dt, B, C and seq_idx hold this process's stretch.

    Arguments as for `ssd_plain`; initial_state is that of the whole sequence, the same everywhere. Returns the
    stretch's y, and the state after the whole sequence.
    """
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    y, added = scan(x, dt, A, B, C, D, None, seq_idx, chunk_size=chunk_size)  # step 1
    from_start = log_decay(widen(dt), widen(A), seq_idx).cumsum(1).exp()  # (b, l, h)
    initial = torch.zeros_like(added) if initial_state is None else initial_state.to(added.dtype)
    entering, end = _Cross.apply(added, from_start[:, -1].to(added.dtype), initial, Crossing(seq_idx))  # step 2
    read = torch.einsum(  # step 3
        "blgn,bgkpn,blgk->blgkp",
        C.to(added.dtype),
        entering.view(b, g, h // g, p, n),
        from_start.to(added.dtype).view(b, l, g, h // g),
    )
    return (y + read.reshape(b, l, h, p)).to(y.dtype), end


def inputs_before(u: Tensor, count: int, state: Tensor | None, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
    """The last `count` inputs before this process's stretch, and the last ones of the whole sequence: (b, count, c).

    u (b, l, c): the stretch; state (b, count, c): the inputs before the whole sequence, zeros if None. Inputs of
    another document than the one that follows them are zero.
    """
    b, _, c = u.shape
    if count == 0:
        return u[:, :0], u[:, :0]
    tail = u[:, max(0, u.shape[1] - count) :]
    tail = F.pad(tail, (0, 0, count - tail.shape[1], 0))
    lengths = _shared(torch.tensor([min(u.shape[1], count)]))[:, 0].tolist()  # on the CPU: nobody waits for a GPU
    tails = _gathered(tail.contiguous())
    first = u.new_zeros(b, count, c) if state is None else state.to(u.dtype)
    known = [first, *(tails[r][:, count - length :] for r, length in enumerate(lengths))]
    before, last = torch.cat(known[: _here.rank + 1], 1)[:, -count:], torch.cat(known, 1)[:, -count:]
    # What is not needed here is needed by others: it stays in the graph, for the backward pass to meet everywhere.
    before = before + 0 * torch.cat(known, 1).sum()
    if seq_idx is None:
        return before, last
    edge = torch.cat([seq_idx.new_zeros(b, count), seq_idx], 1)[:, -count:]
    edges, starts = _shared(edge), _shared(seq_idx[:, :1])
    documents = [starts[0].expand(b, count), *(edges[r][:, count - length :] for r, length in enumerate(lengths))]
    ahead = torch.cat(documents[: _here.rank + 1], 1)[:, -count:]
    at_end = torch.cat(documents, 1)[:, -count:]
    return _same_document(before, ahead, seq_idx[:, :1]), _same_document(last, at_end, at_end[:, -1:])


def _same_document(inputs: Tensor, numbers: Tensor, following: Tensor) -> Tensor:
    """The inputs (b, k, c); zero where there is a change of document, numbers (b, k), between one and `following`."""
    same = (torch.cat([numbers, following], 1).diff(dim=1) == 0).flip(1).long().cumprod(1).flip(1).bool()
    return torch.where(same[..., None], inputs, 0)


def _shared(mine: Tensor, group: Any = None) -> Tensor:
    """The tensors of all processes of a group, or of `spread_over`'s, (size, ...), without gradients."""
    from torch import distributed as dist

    group = group or _here.group
    mine = mine.contiguous()
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    return torch.stack(every)


def _gathered(mine: Tensor) -> Tensor:
    """The tensors of all processes, (size, ...); a gradient goes back to the process whose tensor it is for."""
    gathered: Tensor = _Gather.apply(mine)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor) -> Tensor:
        ctx.group, ctx.rank = _here.group, _here.rank
        return _shared(mine)

    @staticmethod
    @handwritten_backward
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        from torch import distributed as dist

        total = gradient.contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.rank]
