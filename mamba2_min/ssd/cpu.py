"""The chunked scan for CPUs: decays are separated where that is safe; otherwise the plain scan runs, in parts.

Within a chunk, token i sees token j through exp(s_i - s_j), where s is the cumulative sum of a = dt A from the chunk's
start. With m, about half of the chunk's sum, this is a product of two numbers,

    exp(s_i - s_j) = exp(s_i - m) exp(m - s_j)          `rise` of what token i reads, `fall` of what token j writes

so that no (q, q) matrix per head is formed: G = C B^T is computed once per group, and all heads of a group go through
one matrix product. Both factors lie in exp(-60) to exp(60) as long as a chunk decays by at most exp(-120); a chunk that
decays by more is cut into halves or quarters.

With X_j = exp(m - s_j) dt_j x_j, and S = exp(m) H for the state H that enters, a chunk is three products (section 6):

    y  = exp(s - m) (G X + C S) + D x                   steps 3 and 4 of plain.py
    H' = exp(s_q - m) (S + B^T X)                       steps 1 and 2: the state that leaves

m is rounded so that exp(m) is a power of two: multiplying by it is exact, so no token changes a bit of earlier outputs.

Letters as in plain.py, with c chunks per sequence and heads as (g, r). The state is (n, p) here, so that the heads of a
group stand side by side in one matrix.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba2_min.ops.autograd import handwritten_backward, no_compile, widest
from mamba2_min.ops.seq_idx import document_numbers
from mamba2_min.ssd import parts
from mamba2_min.ssd.arguments import Shape, pad_to_chunks, to_inner, to_outer

# The most that a chunk and a token may decay by, as exponents, for decays to be separated. exp(60) is 1e26, which
# leaves float32 and bf16 room for values up to 1e12. A token's bound is for the gradient of its decay, a difference of
# sums: it loses the little that is left after a token that forgets nearly everything.
_LEAST_CHUNK, _LEAST_TOKEN = -120.0, -8.0

_CACHE_ELEMENTS = 1 << 18  # of one intermediate: what stays in a core's second-level cache
_COMPILED_CHUNKS = 16  # per compiled call: their loop is unrolled, and the compiler's code for 64 is slow
_PLAIN_CHUNK = 64  # of the plain scan: longer chunks are slower


def supports(device: torch.device, dtype: torch.dtype, shape: Shape) -> bool:
    """Everything on a CPU."""
    return device.type == "cpu"


def scan(x, dt, A, B, C, D, initial_state, seq_idx, chunk_size):
    """As every scan of `ssd.SCANS`. Heads whose decays cannot be separated go through the plain scan."""
    return _scan(x, dt, A, B, C, D, initial_state, seq_idx, chunk_size, torch.compiler.is_compiling())


@no_compile  # data-dependent branch; cannot be traced
def _scan(x, dt, A, B, C, D, initial_state, seq_idx, chunk_size, compiled):
    g, plain_chunk = B.shape[2], min(chunk_size, _PLAIN_CHUNK)
    q, heads = separable(dt, A, g, min(chunk_size, x.shape[1]))
    if heads.all():
        return _separated(x, dt, A, B, C, D, initial_state, seq_idx, q, compiled)
    if not heads.any():
        return parts.scan(x, dt, A, B, C, D, initial_state, seq_idx, plain_chunk)
    # All heads at once, with the others at rest; then the others alone, in their place.
    others = ~heads
    at_rest = dt.masked_fill(others, 0), A.masked_fill(others, 0)
    y, state = _separated(x, *at_rest, B, C, D, initial_state, seq_idx, q, compiled)
    if g > 1:
        groups = others.view(g, -1)[:, 0].nonzero()[:, 0]
        B, C = B[:, :, groups], C[:, :, groups]
    at = others.nonzero()[:, 0]
    D = None if D is None else D[at]
    ys, states = parts.scan(x[:, :, at], dt[:, :, at], A[at], B, C, D, initial_state[:, at], seq_idx, plain_chunk)
    return y.index_copy(2, at, ys), state.index_copy(1, at, states)


def separable(dt: Tensor, A: Tensor, g: int, q: int) -> tuple[int, Tensor]:
    """A chunk of q, q / 2 or q / 4 tokens, and the heads, (h,) bool, whose decays may be separated in such chunks.

    Heads that do not fit a quarter are left out, and the chunk is the largest that serves all others. The heads of a
    group stay together.
    """
    with torch.no_grad():
        a = dt * A
        tokens = a.amin((0, 1)) >= _LEAST_TOKEN  # False where one is NaN
        heads = tokens & _fits(a, q)
        if heads.all():
            return q, heads
        heads = tokens & _fits(a, -(-q // 4))
        if g > 1:
            heads = heads.view(g, -1).all(1, keepdim=True).expand(g, len(A) // g).flatten()
        for size in (q, -(-q // 2)):
            if (_fits(a, size) | ~heads).all():
                return size, heads
        return -(-q // 4), heads


def _fits(a: Tensor, q: int) -> Tensor:
    """The heads, (h,) bool, of which no chunk of q tokens decays by more than can be separated."""
    l = a.shape[1]
    a = a if l % q == 0 else F.pad(a, (0, 0, 0, -l % q))
    return a.unflatten(1, (-1, q)).sum(2).amin((0, 1)) >= _LEAST_CHUNK


def _separated(x, dt, A, B, C, D, initial_state, seq_idx, q, compiled):
    b, l = x.shape[:2]
    segment = None if seq_idx is None else document_numbers(seq_idx, b, l, x.device)
    x, dt, B, C, segment = pad_to_chunks(q, x, dt, B, C, segment)
    if compiled and segment is None:
        y, state = compiled_scan(x, dt, A, B, C, D, initial_state, q, _compiled(), _COMPILED_CHUNKS)
    else:
        y, state = SeparableScan.apply(x, dt, A, B, C, D, initial_state, segment, q)
    return y[:, :l], state


class SeparableScan(torch.autograd.Function):
    """The scan where every chunk's decays can be separated. It keeps the inputs and S of each chunk."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial_state, segment, q):
        b, l, h, p = x.shape
        g, n = B.shape[2:]
        c = l // q
        f = ChunkTerms(x, dt, A, B, C, D, segment, q)
        states = x.new_empty(b, c, g, n, h // g, p, dtype=dt.dtype)  # S of each chunk
        states[:, 0] = to_inner(initial_state, g)
        f.scale(states[:, 0], slice(None), 0)
        final = torch.empty_like(states[:, 0])  # H, as it leaves the last chunk
        y = x.new_empty(b, c, q, g, h // g, p)
        for rows, chunks in _cache_blocks(b, c, q * h * p):
            at = rows, chunks
            t = Block(f, at)
            added = _matmul(t.B_to_end.mT, t.X).unflatten(-1, (-1, p))
            for k in range(chunks.start, chunks.stop):
                state = states[rows, k] if f.keep is None else states[rows, k] * f.keep[rows, k]
                after = states[rows, k + 1] if k + 1 < c else final[rows]
                torch.mul(added[:, k - chunks.start].add_(state), f.leave[rows, k], out=after)
                if k + 1 < c:
                    f.scale(after, rows, k + 1)
            read = t.read(states[at]).mul_(f.rise[at])
            torch.addcmul(read, t.x, t.skip, out=y[at].transpose(2, 3))
        ctx.save_for_backward(x, dt, A, B, C, D, states, segment)
        ctx.q = q
        return y.view(b, l, h, p), to_outer(final)

    @staticmethod
    @handwritten_backward
    def backward(ctx, dy, dfinal):
        x, dt, A, B, C, D, states, segment = ctx.saved_tensors
        b, l, h, p = x.shape
        g, n = B.shape[2:]
        q = ctx.q
        c = l // q
        f = ChunkTerms(x, dt, A, B, C, D, segment, q)
        dys = _by_group(dy, q, g)
        # The gradient of the state that leaves a chunk, from the last chunk to the first. Written to, so always a copy.
        dstate = to_inner(dfinal, g).clone(memory_format=torch.contiguous_format)
        dx, dB, dC = x.new_empty(b, c, q, g, h // g, p), B.new_empty(b, c, q, g, n), C.new_empty(b, c, q, g, n)
        direct, net, written, skipped = (torch.empty_like(f.dt) for _ in range(4))  # (b, c, g, q, r)
        carried = dt.new_empty(b, c, g, 1, h // g)
        for rows, chunks in reversed(list(_cache_blocks(b, c, q * h * p))):
            at = rows, chunks
            t, S, dY = Block(f, at), states[at], dys[at].to(dt.dtype)
            dread = (dY * f.rise[at]).flatten(-2)

            # The states' gradients: `dleft` of what leaves a chunk; what enters it is what leaves the one before.
            dentered = _matmul(t.C_from_start.mT, dread).unflatten(-1, (-1, p))
            dleft = torch.empty_like(dentered)
            dleft[:, -1] = dstate[rows]
            for k in reversed(range(chunks.start, chunks.stop)):
                i = k - chunks.start
                leave = f.leave[rows, k] if f.keep is None else f.leave[rows, k] * f.keep[rows, k]
                before = dleft[:, i - 1] if i else dstate[rows]
                f.scale(torch.addcmul(dentered[:, i], dleft[:, i], leave, out=before), rows, k)
            dadded = dleft.mul_(f.leave[at])
            carried[at] = (dadded * S).sum((-3, -1))[..., None, :]
            dadded = dadded.flatten(-2)

            # The gradients by B and C: through G, whose diagonal is apart, and through the states.
            skipped[at] = (dY * t.x).sum(-1)
            dG = t.mask(_matmul(dread, t.X.mT))
            dG.diagonal(dim1=-2, dim2=-1).copy_((skipped[at] * f.dt[at]).sum(-1))
            dC[at] = (t.from_start(_matmul(dread, S.flatten(-2).mT)) + _matmul(dG, t.B)).transpose(2, 3)
            dB[at] = (t.to_end(_matmul(t.X, dadded.mT)) + _matmul(dG.mT, t.C)).transpose(2, 3)

            # The gradient by x: first through later tokens of the chunk, then through the state that leaves as well.
            dX = _matmul(t.G.mT, dread).unflatten(-1, (-1, p))
            inside = (dX * t.x).sum(-1).mul_(f.fall[at])
            _add_matmul(dX.flatten(-2), t.B_to_end, dadded)
            total = (dX * t.x).sum(-1).mul_(f.fall[at])
            direct[at] = (skipped[at] * t.diagonal).add_(total)
            torch.addcmul(dX.mul_(f.fall_dt[at]), dY, t.skip, out=dx[at].transpose(2, 3))

            # The gradient by s_i: what token i reads of others, less what later ones of the chunk read of it.
            read = t.read(S).flatten(-2).mul_(dread).unflatten(-1, (-1, p))
            net[at] = read.sum(-1).addcmul_(inside, f.dt[at], value=-1)
            written[at] = total.sub_(inside).mul_(f.dt[at])

        # a_k decays what tokens from k on read of earlier ones, and what leaves of these and of the state that enters.
        if f.keep is not None:
            carried *= f.keep[..., 0]
        da = (f.sum_to_end(net) + (written.cumsum(3, dtype=widest(dt.device)) - written) + carried).to(dt.dtype)
        ddt = direct.addcmul(da, A.view(g, 1, -1))
        return (
            dx.view(b, l, h, p),
            ddt.transpose(2, 3).reshape(b, l, h),
            (da * f.dt).sum((0, 1, 3)).view(h),
            dB.view(b, l, g, n),
            dC.view(b, l, g, n),
            None if D is None else skipped.sum((0, 1, 3)).view(h),
            to_outer(dstate) if ctx.needs_input_grad[6] else None,
            None,
            None,
        )


def whole_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor, q: int
) -> tuple[Tensor, Tensor]:
    """`SeparableScan` for one document per row, in whole tensors and with autograd's backward pass, for a compiler.

    Compiled, it takes two thirds of the time of `SeparableScan`, whose parts are laid out by hand.
    """
    (b, l, h, p), g, wide = x.shape, B.shape[2], dt.dtype
    dt, x_wide = _by_group(dt, q, g), _by_group(x, q, g).to(wide)
    B, C = (t.unflatten(1, (-1, q)).transpose(2, 3).to(wide) for t in (B, C))
    s = _sums(dt, A, g)
    m = _middle(s)
    from_start, to_end = (t.exp().to(wide)[..., None] for t in (s, s[:, :, :, -1:] - s))
    rise, fall = (s.exp() * torch.exp2(-m)).to(wide)[..., None], ((-s).exp() * torch.exp2(m)).to(wide)
    added = (B.mT @ (x_wide * (to_end * dt[..., None])).flatten(-2)).unflatten(-1, (-1, p))
    state, states = to_inner(initial_state, g), []
    for k in range(l // q):
        states.append(state)
        state = state * from_start[:, k, :, -1:] + added[:, k]
    read = (C @ torch.stack(states, 1).flatten(-2)).unflatten(-1, (-1, p))
    inside = ((C @ B.mT).tril(-1) @ (x_wide * (fall * dt)[..., None]).flatten(-2)).unflatten(-1, (-1, p))
    skip = (C * B).sum(-1, keepdim=True) * dt
    skip = skip if D is None else skip + D.view(g, 1, -1)
    y = read * from_start + inside * rise + x_wide * skip[..., None]
    return y.transpose(2, 3).reshape(b, l, h, p).to(x.dtype), to_outer(state)


def compiled_scan(x, dt, A, B, C, D, state, q, compiled: Callable, most: int) -> tuple[Tensor, Tensor]:
    """`whole_scan`, as `compiled`, for at most `most` chunks at a time."""
    chunks = x.shape[1] // q
    size = -(-chunks // -(-chunks // most)) * q  # of equal parts, as far as possible: every size is compiled separately
    if torch.is_grad_enabled() and size < x.shape[1] and not state.requires_grad:
        state = state.detach().requires_grad_()  # as the state is that the first part leaves to the next
    ys = []
    for x_, dt_, B_, C_ in zip(*(t.split(size, dim=1) for t in (x, dt, B, C)), strict=True):
        y, state = compiled(x_, dt_, A, B_, C_, D, state, q)
        ys.append(y)
    return torch.cat(ys, dim=1), state


@functools.cache
def _compiled() -> Callable:
    return torch.compile(whole_scan, dynamic=False)


def _sums(dt: Tensor, A: Tensor, g: int) -> Tensor:
    """s, the sums of dt A from each chunk's start, for dt (b, c, g, q, r): of that shape, in float64."""
    return (dt * A.view(g, 1, -1)).cumsum(3, dtype=widest(dt.device))


def _middle(s: Tensor) -> Tensor:
    """m / log(2), an integer: (b, c, g, 1, r). For gradients it is a constant: no result depends on it."""
    return (s[:, :, :, -1:].detach() / math.log(4)).round()


class ChunkTerms:
    """What the products of all chunks are made of. Tensors are (b, c, g, q, ...)."""

    def __init__(self, x, dt, A, B, C, D, segment, q):
        g = B.shape[2]
        self.dt, self.x = _by_group(dt, q, g), _by_group(x, q, g)  # (b, c, g, q, r) and (b, c, g, q, r, p)
        self.B, self.C = (t.unflatten(1, (-1, q)).transpose(2, 3) for t in (B, C))  # (b, c, g, q, n)
        self.D = None if D is None else D.view(g, 1, -1)
        s = _sums(self.dt, A, g)
        rise, self.fall, self.enter = s.exp(), (-s).exp(), None
        if s[:, :, :, -1].amin() < _LEAST_CHUNK / 2:  # else all of them are well within range, and m = 0 is faster
            m = _middle(s)
            rise, self.fall = rise * torch.exp2(-m), self.fall * torch.exp2(m)
            self.enter = torch.exp2(m).to(dt.dtype)[..., None]  # exp(m), (b, c, g, 1, r, 1)
        self.rise, self.fall = rise.to(dt.dtype)[..., None], self.fall.to(dt.dtype)
        self.leave = self.rise[:, :, :, -1:]  # exp(s_q - m), (b, c, g, 1, r, 1)
        self.fall_dt = (self.fall * self.dt)[..., None]
        self.segment = self.keep = None
        if segment is not None:
            seg = self.segment = segment.view(len(x), -1, q)
            before = torch.cat([seg.new_zeros(len(x), 1), seg[:, :-1, -1]], dim=1)[..., None]  # the document so far
            self.same = (seg[..., :, None] == seg[..., None, :])[:, :, None]  # (b, c, 1, q, q)
            self.to_end = (seg == seg[..., -1:])[:, :, None, :, None]  # (b, c, 1, q, 1)
            self.from_start = (seg == before)[:, :, None, :, None]
            self.keep = self.from_start[..., -1:, :, None].to(dt.dtype)  # 1 where the state is carried across

    def scale(self, state: Tensor, rows: slice, k: int) -> None:
        """Multiplies the states that enter chunk k of these rows by exp(m), in place."""
        if self.enter is not None:
            state.mul_(self.enter[rows, k])

    def sum_to_end(self, net: Tensor) -> Tensor:
        """The sum of net (b, c, g, q, r) from a token to the end of its document or chunk, in float64: terms cancel."""
        sums = net.flip(3).cumsum(3, dtype=widest(net.device)).flip(3)
        if self.segment is None:
            return sums
        # Where a document ends within the chunk, the sum over what follows is subtracted: exactly, as it is the same.
        ends = (self.segment[..., None, :] <= self.segment[..., :, None]).sum(-1)  # (b, c, q): where the next begins
        after = torch.cat([sums, torch.zeros_like(sums[:, :, :, :1])], dim=3)
        return sums - after.gather(3, ends[:, :, None, :, None].expand_as(net))


class Block:
    """The factors of the products of some chunks, `at` (rows, chunks), in dt's dtype."""

    def __init__(self, f: ChunkTerms, at: tuple[slice, slice]):
        self._f, self._at = f, at
        self.x, self.B, self.C = (t[at].to(f.dt.dtype) for t in (f.x, f.B, f.C))
        self.X = (self.x * f.fall_dt[at]).flatten(-2)  # exp(m - s_j) dt_j x_j, (b, c, g, q, r p)
        self.B_to_end, self.C_from_start = self.to_end(self.B), self.from_start(self.C)
        G = _matmul(self.C, self.B.mT)
        self.diagonal = G.diagonal(dim1=-2, dim2=-1)[..., None].clone()  # C_i . B_i, (b, c, g, q, 1)
        self.G = self.mask(G)
        skip = self.diagonal * f.dt[at]
        self.skip = (skip if f.D is None else skip + f.D)[
            ..., None
        ]  # what y has of a token's own x, (b, c, g, q, r, 1)

    def mask(self, G: Tensor) -> Tensor:
        """G (b, c, g, q, q) where token i sees an earlier token j, else 0."""
        return (G if self._f.segment is None else G * self._f.same[self._at]).tril_(-1)

    def to_end(self, t: Tensor) -> Tensor:
        """Zero for a token whose document ends within the chunk: it does not reach the state that leaves."""
        return t if self._f.segment is None else t * self._f.to_end[self._at]

    def from_start(self, t: Tensor) -> Tensor:
        """Zero for a token whose document begins within the chunk: it does not see the state that enters."""
        return t if self._f.segment is None else t * self._f.from_start[self._at]

    def read(self, S: Tensor) -> Tensor:
        """G X + C S, for S (b, c, g, n, r, p): (b, c, g, q, r, p)."""
        y = _matmul(self.C_from_start, S.flatten(-2))
        _add_matmul(y, self.G, self.X)
        return y.unflatten(-1, S.shape[-2:])


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for each (b, c, g)."""
    return torch.bmm(a.flatten(0, 2), b.flatten(0, 2)).unflatten(0, a.shape[:3])


def _add_matmul(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b for each (b, c, g)."""
    torch.baddbmm(out.flatten(0, 2), a.flatten(0, 2), b.flatten(0, 2), out=out.flatten(0, 2))


def _cache_blocks(b: int, c: int, elements: int) -> Iterator[tuple[slice, slice]]:
    """(rows, chunks) slices for which an intermediate, of `elements` per chunk, stays within the cache: several whole
    rows, or the chunks of one row a few at a time, from left to right."""
    size = max(1, _CACHE_ELEMENTS // elements)
    for i in range(0, b, max(1, size // c)):
        rows = slice(i, min(b, i + max(1, size // c)))
        for k in range(0, c, size):
            yield rows, slice(k, min(c, k + size))


def _by_group(t: Tensor, q: int, g: int) -> Tensor:
    """(b, l, h) or (b, l, h, p) -> (b, c, g, q, r) or (b, c, g, q, r, p), a view."""
    return t.unflatten(1, (-1, q)).unflatten(3, (g, -1)).transpose(2, 3)
