"""One sequence over several processes: the chunked scan once more, with a process in the place of a chunk.

Each process holds a stretch of the tokens, of any length, in order of rank. What it needs of those before it is

    for the convolution   their last K - 1 inputs,
    for the scan          the state that enters its stretch: (b, h, p, n), whatever the length.

As in ssd_plain, with stretch r in the place of chunk c: (1) each process scans its stretch from an empty state, which
gives y and what the stretch adds to the state, S_r; (2) the pairs (S_r, P_r), P_r the decay over the whole stretch, go
to every process, and H_{r+1} = P_r H_r + S_r is a recurrence of as many steps as there are processes; (3) each token
reads from the state that entered its stretch, decayed up to itself. Gradients take the same ways back.

A pair is b h (p n + 1) float32 numbers: 6.3 MB per layer at b 8, h 24, p 64, n 128, whether a stretch has a thousand
tokens or a million. Attention would have to send its keys and values, which grow with the stretch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mamba2_min.ops.autograd import widen, without_autocast
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
    a = log_decay(widen(dt), widen(A), seq_idx)
    if seq_idx is not None:
        a = _cut_off(a, seq_idx)
    from_start = a.cumsum(1).exp()  # (b, l, h)
    decay = from_start[:, -1]
    every_added, every_decay = _gathered(added), _gathered(decay)  # (size, b, h, p, n), (size, b, h)

    H = torch.zeros_like(added) if initial_state is None else initial_state.to(added.dtype)  # step 2
    states = [H]
    for r in range(_here.size):
        states.append(every_decay[r][..., None, None] * states[-1] + every_added[r])
    # A sum in which every process has a part, so that every process takes part in the backward pass.
    mine = torch.zeros(_here.size, dtype=added.dtype, device=added.device)
    mine[_here.rank] = 1
    entering = torch.einsum("r,rbhpn->bhpn", mine, torch.stack(states[:-1]))

    read = torch.einsum(  # step 3
        "blgn,bgkpn,blgk->blgkp",
        C.to(added.dtype),
        entering.view(b, g, h // g, p, n),
        from_start.to(added.dtype).view(b, l, g, h // g),
    )
    return (y + read.reshape(b, l, h, p)).to(y.dtype), states[-1]


def inputs_before(u: Tensor, count: int, state: Tensor | None, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
    """The last `count` inputs before this process's stretch, and the last ones of the whole sequence: (b, count, c).

    u (b, l, c): the stretch; state (b, count, c): the inputs before the whole sequence, zeros if None. Inputs of
    another document than the one that follows them are zero.
    """
    b, _, c = u.shape
    if count == 0:
        return u[:, :0], u[:, :0]
    tail = torch.cat([u.new_zeros(b, count, c), u], 1)[:, -count:]
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


def _cut_off(a: Tensor, seq_idx: Tensor) -> Tensor:
    """a with -inf at the stretch's first token, where the stretch before it ended with another document."""
    ends = _shared(seq_idx[:, -1:])
    if _here.rank == 0:
        return a
    changed = seq_idx[:, :1] != ends[_here.rank - 1]  # (b, 1)
    first = torch.zeros(a.shape[:2], dtype=torch.bool, device=a.device)
    first[:, :1] = changed
    return a.masked_fill(first[..., None], -torch.inf)


def _shared(mine: Tensor) -> Tensor:
    """The tensors of all processes, (size, ...), without gradients."""
    from torch import distributed as dist

    every = [torch.empty_like(mine) for _ in range(_here.size)]
    dist.all_gather(every, mine.contiguous(), group=_here.group)
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
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        from torch import distributed as dist

        total = gradient.contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.rank]
