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

m is rounded so that exp(m) is a power of two. Multiplying by it is exact, and a token changes no bit of earlier outputs.

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
from mamba2_min.ssd.arguments import Shape, pad_to_chunks

# The most that a chunk and a token may decay by, as exponents, for decays to be separated. exp(60) is 1e26, which
# leaves float32 and bf16 room for values up to 1e12. A token's bound is for the gradient of its decay, a difference of
# sums: it loses the little that is left after a token that forgets nearly everything.
_LEAST_CHUNK, _LEAST_TOKEN = -120.0, -8.0

_CACHE_ELEMENTS = 1 << 18  # of one intermediate: what stays in a core's second-level cache
_COMPILED_CHUNKS = 16  # per compiled call: their recurrence is unrolled, and the compiler's code for 64 is slow
_PLAIN_CHUNK = 64  # of the plain scan: longer chunks are slower


def supports(device: torch.device, dtype: torch.dtype, shape: Shape) -> bool:
    return device.type == "cpu"


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as for every scan of `ssd.SCANS`."""
    return _scan(x, dt, A, B, C, D, initial_state, seq_idx, chunk_size, torch.compiler.is_compiling())


@no_compile  # data-dependent branch; cannot be traced
def _scan(x, dt, A, B, C, D, initial_state, seq_idx, chunk_size, compiled):
    g = B.shape[2]
    q, heads = separable(dt, A, g, min(chunk_size, x.shape[1]))
    if heads.all():
        return _separated(x, dt, A, B, C, D, initial_state, seq_idx, q, compiled)
    if not heads.any():
        return parts.scan(x, dt, A, B, C, D, initial_state, seq_idx, min(chunk_size, _PLAIN_CHUNK))
    y, state = _separated(x, dt.masked_fill(~heads, 0), A, B, C, D, initial_state, seq_idx, q, compiled)
    left = (~heads).nonzero()[:, 0]
    if g > 1:
        groups = (~heads.view(g, -1)[:, 0]).nonzero()[:, 0]
        B, C = B[:, :, groups], C[:, :, groups]
    D = None if D is None else D[left]
    x, dt, A, initial_state = x[:, :, left], dt[:, :, left], A[left], initial_state[:, left]
    ys, states = parts.scan(x, dt, A, B, C, D, initial_state, seq_idx, min(chunk_size, _PLAIN_CHUNK))
    return y.index_copy(2, left, ys), state.index_copy(1, left, states)


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
        y, state = compiled_scan(x, dt, A, B, C, D, initial_state, q)
    else:
        y, state = SeparableScan.apply(x, dt, A, B, C, D, initial_state, segment, q)
    return y[:, :l], state


class SeparableScan(torch.autograd.Function):
    """The scan where every chunk's decays can be separated. It keeps the inputs and the state at each chunk's start."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial_state, segment, q):
        b, l, h, p = x.shape
        g, n = B.shape[2:]
        c = l // q
        f = ChunkTerms(x, dt, A, B, C, D, segment, q)
        states = x.new_empty(b, c, g, n, h // g, p, dtype=dt.dtype)  # S of each chunk
        states[:, 0] = _to_inner(initial_state, g)
        f.scaled(states[:, 0], slice(None), 0)
        final = torch.empty_like(states[:, 0])  # H, as it leaves the last chunk
        y = x.new_empty(b, c, q, g, h // g, p)
        for rows, chunks in _cache_blocks(b, c, q * h * p):
            at = rows, chunks
            X = f.inputs(at)
            added = f.matmul(f.B_to_end(at).mT, X).unflatten(-1, (-1, p))
            for k in range(chunks.start, chunks.stop):
                state = states[rows, k] if f.keep is None else states[rows, k] * f.keep[rows, k]
                after = states[rows, k + 1] if k + 1 < c else final[rows]
                torch.mul(added[:, k - chunks.start].add_(state), f.leave[rows, k], out=after)
                if k + 1 < c:
                    f.scaled(after, rows, k + 1)
            G, diagonal = f.scores(at)
            read = f.read(at, G, X, states[at]).mul_(f.rise[at])
            torch.addcmul(read, f.x(at), f.skip(at, diagonal), out=y[at].transpose(2, 3))
        ctx.save_for_backward(x, dt, A, B, C, D, states, segment)
        ctx.q = q
        return y.view(b, l, h, p), _to_outer(final)

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
        dstate = _to_inner(dfinal, g).clone(memory_format=torch.contiguous_format)
        dx, dB, dC = x.new_empty(b, c, q, g, h // g, p), B.new_empty(b, c, q, g, n), C.new_empty(b, c, q, g, n)
        direct, net, written, skipped = (torch.empty_like(f.dt) for _ in range(4))  # (b, c, g, q, r)
        carried = dt.new_empty(b, c, g, 1, h // g)
        for rows, chunks in reversed(list(_cache_blocks(b, c, q * h * p))):
            at = rows, chunks
            xs, X, S = f.x(at), f.inputs(at), states[at]
            G, diagonal = f.scores(at)
            dY = dys[at].to(dt.dtype)
            dread = (dY * f.rise[at]).flatten(-2)

            # The states' gradients: `dleft` of what leaves a chunk; what enters it is what leaves the one before.
            dentered = f.matmul(f.C_from_start(at).mT, dread).unflatten(-1, (-1, p))
            dleft = torch.empty_like(dentered)
            dleft[:, -1] = dstate[rows]
            for k in reversed(range(chunks.start, chunks.stop)):
                i = k - chunks.start
                leave = f.leave[rows, k] if f.keep is None else f.leave[rows, k] * f.keep[rows, k]
                before = dleft[:, i - 1] if i else dstate[rows]
                f.scaled(torch.addcmul(dentered[:, i], dleft[:, i], leave, out=before), rows, k)
            dadded = dleft.mul_(f.leave[at])
            carried[at] = (dadded * S).sum((-3, -1))[..., None, :]
            dadded = dadded.flatten(-2)

            skipped[at] = (dY * xs).sum(-1)
            dG = f.mask(at, f.matmul(dread, X.mT))
            dG.diagonal(dim1=-2, dim2=-1).copy_((skipped[at] * f.dt[at]).sum(-1))
            dC_ = f.from_start(at, f.matmul(dread, S.flatten(-2).mT)) + f.matmul(dG, f.B[at])
            dB_ = f.to_end(at, f.matmul(X, dadded.mT)) + f.matmul(dG.mT, f.C[at])
            dC[at], dB[at] = dC_.transpose(2, 3), dB_.transpose(2, 3)
            # The gradient by x: first through later tokens of the chunk, then through the state that leaves as well.
            dX = f.matmul(G.mT, dread).unflatten(-1, (-1, p))
            inside = (dX * xs).sum(-1).mul_(f.fall[at])
            _add_matmul(dX.flatten(-2), f.B_to_end(at), dadded)
            total = (dX * xs).sum(-1).mul_(f.fall[at])
            direct[at] = (skipped[at] * diagonal).add_(total)
            torch.addcmul(dX.mul_(f.fall_dt[at]), dY, f.skip(at, diagonal), out=dx[at].transpose(2, 3))

            # The gradient by s_i: what token i reads of others, less what later ones of the chunk read of it.
            read = f.read(at, G, X, S).flatten(-2).mul_(dread).unflatten(-1, (-1, p))
            net[at] = read.sum(-1).addcmul_(inside, f.dt[at], value=-1)
            written[at] = total.sub_(inside).mul_(f.dt[at])

        # a_k decays what tokens from k on read of earlier ones, and what of these, and of the state that enters, leaves.
        if f.keep is not None:
            carried *= f.keep[..., 0]
        da = (f.sum_to_end(net) + (written.cumsum(3, dtype=widest(dt.device)) - written) + carried).to(dt.dtype)
        ddt = direct.addcmul(da, A.view(g, 1, -1))
        dA = (da * f.dt).sum((0, 1, 3)).view(h)
        dD = None if D is None else skipped.sum((0, 1, 3)).view(h)
        return (
            dx.view(b, l, h, p),
            ddt.transpose(2, 3).reshape(b, l, h),
            dA,
            dB.view(b, l, g, n),
            dC.view(b, l, g, n),
            dD,
            _to_outer(dstate) if ctx.needs_input_grad[6] else None,
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
    state, states = _to_inner(initial_state, g), []
    for k in range(l // q):
        states.append(state)
        state = state * from_start[:, k, :, -1:] + added[:, k]
    read = (C @ torch.stack(states, 1).flatten(-2)).unflatten(-1, (-1, p))
    inside = ((C @ B.mT).tril(-1) @ (x_wide * (fall * dt)[..., None]).flatten(-2)).unflatten(-1, (-1, p))
    skip = (C * B).sum(-1, keepdim=True) * dt
    skip = skip if D is None else skip + D.view(g, 1, -1)
    y = read * from_start + inside * rise + x_wide * skip[..., None]
    return y.transpose(2, 3).reshape(b, l, h, p).to(x.dtype), _to_outer(state)


def compiled_scan(
    x, dt, A, B, C, D, state, q, compiled: Callable | None = None, most: int = _COMPILED_CHUNKS
) -> tuple[Tensor, Tensor]:
    """`whole_scan`, compiled, on at most `most` chunks at a time. `compiled` may be another form of that function."""
    compiled, chunks = compiled or _compiled(), x.shape[1] // q
    size = -(-chunks // -(-chunks // most))  # of equal parts, as far as possible: every size is compiled separately
    if torch.is_grad_enabled() and size < chunks and not state.requires_grad:
        state = state.detach().requires_grad_()  # as the state is that the first part leaves to the next
    ys = []
    for x_, dt_, B_, C_ in zip(*(t.split(size * q, dim=1) for t in (x, dt, B, C)), strict=True):
        y, state = compiled(x_, dt_, A, B_, C_, D, state, q)
        ys.append(y)
    return torch.cat(ys, dim=1) if len(ys) > 1 else ys[0], state


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
    """The factors of a chunk's products. Tensors are (b, c, g, q, ...); `at` is (rows, chunks), two slices of them."""

    def __init__(self, x, dt, A, B, C, D, segment, q):
        g = B.shape[2]
        self.dt, self.xs = _by_group(dt, q, g), _by_group(x, q, g)  # (b, c, g, q, r) and (b, c, g, q, r, p)
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
        self.segment = None if segment is None else segment.view(len(x), -1, q)
        self.keep = None
        if segment is not None:
            seg = self.segment
            before = torch.cat([seg.new_zeros(len(x), 1), seg[:, :-1, -1]], dim=1)[..., None]  # the document so far
            self._same = (seg[..., :, None] == seg[..., None, :])[:, :, None]  # (b, c, 1, q, q)
            self._to_end = (seg == seg[..., -1:])[:, :, None, :, None]  # (b, c, 1, q, 1)
            self._from_start = (seg == before)[:, :, None, :, None]
            self.keep = self._from_start[..., -1:, :, None].to(dt.dtype)  # 1 where the state is carried across

    def x(self, at) -> Tensor:
        return self.xs[at].to(self.dt.dtype)

    def inputs(self, at) -> Tensor:
        """X_j = exp(m - s_j) dt_j x_j: (b, c, g, q, r p)."""
        return (self.x(at) * self.fall_dt[at]).flatten(-2)

    def read(self, at, G: Tensor, X: Tensor, S: Tensor) -> Tensor:
        """G X + C S, for S (b, c, g, n, r, p): (b, c, g, q, r, p)."""
        y = self.matmul(self.C_from_start(at), S.flatten(-2))
        _add_matmul(y, G, X)
        return y.unflatten(-1, S.shape[-2:])

    def scaled(self, state: Tensor, rows: slice, k: int) -> Tensor:
        """exp(m) H, in place, for the states that enter chunk k of these rows; the states themselves where m is 0."""
        return state if self.enter is None else state.mul_(self.enter[rows, k])

    def scores(self, at) -> tuple[Tensor, Tensor]:
        """G, C_i . B_j where token i sees an earlier token j, else 0: (b, c, g, q, q); and C_i . B_i (b, c, g, q, 1)."""
        G = self.matmul(self.C[at], self.B[at].mT)
        diagonal = G.diagonal(dim1=-2, dim2=-1)[..., None].clone()
        return self.mask(at, G), diagonal

    def mask(self, at, G: Tensor) -> Tensor:
        return (G if self.segment is None else G * self._same[at]).tril_(-1)

    def skip(self, at, diagonal: Tensor) -> Tensor:
        """What a token's own x is multiplied by in y: C_i . B_i dt_i + D, (b, c, g, q, r, 1)."""
        own = diagonal * self.dt[at]
        return (own if self.D is None else own + self.D)[..., None]

    def B_to_end(self, at) -> Tensor:
        return self.to_end(at, self.B[at])

    def C_from_start(self, at) -> Tensor:
        return self.from_start(at, self.C[at])

    def to_end(self, at, t: Tensor) -> Tensor:
        """Zero for a token whose document ends within the chunk: it does not reach the state that leaves."""
        return t if self.segment is None else t * self._to_end[at]

    def from_start(self, at, t: Tensor) -> Tensor:
        """Zero for a token whose document begins within the chunk: it does not see the state that enters."""
        return t if self.segment is None else t * self._from_start[at]

    def sum_to_end(self, net: Tensor) -> Tensor:
        """The sum of net (b, c, g, q, r) from a token to the end of its document or chunk; wider, for terms that cancel."""
        sums = net.flip(3).cumsum(3, dtype=widest(net.device)).flip(3)
        if self.segment is None:
            return sums
        # Where a document ends within the chunk, the sum over what follows is subtracted: exactly, as it is the same.
        ends = (self.segment[..., None, :] <= self.segment[..., :, None]).sum(-1)  # (b, c, q): where the next begins
        after = torch.cat([sums, torch.zeros_like(sums[:, :, :, :1])], dim=3)
        return sums - after.gather(3, ends[:, :, None, :, None].expand_as(net))

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b for each (b, c, g), both in dt's dtype."""
        shape = a.shape[:3]
        a, b = (t.to(self.dt.dtype).flatten(0, 2) for t in (a, b))
        return torch.bmm(a, b).unflatten(0, shape)


def _add_matmul(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b for each (b, c, g), in out's dtype."""
    a, b, out = (t.to(out.dtype).flatten(0, 2) for t in (a, b, out))
    torch.baddbmm(out, a, b, out=out)


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


def _to_inner(state: Tensor, g: int) -> Tensor:
    """(b, h, p, n) -> (b, g, n, r, p), a view."""
    return state.unflatten(1, (g, -1)).permute(0, 1, 4, 2, 3)


def _to_outer(state: Tensor) -> Tensor:
    """(b, g, n, r, p) -> (b, h, p, n), contiguous, in memory of its own."""
    return state.permute(0, 1, 3, 4, 2).clone(memory_format=torch.contiguous_format).flatten(1, 2)
