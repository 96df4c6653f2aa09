"""The chunked scan and its derivative, both written by hand, in two forms of which `chunked_scan` picks one; and the
first of them once more in whole tensors, for a compiler (`separable_scan`).

Within a chunk, token i sees token j through exp(s_i - s_j), s being the cumulative sum of a = dt A from the chunk's
start. Where no chunk decays by more than exp(-60), and what has been trained here stays well above that, this is a
product of two numbers that can be held,

    exp(s_i - s_j) = exp(s_i) exp(-s_j)

of which one scales what token i reads, the other what token j writes (`SeparableScan`). No (q, q) matrix a head is ever
formed: G is one a group, and all heads of a group go through one matrix product. Otherwise the decays are matrices,
masked before exp (`MaskedScan`): right for any decay, at about twice the time.

Symbols as in ssd.py; c counts the chunks of a sequence, m those of all of them, and a head is (g, r), the r-th of group
g. Inside this file the state is (n, p), so that heads that share B and C stand side by side in one matrix product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mamba2_min.ops.autograd import handwritten_backward, no_compile, widest
from mamba2_min.ssd.cuda import FORGOTTEN, BF16Scan

# The most that a chunk, and one token, may decay by, as exponents, for decays to be separated: exp(60) is 1e26, which
# leaves float32 and bf16 room for values up to 1e12; and the decays' gradient is then a difference of sums, which would
# lose the little that is left beyond a token that forgets nearly everything.
_CHUNK_SEPARABLE, _TOKEN_SEPARABLE = -60.0, -8.0

# Elements of one intermediate that exist at a time: what fits in a core's second-level cache on a CPU, and on a GPU
# enough to fill it.
_MASKED_ELEMENTS = {"cpu": 1 << 19}
_MASKED_ELEMENTS_GPU = 1 << 26
_SEPARABLE_ELEMENTS = 1 << 18

_COMPILED_CHUNKS = 16  # at a time: their recurrence is unrolled, and of 64 what a compiler makes is slow


def chunked_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor,
    segment: Tensor | None,
    q: int,
) -> tuple[Tensor, Tensor]:
    """The scan in chunks of q tokens, of which l is a multiple: y (b, l, h, p) in x's dtype, the final state.

    x (b, l, h, p), B and C (b, l, g, n) of any type; dt (b, l, h), A, D (h,) or None, initial_state (b, h, p, n), of
    one type, float32 or wider, in which everything is summed; segment (b, l) or None, as `document_numbers` gives it.
    Chunks of half the length are tried before decays are masked. On a GPU, where the question would have to wait for
    the answer, they always are; one that is given bf16 multiplies it as such.
    """
    if x.is_cuda and x.dtype == B.dtype == C.dtype == torch.bfloat16 and dt.dtype == torch.float32:
        return BF16Scan.apply(x, dt, A, B, C, D, initial_state, segment, q)
    return pick_scan(x, dt, A, B, C, D, initial_state, segment, q, torch.compiler.is_compiling())


@no_compile  # for which form it is to be depends on the numbers
def pick_scan(x, dt, A, B, C, D, initial_state, segment, q, compiled):
    if dt.device.type == "cpu":
        for shorter in (q, q // 2):
            if shorter and q % shorter == 0 and _is_separable(dt, A, shorter):
                if compiled and segment is None:
                    return _compiled_scan(x, dt, A, B, C, D, initial_state, shorter)
                return SeparableScan.apply(x, dt, A, B, C, D, initial_state, segment, shorter)
    return MaskedScan.apply(x, dt, A, B, C, D, initial_state, segment, q)


def _is_separable(dt: Tensor, A: Tensor, q: int) -> bool:
    """Whether the decays of chunks of q tokens may be separated."""
    with torch.no_grad():
        a = dt * A
        chunk, token = a.unflatten(1, (-1, q)).sum(2).amin(), a.amin()
        return bool((chunk >= _CHUNK_SEPARABLE) & (token >= _TOKEN_SEPARABLE))


class SeparableScan(torch.autograd.Function):
    """The scan where no chunk decays by more than can be separated. It keeps the inputs and the chunks' states.

    With X_j = exp(-s_j) dt_j x_j and S the state that enters, a chunk is three matrix products (section 6):

        y = exp(s) (G X + C S) + D x          what is read; G_ij = C_i . B_j for j <= i
        S' = exp(s_q) (S + B^T X)             the state that leaves
    """

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial_state, segment, q):
        b, l, h, p = x.shape
        g, n = B.shape[2:]
        c = l // q
        f = ChunkTerms(x, dt, A, B, C, D, segment, q)
        states = x.new_empty(b, c, g, n, h // g, p, dtype=dt.dtype)  # before each chunk
        states[:, 0] = _to_inner(initial_state, g)
        final = torch.empty_like(states[:, 0])
        y = x.new_empty(b, c, q, g, h // g, p)
        for rows, run in _runs(b, c, q * h * p):
            part = rows, run
            X = f.written(part)
            added = f.product(f.B_leaving(part).mT, X).unflatten(-1, (-1, p))
            for k in range(run.start, run.stop):
                state = states[rows, k] if f.keep is None else states[rows, k] * f.keep[rows, k]
                after = states[rows, k + 1] if k + 1 < c else final[rows]
                torch.mul(added[:, k - run.start].add_(state), f.across[rows, k], out=after)
            _add_skipped(f.read(part, f.seen(part), X, states[part]), f.x(part), f.D, out=y[part].transpose(2, 3))
        ctx.save_for_backward(x, dt, A, B, C, D, states, final, segment)
        ctx.q = q
        return y.view(b, l, h, p), _to_outer(final)

    @staticmethod
    @handwritten_backward
    def backward(ctx, dy, dfinal):
        x, dt, A, B, C, D, states, final, segment = ctx.saved_tensors
        b, l, h, p = x.shape
        g, n = B.shape[2:]
        q = ctx.q
        c = l // q
        f = ChunkTerms(x, dt, A, B, C, D, segment, q)
        dys = _by_group(dy, q, g)
        # Of what leaves a chunk, from the last chunk to the first; a copy always, as it is written to.
        dstate = _to_inner(dfinal, g).clone(memory_format=torch.contiguous_format)
        dx, dB, dC = x.new_empty(b, c, q, g, h // g, p), B.new_empty(b, c, q, g, n), C.new_empty(b, c, q, g, n)
        direct, net, skipped = (torch.empty_like(f.dt) for _ in range(3))  # (b, c, g, q, r)
        leaving = dt.new_empty(b, c, g, h // g)
        for rows, run in reversed(list(_runs(b, c, q * h * p))):
            part = rows, run
            xs, X, S, G = f.x(part), f.written(part), states[part], f.seen(part)
            dY = dys[part].to(dt.dtype)
            dread = (dY * f.rise[part]).flatten(-2)

            # The states' gradients: `dleft` of what leaves a chunk, and what enters it is what leaves the one before.
            dentered = f.product(f.C_entered(part).mT, dread).unflatten(-1, (-1, p))
            dleft = torch.empty_like(dentered)
            dleft[:, -1] = dstate[rows]
            for k in reversed(range(run.start, run.stop)):
                i = k - run.start
                across = f.across[rows, k] if f.keep is None else f.across[rows, k] * f.keep[rows, k]
                torch.addcmul(dentered[:, i], dleft[:, i], across, out=dleft[:, i - 1] if i else dstate[rows])
            left = states[rows, run.start + 1 : run.stop + 1]
            inner = slice(run.start, run.start + left.shape[1])
            leaving[rows, inner] = (dleft[:, : left.shape[1]] * left).sum((-3, -1))
            if run.stop == c:
                leaving[rows, -1] = (dleft[:, -1] * final[rows]).sum((-3, -1))
            dadded = dleft.mul_(f.across[part]).flatten(-2)

            dG = f.visible(part, f.product(dread, X.mT))
            Bp, Cp = f.B[part], f.C[part]
            dCp = f.entered(part, f.product(dread, S.flatten(-2).mT)) + f.product(dG, Bp)
            dBp = f.leaving(part, f.product(X, dadded.mT)) + f.product(dG.mT, Cp)
            dC[part], dB[part] = dCp.transpose(2, 3), dBp.transpose(2, 3)
            dX = f.two_products(G.mT, dread, f.B_leaving(part), dadded).unflatten(-1, (-1, p))

            # By the exponents: s_i gets dy_i . (y_i - D x_i) of what i reads, and -dX_i . X_i of what it writes.
            direct[part] = (dX * xs).sum(-1).mul_(f.fall[part])
            net[part] = f.read(part, G, X, S).mul_(dY).sum(-1)
            skipped[part] = (dY * xs).sum(-1)
            _add_skipped(dX.mul_(f.fall_dt[part]), dY, f.D, out=dx[part].transpose(2, 3))

        # a_k is in the exponents of all i >= k, and in s_q, which scales what leaves.
        net.addcmul_(direct, f.dt, value=-1)
        da = f.from_here(net, leaving).to(dt.dtype)
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


def separable_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor, q: int
) -> tuple[Tensor, Tensor]:
    """`SeparableScan` for one document a row, in whole tensors and with autograd's derivative: what a compiler makes of
    it, on a CPU as well, takes two thirds of the time of the parts that are laid out by hand."""
    (b, l, h, p), g, wide = x.shape, B.shape[2], dt.dtype
    dt, x_wide = _by_group(dt, q, g), _by_group(x, q, g).to(wide)
    B, C = (t.unflatten(1, (-1, q)).transpose(2, 3).to(wide) for t in (B, C))
    s = (dt * A.view(g, 1, -1)).cumsum(3, dtype=widest(dt.device))
    rise, fall = s.exp().to(wide)[..., None], (-s).exp().to(wide)
    X = (x_wide * (fall * dt)[..., None]).flatten(-2)
    added = (B.mT @ X).unflatten(-1, (-1, p))
    state, states = _to_inner(initial_state, g), []
    for k in range(l // q):
        states.append(state)
        state = (state + added[:, k]) * rise[:, k, :, -1:]
    y = (C @ B.mT).tril() @ X + C @ torch.stack(states, 1).flatten(-2)
    y = y.unflatten(-1, (-1, p)) * rise
    if D is not None:
        y = y + x_wide * D.view(g, 1, -1, 1)
    return y.transpose(2, 3).reshape(b, l, h, p).to(x.dtype), _to_outer(state)


def _compiled_scan(x, dt, A, B, C, D, state, q):
    chunks = x.shape[1] // q
    size = -(-chunks // -(-chunks // _COMPILED_CHUNKS))  # parts of one size, as far as that goes: each is compiled anew
    if torch.is_grad_enabled() and size < chunks and not state.requires_grad:
        state = state.detach().requires_grad_()  # as what the first part leaves to the next one does
    ys = []
    for x_part, dt_part, B_part, C_part in zip(*(t.split(size * q, dim=1) for t in (x, dt, B, C)), strict=True):
        y, state = _compiled()(x_part, dt_part, A, B_part, C_part, D, state, q)
        ys.append(y)
    return torch.cat(ys, dim=1) if len(ys) > 1 else ys[0], state


@functools.cache
def _compiled() -> Callable:
    return torch.compile(separable_scan, dynamic=False)


def _add_skipped(y: Tensor, x: Tensor, D: Tensor | None, out: Tensor) -> None:
    """Writes y + D x to `out`, in its type."""
    if D is None:
        out.copy_(y)
    else:
        torch.addcmul(y, x, D, out=out)


class ChunkTerms:
    """What a chunk's products are made of. Tensors are (b, c, g, q, ...); a `part` of them is (rows, run of chunks)."""

    def __init__(self, x, dt, A, B, C, D, segment, q):
        g, wide = B.shape[2], dt.dtype
        self.dt, self.xs = _by_group(dt, q, g), _by_group(x, q, g)  # (b, c, g, q, r) and (b, c, g, q, r, p)
        self.B, self.C = (t.unflatten(1, (-1, q)).transpose(2, 3) for t in (B, C))  # (b, c, g, q, n)
        self.D = None if D is None else D.view(g, 1, -1, 1)
        s = (self.dt * A.view(g, 1, -1)).clamp_min_(FORGOTTEN).cumsum(3, dtype=widest(dt.device))
        self.fall = (-s).exp().to(wide)
        self.fall_dt = (self.fall * self.dt)[..., None]
        self.rise = s.exp().to(wide)[..., None]  # (b, c, g, q, r, 1)
        self.across = self.rise[:, :, :, -1:]  # (b, c, g, 1, r, 1), as a state is (b, c, g, n, r, p)
        self.segment = None if segment is None else segment.view(len(x), -1, q)
        self.keep = None
        if segment is not None:
            seg = self.segment
            before = torch.cat([seg.new_zeros(len(x), 1), seg[:, :-1, -1]], dim=1)[..., None]  # the document so far
            self._same = (seg[..., :, None] == seg[..., None, :])[:, :, None]  # (b, c, 1, q, q)
            self._to_last = (seg == seg[..., -1:])[:, :, None, :, None]  # (b, c, 1, q, 1)
            self._from_before = (seg == before)[:, :, None, :, None]
            self.keep = self._from_before[..., -1:, :, None].to(wide)  # 1 where the state is carried across

    def x(self, part) -> Tensor:
        return self.xs[part].to(self.dt.dtype)

    def written(self, part) -> Tensor:
        """X_j = exp(-s_j) dt_j x_j: (b, c, g, q, r p)."""
        return (self.x(part) * self.fall_dt[part]).flatten(-2)

    def read(self, part, G: Tensor, X: Tensor, S: Tensor) -> Tensor:
        """exp(s) (G X + C S), S being the states that enter, (b, c, g, n, r, p): (b, c, g, q, r, p)."""
        y = self.two_products(G, X, self.C_entered(part), S.flatten(-2))
        return y.unflatten(-1, S.shape[-2:]).mul_(self.rise[part])

    def seen(self, part) -> Tensor:
        """G, C_i . B_j where i sees j, else 0: (b, c, g, q, q)."""
        return self.visible(part, self.product(self.C[part], self.B[part].mT))

    def visible(self, part, G: Tensor) -> Tensor:
        return (G if self.segment is None else G * self._same[part]).tril_()

    def B_leaving(self, part) -> Tensor:
        return self.leaving(part, self.B[part])

    def C_entered(self, part) -> Tensor:
        return self.entered(part, self.C[part])

    def leaving(self, part, t: Tensor) -> Tensor:
        """Zero for a token whose document ends in the chunk: it does not reach what leaves it."""
        return t if self.segment is None else t * self._to_last[part]

    def entered(self, part, t: Tensor) -> Tensor:
        """Zero for a token whose document began in the chunk: it does not see what entered it."""
        return t if self.segment is None else t * self._from_before[part]

    def from_here(self, net: Tensor, leaving: Tensor) -> Tensor:
        """The sum of net (b, c, g, q, r) from a token to the end of its document or chunk; in a chunk's last document,
        with `leaving` (b, c, g, r) as well. Wider than they are, for terms that cancel."""
        sums = net.flip(3).cumsum(3, dtype=widest(net.device)).flip(3)
        if self.segment is None:
            return sums + leaving[:, :, :, None]
        # Where a document ends in the chunk, what follows it is taken off again: exactly, being the same sum.
        q = net.shape[3]
        ends = (self.segment[..., None, :] <= self.segment[..., :, None]).sum(-1)  # (b, c, q): where the next begins
        index = ends[:, :, None, :, None].expand_as(net)
        after = torch.cat([sums, torch.zeros_like(sums[:, :, :, :1])], dim=3).gather(3, index)
        return torch.where(index == q, sums + leaving[:, :, :, None], sums - after)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b for each (b, c, g), as wide as the sums, of whatever type they come in."""
        shape = a.shape[:3]
        a, b = (t.to(self.dt.dtype).flatten(0, 2) for t in (a, b))
        return torch.bmm(a, b).unflatten(0, shape)

    def two_products(self, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        """a1 @ b1 + a2 @ b2, of which the first two are wide already."""
        out = self.product(a2, b2)
        flat = out.flatten(0, 2)
        torch.baddbmm(flat, a1.flatten(0, 2), b1.flatten(0, 2), out=flat)
        return out


def _by_group(t: Tensor, q: int, g: int) -> Tensor:
    """(b, l, h) or (b, l, h, p) -> (b, c, g, q, r) or (b, c, g, q, r, p), a view."""
    return t.unflatten(1, (-1, q)).unflatten(3, (g, -1)).transpose(2, 3)


def _runs(b: int, c: int, elements: int) -> Iterator[tuple[slice, slice]]:
    """(rows, chunks) in parts of which an intermediate, `elements` a chunk, stays within its bound: several whole
    rows, or one after the other the runs of chunks of a row."""
    size = max(1, _SEPARABLE_ELEMENTS // elements)
    for i in range(0, b, max(1, size // c)):
        rows = slice(i, min(b, i + max(1, size // c)))
        for k in range(0, c, size):
            yield rows, slice(k, min(c, k + size))


class MaskedScan(torch.autograd.Function):
    """The scan for any decays (section 6, listing 1). It keeps the inputs and the chunks' states."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial_state, segment, q):
        b, l, h, p = x.shape
        g = B.shape[2]
        xm, dtm, Bm, Cm = _chunks(x, dt, B, C, q)
        s, enter, leave, across = _decays(dtm, A, segment, b, q)
        visible = _visible(segment, q, dtm)

        # Step 1, the low-rank blocks' right factor: what each chunk adds to the state that leaves it.
        added = torch.einsum("mqgn,mqgrp->mgnrp", Bm, xm * (leave * dtm)[..., None])

        # Step 2, their centre factor: the recurrence from chunk to chunk, once every q tokens.
        states, final = _carry(added, across, _to_inner(initial_state, g))

        y = x.new_empty(xm.shape)
        for part in _parts(len(xm), h * q * q, x.device):
            # Step 3, the low-rank blocks' left factor: what each token reads from the state that enters its chunk.
            ym = torch.einsum("mqgn,mgnrp->mqgrp", Cm[part], states[part]).mul_(enter[part][..., None])
            # Step 4, the diagonal blocks: attention without softmax, masked by the decays.
            M = _decay_matrix(s, part)
            M *= _products(Bm, Cm, visible, part)
            M *= dtm[part].movedim(1, -1)[..., None, :]
            ym += torch.einsum("mgrij,mjgrp->migrp", M, xm[part])
            if D is not None:
                ym.addcmul_(xm[part], D.view(g, -1, 1))
            y[part] = ym  # in x's dtype

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
        xm, dtm, Bm, Cm = _chunks(x, dt, B, C, q)
        dym = dy.reshape(xm.shape).to(dt.dtype)
        s, enter, leave, across = _decays(dtm, A, segment, b, q)
        visible = _visible(segment, q, dtm)

        # Step 3 reversed, then step 2: the gradient of the state that leaves each chunk, from the last to the first.
        read = torch.einsum("mqgn,mqgrp->mgnrp", Cm, dym * enter[..., None])
        dadded, dinitial = _carry(read, across, _to_inner(dfinal, g), backwards=True)

        dx, ddt = x.new_empty(xm.shape), torch.empty_like(dtm)
        dB, dC = B.new_empty(Bm.shape), C.new_empty(Cm.shape)
        da = torch.empty_like(dtm)
        for part in _parts(len(xm), h * q * q, x.device):
            X, dY, dtp, Bp, Cp = xm[part], dym[part], dtm[part], Bm[part], Cm[part]
            L = _decay_matrix(s, part)
            G = _products(Bm, Cm, visible, part)

            # Step 4, with M = G L dt_j. dM is dY x^T; E is its derivative by each exponent a_{j+1} + ... + a_i.
            dY_heads = dY.permute(0, 2, 3, 1, 4).contiguous()  # (m, g, r, q, p)
            dM = torch.einsum("mgrip,mjgrp->mgrij", dY_heads, X)
            dM *= L
            dM *= dtp.movedim(1, -1)[..., None, :]
            dG = dM.sum(2) * visible[part]
            E = dM.mul_(G)
            # a_k is in the exponents with j < k <= i: their sum is had without a difference, so nothing cancels.
            between = E.cumsum_(-1).tril_(-1).sum(-2)[..., :-1].movedim(-1, 1)  # k = 1 to q - 1
            u = torch.einsum("mgrij,mgrip->mjgrp", L.mul_(G), dY_heads)
            direct = (X * u).sum(-1)

            # Step 1: a token's x and B, through the state that leaves the chunk.
            v = torch.einsum("mqgn,mgnrp->mqgrp", Bp, dadded[part]).mul_(leave[part][..., None])
            written = (X * v).sum(-1)
            dBp = torch.einsum("mgnrp,mqgrp->mqgn", dadded[part], X * (leave[part] * dtp)[..., None])
            dB[part] = dBp + torch.einsum("mgij,mign->mjgn", dG, Cp)
            dX = v.add_(u).mul_(dtp[..., None])

            # Step 3: a token's C, and its decay from the chunk's start.
            weighted = dY * enter[part][..., None]
            dCp = torch.einsum("mgnrp,mqgrp->mqgn", states[part], weighted)
            dC[part] = dCp + torch.einsum("mgij,mjgn->mign", dG, Bp)
            start = weighted.mul_(torch.einsum("mqgn,mgnrp->mqgrp", Cp, states[part])).sum(-1)

            # Every a up to i decays what i reads of the entering state, every a after j what j leaves behind, and
            # all of them (step 2) what is carried across.
            carried = across[part] * (states[part] * dadded[part]).sum(-1).sum(2)
            da[part] = start.flip(1).cumsum(1).flip(1) + carried[:, None]
            da[part][:, 1:] += between + (written * dtp).cumsum(1)[:, :-1]
            ddt[part] = direct + written
            if D is not None:
                dX.addcmul_(dY, D.view(g, -1, 1))
            dx[part] = dX

        ddt += da * A.view(g, -1)
        dA = (da * dtm).sum((0, 1)).view(h)
        dD = None if D is None else (dym * xm).sum(-1).sum((0, 1)).view(h)
        return (
            dx.view(b, l, h, p),
            ddt.view(b, l, h),
            dA,
            dB.view(b, l, g, n),
            dC.view(b, l, g, n),
            dD,
            _to_outer(dinitial),
            None,
            None,
        )


