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

In einsum strings i and j are positions, and a head is (g, r), the r-th of group g.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba2_min.ops.autograd import without_autocast
from mamba2_min.ops.seq_idx import document_numbers
from mamba2_min.ssd.cpu import chunked_scan


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
    The work is done in chunked_scan.py, with a backward written by hand: between forward and backward it keeps the
    inputs and the state at each chunk's start, O(l p + l n p / q) a head, and no (q, q) matrix. (Compiled on a CPU, it
    keeps what the compiler chooses to.)
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    state = _check(x, dt, A, B, C, D, initial_state, seq_idx)
    b, l = x.shape[:2]
    # Of a sequence shorter than a chunk a GPU gets a power of two: matrix units and compilers like no others.
    wide, q = state.dtype, min(chunk_size, 1 << (l - 1).bit_length() if x.is_cuda else l)
    segment = None if seq_idx is None else document_numbers(seq_idx, b, l, x.device)
    if l % q:  # a token of dt = 0 neither decays the state nor adds to it, so padding changes nothing
        pad = -l % q
        x, B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, pad))
        if segment is not None:
            segment = torch.cat([segment, segment[:, -1:].expand(b, pad)], dim=1)
    D = None if D is None else D.to(wide)
    y, state = chunked_scan(x, dt.to(wide), A.to(wide), B, C, D, state, segment, q)
    return y[:, :l], state


def _check(x, dt, A, B, C, D, initial_state, seq_idx) -> Tensor:
    """Raises ValueError where shapes do not fit together; returns the state to start from, float32 or wider."""
    if x.dim() != 4 or x.shape[1] < 1:
        raise ValueError(f"x must be (b, l, h, p) with l >= 1, not {tuple(x.shape)}")
    b, l, h, p = x.shape
    if B.dim() != 4 or B.shape[:2] != (b, l) or h % B.shape[2]:
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
    wide = torch.promote_types(x.dtype, torch.float32)
    if initial_state is not None:
        return initial_state.to(torch.promote_types(wide, initial_state.dtype))
    return x.new_zeros(b, h, p, n, dtype=wide)
