"""State-space duality: one linear map from x to y, computed four ways.

The recurrence (Mamba-2 paper, arXiv:2405.21060, equation 1, with Mamba's discretisation), for each head:

    H_t = exp(dt_t A) H_{t-1} + dt_t B_t x_t^T          the state, one (n, p) matrix
    y_t = C_t^T H_t + D x_t                             what is read from it

Unrolled, it is multiplication by one lower-triangular, *semiseparable* matrix (section 3):

    y_i = sum_{j <= i} (C_i . B_j) exp(a_{j+1} + ... + a_i) dt_j x_j,        a_t = dt_t A

so the same y can be had token by token (`ssd_recurrent`, `ssd_step`), by forming that matrix the way attention does
(`ssd_quadratic`, section 5), or by cutting it into blocks (`ssd_chunked`, section 6): blocks on the diagonal as
attention, blocks below it, which have rank n, through the state. All four agree to rounding, values and gradients.

    symbol  shape           meaning
    x       (b, l, h, p)    input: b sequences, l tokens, h heads, p = headdim channels a head
    dt      (b, l, h)       step size, > 0, after softplus: how much time passes at a token
    A       (h,)            decay rate, < 0, one scalar a head (the "scalar times identity" of section 5)
    B, C    (b, l, g, n)    what a token writes to and reads from the state; the h / g heads of a group share them
    D       (h,) or None    skip: y gets D x
    H       (b, h, p, n)    the state, n = d_state numbers a channel
    a, s    (b, l, h)       a = dt A, and s its cumulative sum within a chunk: exp(s_i - s_j) is the decay from j to i
    L       (.., q, q)      the decays from every j to every i >= j of a chunk of q tokens (the paper's 1-SS mask)
    G       (.., q, q)      C_i . B_j, once a group
    seq_idx (b, l)          which document a token belongs to: the state restarts where it changes

In einsum strings: m counts chunks of all sequences, i and j (or q) are positions in a chunk, and a head is
(g, r), the r-th of group g. Inside this file the state is (n, p), so that heads that share B and C stand side by side
in one large matrix product; callers see (p, n).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba2_min.autograd import first_order, without_autocast

# exp(-88) is about the smallest normal float32: a step that decays by more has forgotten everything. The bound keeps
# the cumulative sums small enough to subtract exactly.
_FORGOTTEN = -88.0

# Elements of one (chunks, h, q, q) intermediate that exist at a time: what fits in a core's second-level cache on a
# CPU, and on a GPU enough to fill it.
_BLOCK_ELEMENTS = {"cpu": 1 << 19}
_BLOCK_ELEMENTS_GPU = 1 << 26


@without_autocast
def ssd_recurrent(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The reference: `ssd_step` once a token (equation 1). O(l) time, l steps one after the other.

    Shapes as in the module's glossary; any l >= 1, any g that divides h.
    Returns y (b, l, h, p) in x's dtype and the final state (b, h, p, n), float32 or wider.
    Raises ValueError where shapes do not fit together.
    """
    state = _check(x, dt, A, B, C, D, initial_state, seq_idx)
    ys = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        y, state = ssd_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D)
        ys.append(y)
    return torch.stack(ys, dim=1), state


@without_autocast
def ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token: state (b, h, p, n), x (b, h, p), dt (b, h), B and C (b, g, n) -> y (b, h, p), the next state.

    Equation 1 of the paper, H = exp(dt A) H + dt x B^T and y = H C + D x, in the state's dtype.
    """
    b, h, p, n = state.shape
    g = B.shape[1]
    xw, dtw, Aw, Bw, Cw = (t.to(state.dtype) for t in (x, dt, A, B, C))
    update = ((dtw[..., None] * xw).reshape(b, g, -1, 1) * Bw[:, :, None, :]).view(b, h, p, n)
    state = torch.addcmul(update, state, (dtw * Aw).exp()[:, :, None, None])
    y = (state.reshape(b, g, -1, n) @ Cw[..., None]).view(b, h, p)
    if D is not None:
        y = y + D.to(state.dtype)[:, None] * xw
    return y.to(x.dtype), state


@without_autocast
def ssd_quadratic(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The attention-like dual (section 5): the whole (l, l) matrix of each head, O(l^2).

    Arguments, results and errors as for `ssd_recurrent`. It is the sequence as one chunk, written out plainly.
    """
    H0 = _check(x, dt, A, B, C, D, initial_state, seq_idx)
    b, l, h, p = x.shape
    g, n, wide = B.shape[2], B.shape[3], H0.dtype
    xw, dtw, Aw, Bw, Cw = (t.to(wide) for t in (x, dt, A, B, C))
    xw, dtw, H0 = xw.reshape(b, l, g, -1, p), dtw.reshape(b, l, g, -1), H0.reshape(b, g, -1, p, n)

    a = (dtw * Aw.view(g, -1)).movedim(1, -1)  # (b, g, r, l)
    segment = document_numbers(seq_idx, b, l, x.device)
    visible = (segment[:, :, None] == segment[:, None, :]).tril()[:, None, None]  # (b, 1, 1, l, l)
    # a_{j+1} + ... + a_i in row i, column j, summed downwards rather than as a difference of two sums: exact
    # whatever came before.
    exponent = a[..., :, None].expand(*a.shape, l).tril(-1).cumsum(-2)
    L = exponent.masked_fill(~visible, -torch.inf).exp()
    M = torch.einsum("bign,bjgn->bgij", Cw, Bw)[:, :, None] * L * dtw.movedim(1, -1)[..., None, :]
    y = torch.einsum("bgrij,bjgrp->bigrp", M, xw)

    # What the initial state still adds, and what is left of everything at the end.
    from_start = (a.cumsum(-1).exp() * (segment == 0)[:, None, None]).movedim(-1, 1)  # (b, l, g, r)
    y = y + torch.einsum("bign,bgrpn,bigr->bigrp", Cw, H0, from_start)
    to_end = L[..., -1, :].movedim(-1, 1) * dtw
    state = torch.einsum("bjgr,bjgn,bjgrp->bgrpn", to_end, Bw, xw) + from_start[:, -1, ..., None, None] * H0
    y = y.reshape(b, l, h, p)
    if D is not None:
        y = y + D.to(wide)[:, None] * x.to(wide)
    return y.to(x.dtype), state.reshape(b, h, p, n)