def _chunks(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """m = b l / q chunks, in dt's dtype: x (m, q, g, r, p), dt (m, q, g, r), B and C (m, q, g, n)."""
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    m, wide = b * l // q, dt.dtype
    xm, dtm = x.reshape(m, q, g, h // g, p).to(wide), dt.reshape(m, q, g, h // g)
    return xm, dtm, B.reshape(m, q, g, n).to(wide), C.reshape(m, q, g, n).to(wide)


def _decays(
    dtm: Tensor, A: Tensor, segment: Tensor | None, b: int, q: int
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
    """The cumulative sums of a = dt A in each chunk, and the three decays that the state meets, all in dt's dtype.

    Returns s (m, q, g, r) as two numbers, of which the second holds the digits that the first has no room for; `enter`
    exp(s_i), from the chunk's start to token i; `leave` exp(s_q - s_j), from token j to the chunk's end; `across`
    (m, g, r) exp(s_q), from end to end. Each decay is zero where a document ends on the way.
    """
    a = (dtm * A.view(dtm.shape[2:])).clamp_min_(FORGOTTEN)
    s = a.to(widest(a.device)).cumsum(1)
    high = s.to(a.dtype)
    low = (s - high).to(a.dtype)
    enter, leave = high.exp(), (s[:, -1:] - s).to(a.dtype).clamp_max(0).exp()
    if segment is not None:
        chunks = segment.view(b, -1, q)
        before = torch.cat([chunks.new_zeros(b, 1), chunks[:, :-1, -1]], dim=1).view(-1, 1)  # the document so far
        seg = segment.view(-1, q)
        enter = enter * (seg == before)[..., None, None]
        leave = leave * (seg == seg[:, -1:])[..., None, None]
    return (high, low), enter, leave, enter[:, -1]


def _carry(parts: Tensor, across: Tensor, state: Tensor, backwards: bool = False) -> tuple[Tensor, Tensor]:
    """Runs state = across state + part through the chunks of each sequence, from `state` (b, g, n, r, p).

    parts (m, g, n, r, p), across (m, g, r). Returns what the state was before each chunk, in the place of `parts`, and
    what it is in the end; `backwards`, from the last chunk to the first.
    """
    by_sequence = parts.view(len(state), -1, *parts.shape[1:])
    decay = across.view(len(state), -1, across.shape[1], 1, across.shape[2], 1)
    order = range(by_sequence.shape[1])
    for k in reversed(order) if backwards else order:
        after = torch.addcmul(by_sequence[:, k], decay[:, k], state)
        by_sequence[:, k] = state
        state = after
    return parts, state


def _decay_matrix(s: tuple[Tensor, Tensor], part: slice) -> Tensor:
    """L (m, g, r, q, q) of the chunks in `part`: exp(s_i - s_j), for j <= i. What stands above the diagonal is finite
    and without meaning: it meets the zeros of `_products`.

    The exponent is bounded before exp, so that nothing overflows, neither above the diagonal nor where the rounded
    difference of two sums comes out positive; below -88 exp would only be slow.
    """
    high, low = (t[part].movedim(1, -1) for t in s)
    exponent = high[..., :, None] - high[..., None, :]
    exponent.add_(low[..., :, None]).sub_(low[..., None, :])
    return exponent.clamp_(FORGOTTEN, 0).exp_()


def _products(Bm: Tensor, Cm: Tensor, visible: Tensor, part: slice) -> Tensor:
    """G (m, g, 1, q, q) of the chunks in `part`: C_i . B_j where i sees j, else 0. Once a group, not once a head."""
    G = torch.einsum("mign,mjgn->mgij", Cm[part], Bm[part])
    return G.mul_(visible[part])[:, :, None]


def _visible(segment: Tensor | None, q: int, dtm: Tensor) -> Tensor:
    """1 where token i of a chunk sees token j: j <= i, in the same document. (m, 1, q, q), a view if all are alike."""
    causal = torch.ones(q, q, dtype=torch.bool, device=dtm.device).tril_()[None, None]
    if segment is not None:
        seg = segment.view(-1, 1, q)
        causal = causal & (seg[..., :, None] == seg[..., None, :])
    return causal.to(dtm.dtype).expand(len(dtm), -1, -1, -1)


def _parts(chunks: int, elements: int, device: torch.device) -> list[slice]:
    """Slices of the chunks such that one (q, q)-sized intermediate of a slice stays within its bound."""
    size = max(1, _MASKED_ELEMENTS.get(device.type, _MASKED_ELEMENTS_GPU) // elements)
    return [slice(k, k + size) for k in range(0, chunks, size)]


def _to_inner(state: Tensor, g: int) -> Tensor:
    """(b, h, p, n) -> (b, g, n, r, p), a view."""
    return state.unflatten(1, (g, -1)).permute(0, 1, 4, 2, 3)


def _to_outer(state: Tensor) -> Tensor:
    """(b, g, n, r, p) -> (b, h, p, n), contiguous, in memory of its own."""
    return state.permute(0, 1, 3, 4, 2).clone(memory_format=torch.contiguous_format).flatten(1, 2)
