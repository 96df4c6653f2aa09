"""READ FIRST: state-space duality, one linear map from x to y that can be computed in four ways.

The recurrence (Mamba-2 paper, arXiv:2405.21060, equation 1, with Mamba's discretisation), for each head:

    H_t = exp(a_t) H_{t-1} + dt_t x_t B_t^T         the state, a (p, n) matrix, decays and is written to; a_t = dt_t A
    y_t = H_t C_t + D x_t                           the output is read from it

Without the loop, it is a product with one lower-triangular, *semiseparable* matrix M (section 3):

    y_i = sum_{j <= i} M_ij dt_j x_j,               M_ij = (C_i . B_j) exp(a_{j+1} + ... + a_i)

So the same y can be computed token by token (`ssd_recurrent`, `ssd_step`), by forming M as attention does
(`ssd_quadratic`, section 5), or by cutting M into blocks of q x q (`ssd_plain`, section 6). The blocks on the diagonal
are small attentions (step 4). A block below it has rank n: it is the product of what its columns add to the state
(step 1), of the state's decay on the way (step 2), and of what its rows read from the state (step 3).

          tokens j
        +-------+
    t   |   4   |
    o   +-------+-------+
    k   | 3·2·1 |   4   |                           with three chunks; the state carries all blocks left of the
    e   +-------+-------+-------+                   diagonal at once, so the work grows with l, not with l^2
    n   | 3·2·1 | 3·2·1 |   4   |
    s i +-------+-------+-------+

Two rules keep every form exact, whatever the decays and the documents are:
  - An exponent is a sum of a's between two tokens, never a difference of two cumulative sums: after a token of large
    dt, such a difference has lost the digits of all small ones.
  - The first token of a document has a = -inf. Then exp(a) = 0, and nothing passes from one document to the next.

    symbol  shape           meaning
    x       (b, l, h, p)    input: b sequences, l tokens, h heads, p = headdim channels per head
    dt      (b, l, h)       step size, > 0, after softplus: how much time passes at a token
    A       (h,)            decay rate, < 0, one scalar per head (the "scalar times identity" of section 5)
    B, C    (b, l, g, n)    what a token writes to and reads from the state; the h / g heads of a group share them
    D       (h,) or None    skip connection: D x is added to y
    H       (b, h, p, n)    the state, n = d_state numbers per channel
    a       (b, l, h)       dt A, the logarithm of a token's decay
    L       (.., q, q)      the decay from token j to token i, for j <= i (the paper's 1-SS mask)
    seq_idx (b, l)          the document of each token: the state restarts where it changes

In einsum strings i and j are tokens, c is a chunk, and a head is (g, r), the r-th of group g.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba2_min.ops.autograd import without_autocast
from mamba2_min.ssd.arguments import check
from mamba2_min.ssd.nonfinite import contained


@without_autocast
@contained
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
    """The reference: equation 1, one step per token.

    Args: shapes as in the module's glossary; any l >= 1, any g that divides h. x, B and C may be bf16: everything is
    computed in float32, or in the dtype of x or of initial_state where that is wider.
    Returns y (b, l, h, p) in x's dtype and the final state (b, h, p, n), float32 or wider.
    Raises ValueError where shapes do not fit together.
    """
    H, narrow = check(x, dt, A, B, C, D, initial_state, seq_idx), x.dtype
    x, dt, A, B, C = (t.to(H.dtype) for t in (x, dt, A, B, C))
    a = log_decay(dt, A, seq_idx)
    ys = []
    for t in range(x.shape[1]):
        y, H = _advance(H, x[:, t], dt[:, t], a[:, t], B[:, t], C[:, t], D)
        ys.append(y)
    return torch.stack(ys, dim=1).to(narrow), H


@without_autocast
def ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token, equation 1: state (b, h, p, n), x (b, h, p), dt (b, h), B, C (b, g, n) -> y (b, h, p), the new state.

    Dtypes and errors as for `ssd_recurrent`. The given state is left as it is.
    """
    H, narrow = check(x[:, None], dt[:, None], A, B[:, None], C[:, None], D, state), x.dtype
    x, dt, A, B, C = (t.to(H.dtype) for t in (x, dt, A, B, C))
    y, H = _advance(H, x, dt, dt * A, B, C, D)
    return y.to(narrow), H


@without_autocast
@contained
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
    """The dual form, attention without softmax (section 5): forms the (l, l) matrix M of each head, O(l^2).

    Arguments, results and errors as for `ssd_recurrent`.
    """
    H, narrow = check(x, dt, A, B, C, D, initial_state, seq_idx), x.dtype
    g = B.shape[2]
    x, dt, A, B, C = (t.to(H.dtype) for t in (x, dt, A, B, C))
    a = log_decay(dt, A, seq_idx).unflatten(2, (g, -1)).movedim(1, -1)  # (b, g, r, l)
    X = (x * dt[..., None]).unflatten(2, (g, -1))  # (b, l, g, r, p)
    H = H.unflatten(1, (g, -1))

    L = segment_sum(a).exp()  # (b, g, r, l, l)
    M = torch.einsum("bign,bjgn->bgij", C, B)[:, :, None] * L  # queries C, keys B, values X
    y = torch.einsum("bgrij,bjgrp->bigrp", M, X)
    # What is read from the initial state, and what is in the state at the end.
    from_start = a.cumsum(-1).exp()  # (b, g, r, l)
    y = y + torch.einsum("bign,bgrpn,bgri->bigrp", C, H, from_start)
    H = from_start[..., -1, None, None] * H + torch.einsum("bgrj,bjgrp,bjgn->bgrpn", L[..., -1, :], X, B)
    return _add_skip(y.flatten(2, 3), x, D).to(narrow), H.flatten(1, 2)