@without_autocast
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
    """The chunked scan (section 6, listing 1): linear time, large matrix products; what training uses.

    Arguments, results and errors as for `ssd_recurrent`; the result does not depend on `chunk_size` (rounding apart).
    Its backward is written by hand (`_ChunkedScan`): between forward and backward it keeps the inputs and the state
    at each chunk's start, O(l p + l n p / q) a head, and no (q, q) matrix.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    state = _check(x, dt, A, B, C, D, initial_state, seq_idx)
    b, l = x.shape[:2]
    wide, q = state.dtype, min(chunk_size, l)
    segment = None if seq_idx is None else document_numbers(seq_idx, b, l, x.device)
    if l % q:  # a token of dt = 0 neither decays the state nor adds to it, so padding changes nothing
        pad = -l % q
        x, B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, pad))
        if segment is not None:
            segment = torch.cat([segment, segment[:, -1:].expand(b, pad)], dim=1)
    D = None if D is None else D.to(wide)
    y, state = _ChunkedScan.apply(x, dt.to(wide), A.to(wide), B, C, D, state, segment, q)
    return y[:, :l], state


class _ChunkedScan(torch.autograd.Function):
    """The chunked scan and its derivative, for l a multiple of the chunk size, in the dtype of dt, A, D and the state.

    x, B and C may be narrower: they are kept as they are, and widened for the work.
    """

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
    @first_order
    @without_autocast
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
            dx.view(b, l, h, p), ddt.view(b, l, h), dA, dB.view(b, l, g, n), dC.view(b, l, g, n), dD,
            _to_outer(dinitial), None, None,
        )  # fmt: skip


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
    a = (dtm * A.view(dtm.shape[2:])).clamp_min_(_FORGOTTEN)
    s = a.to(_sum_dtype(a.device)).cumsum(1)
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
    return exponent.clamp_(_FORGOTTEN, 0).exp_()


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
    size = max(1, _BLOCK_ELEMENTS.get(device.type, _BLOCK_ELEMENTS_GPU) // elements)
    return [slice(k, k + size) for k in range(0, chunks, size)]


def _to_inner(state: Tensor, g: int) -> Tensor:
    """(b, h, p, n) -> (b, g, n, r, p), contiguous."""
    return state.unflatten(1, (g, -1)).permute(0, 1, 4, 2, 3).contiguous()


def _to_outer(state: Tensor) -> Tensor:
    """(b, g, n, r, p) -> (b, h, p, n), contiguous."""
    return state.permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()


def document_numbers(seq_idx: Tensor | None, b: int, l: int, device: torch.device) -> Tensor:
    """Numbers the documents of each row 0, 1, 2... from left to right, by where seq_idx changes: (b, l).

    The initial state belongs to document 0. Without seq_idx there is one document.
    """
    if seq_idx is None:
        return torch.zeros(b, l, dtype=torch.int64, device=device)
    return F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(1), (1, 0))


def _sum_dtype(device: torch.device) -> torch.dtype:
    """Differences of long cumulative sums need more digits than float32 has; Apple's GPUs have no more to give."""
    return torch.float32 if device.type == "mps" else torch.float64


def _check(x, dt, A, B, C, D, initial_state, seq_idx) -> Tensor:
    """Raises ValueError where shapes do not fit together; returns the state to start from, float32 or wider."""
    if x.dim() != 4 or x.shape[1] < 1:
        raise ValueError(f"x must be (b, l, h, p) with l >= 1, not {tuple(x.shape)}")
    b, l, h, p = x.shape
    if B.dim() != 4 or B.shape[:2] != (b, l) or h % B.shape[2]:
        raise ValueError(f"B must be (b, l, g, n) = ({b}, {l}, g, n) with g a divisor of h = {h}, not {tuple(B.shape)}")
    n = B.shape[3]
    expected = {"dt": (dt, (b, l, h)), "A": (A, (h,)), "C": (C, tuple(B.shape)), "D": (D, (h,)),
                "initial_state": (initial_state, (b, h, p, n)), "seq_idx": (seq_idx, (b, l))}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, not {tuple(tensor.shape)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    if initial_state is not None:
        return initial_state.to(torch.promote_types(wide, initial_state.dtype))
    return x.new_zeros(b, h, p, n, dtype=wide)