@without_autocast
@contained
def ssd_plain(
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
    """The chunked scan (section 6, listing 1): O(l), a loop over chunks and matrix products for all else.

    Arguments, results and errors as for `ssd_recurrent`. chunk_size >= 1 changes the speed, never the result. The
    backward pass is autograd's. `ssd_chunked` computes the same faster, and with less memory.
    """
    H, narrow = check(x, dt, A, B, C, D, initial_state, seq_idx, chunk_size), x.dtype
    l, h, p, g, n = *x.shape[1:], *B.shape[2:]
    x, dt, A, B, C = (t.to(H.dtype) for t in (x, dt, A, B, C))

    # Cut into chunks of q tokens. The last one is filled up with tokens of a = 0 and X = 0, which change no state.
    q = min(chunk_size, l)
    pieces = (log_decay(dt, A, seq_idx), x * dt[..., None], B, C)
    a, X, Bc, Cc = (F.pad(t.flatten(2), (0, 0, 0, -l % q)).unflatten(1, (-1, q)) for t in pieces)
    a = a.unflatten(-1, (g, -1)).movedim(2, -1)  # (b, c, g, r, q)
    X = X.unflatten(-1, (g, h // g, p))  # (b, c, q, g, r, p)
    Bc, Cc = Bc.unflatten(-1, (g, n)), Cc.unflatten(-1, (g, n))  # (b, c, q, g, n)
    L = segment_sum(a).exp()  # (b, c, g, r, q, q)
    from_start = a.cumsum(-1).exp()  # (b, c, g, r, q), the decay from the chunk's start to token i, inclusive

    # Step 1: what each chunk adds to the state. Token j decays to the chunk's end, the last row of L.
    added = torch.einsum("bcgrj,bcjgrp,bcjgn->bcgrpn", L[..., -1, :], X, Bc)

    # Step 2: the state from chunk to chunk, a recurrence of l / q steps.
    H = H.unflatten(1, (g, -1))
    entering = []
    for c in range(a.shape[1]):
        entering.append(H)
        H = from_start[:, c, ..., -1, None, None] * H + added[:, c]

    # Step 3: what each token reads from the state that enters its chunk.
    y = torch.einsum("bcign,bcgrpn,bcgri->bcigrp", Cc, torch.stack(entering, 1), from_start)

    # Step 4: the diagonal blocks, attention without softmax within each chunk.
    y = y + torch.einsum("bcign,bcjgn,bcgrij,bcjgrp->bcigrp", Cc, Bc, L, X)
    return _add_skip(y.flatten(1, 2)[:, :l].flatten(2, 3), x, D).to(narrow), H.flatten(1, 2)


def log_decay(dt: Tensor, A: Tensor, seq_idx: Tensor | None) -> Tensor:
    """a = dt A, (b, l, h); -inf where another document begins. The first continues the initial state."""
    a = dt * A
    if seq_idx is None:
        return a
    restarts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))  # (b, l)
    return a.masked_fill(restarts[..., None], -torch.inf)


def segment_sum(a: Tensor) -> Tensor:
    """a_{j+1} + ... + a_i in row i, column j; -inf for j > i. (.., q) -> (.., q, q)

    Column j is a cumulative sum of its own, which begins after token j.
    """
    q = a.shape[-1]
    seen = torch.ones(q, q, dtype=torch.bool, device=a.device).tril()  # j <= i
    return a[..., None].expand(*a.shape, q).tril(-1).cumsum(-2).masked_fill(~seen, -torch.inf)


def _advance(
    H: Tensor, x: Tensor, dt: Tensor, a: Tensor, B: Tensor, C: Tensor, D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Equation 1 for one token; a (b, h) is the logarithm of its decay."""
    b, h, p, n = H.shape
    g = B.shape[1]
    rp = h // g * p
    written = (dt[..., None] * x).reshape(b, g, rp, 1) * B[:, :, None, :]  # (b, g, r p, n)
    H = torch.addcmul(written.reshape(b, h, p, n), H, a.exp()[..., None, None])
    y = (H.reshape(b, g, rp, n) @ C[..., None]).reshape(b, h, p)
    return _add_skip(y, x, D), H


def _add_skip(y: Tensor, x: Tensor, D: Tensor | None) -> Tensor:
    return y if D is None else y + D.to(x.dtype)[:, None] * x
