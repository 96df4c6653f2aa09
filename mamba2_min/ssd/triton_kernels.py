"""The kernels of ssd/triton.py, where they are derived. Two of them run in both directions: REVERSE is the adjoint.

One program works on one tile and adds up in one order; there are no atomics, so equal arguments give equal bits.

    letters as in plain.py; L = chunks * q tokens of a row, and arrays (b, h, L) of
    s       log2 of the decay from a chunk's start to a token, inclusive; s_dt is s - log2(dt)
    enter   exp2(s), and 0 where the token's document is not that of the token before the chunk
    leave   the decay from a token to its chunk's end, and 0 where the chunk ends in another document
    rows    the tokens that a program computes; columns, the tokens of the same chunk that they see
    R, K    what multiplies rows and columns: C and B forwards, B and C in reverse

Offsets of tiles are int64, those within a tile int32. Tiles are padded to powers of two, and masked. What the next turn
of a loop needs and a compiler would not fetch ahead is loaded a turn before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba2_min.ops.triton_functions import softplus, softplus_slope

# A token that decays by more than exp(-88), the smallest normal float32, has forgotten everything.
_FORGOTTEN = tl.constexpr(-88.0)
_LOG2_E = tl.constexpr(1.4426950408889634)
_GRID = tl.constexpr(512.0)  # s is split into a multiple of 1 / 512, whose differences are exact, and the rest
_LARGEST = tl.constexpr(32.0)  # of an exponent: a masked pair's would be anything, and a seen one's is log2(dt) at most
# What differs from text to text: a kernel is compiled once, not again for lengths of other factors.
_COUNTS = ["l", "chunks", "heads", "size", "bh", "span"]


@triton.jit(do_not_specialize=_COUNTS)
def prepare(
    dt, A, bias, documents, s, s_dt, enter, leave, dt_out, across, dt_sb, dt_sl, dt_sh, l, h, chunks, size,
    RAW: tl.constexpr, DOCUMENTS: tl.constexpr, EXACT: tl.constexpr, Q: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """All that follows from dt and A: one program per chunk and BH heads. across (b, h, chunks): from start to end.

    RAW: dt is what softplus(dt + bias) makes the steps of, and A its logarithm, as a mixer's parameters have them.
    With EXACT s has a second part, `size` numbers later, and their sum has twice the digits.
    """
    chunk = tl.program_id(0).to(tl.int64)
    b, c = chunk // chunks, chunk % chunks
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    tokens = tl.arange(0, Q)
    there = (heads < h)[:, None]
    inside = there & (tokens < l - c * Q)[None, :]
    at = dt + b * dt_sb + c * Q * dt_sl + tokens[None, :].to(tl.int64) * dt_sl + heads.to(tl.int64)[:, None] * dt_sh
    step = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    rate = tl.load(A + heads, mask=heads < h, other=0.0).to(tl.float32)
    if RAW:
        offset = tl.load(bias + heads, mask=heads < h, other=0.0).to(tl.float32)
        step = tl.where(inside, softplus(step + offset[:, None]), 0.0)
        rate = -tl.exp(rate)
    out = (b * h + heads.to(tl.int64))[:, None] * (chunks * Q) + c * Q + tokens[None, :]
    if EXACT:
        a = tl.maximum(step.to(tl.float64) * rate[:, None], _FORGOTTEN) * _LOG2_E
        total = tl.cumsum(a, axis=1)
        end = tl.sum(a, axis=1)
        coarse = tl.floor(total * _GRID) / _GRID
        tl.store(s + out, coarse.to(tl.float32), mask=there)
        tl.store(s + size + out, (total - coarse).to(tl.float32), mask=there)
    else:
        total = tl.cumsum(tl.maximum(step * rate[:, None], _FORGOTTEN) * _LOG2_E, axis=1)
        end = tl.sum(tl.where(tokens[None, :] == Q - 1, total, 0.0), axis=1)
        tl.store(s + out, total, mask=there)
        tl.store(s_dt + out, total - tl.log2(step), mask=there)
    near = tl.exp2(total.to(tl.float32))
    far = tl.exp2(tl.minimum((end[:, None] - total).to(tl.float32), 0.0))
    through = tl.exp2(end.to(tl.float32))
    if DOCUMENTS:
        documents += b * chunks * Q + c * Q
        doc, doc_end = tl.load(documents + tokens), tl.load(documents + Q - 1)
        doc_before = tl.load(documents - tl.minimum(c, 1))
        near = tl.where((doc == doc_before)[None, :], near, 0.0)
        far = tl.where((doc == doc_end)[None, :], far, 0.0)
        through = tl.where(doc_end == doc_before, through, 0.0)
    tl.store(enter + out, near, mask=there)
    tl.store(leave + out, far, mask=there)
    tl.store(dt_out + out, step, mask=there)
    tl.store(across + (b * h + heads) * chunks + c, through, mask=heads < h)


@triton.jit(do_not_specialize=_COUNTS)
def states(
    v, K, far, dt, across, start, forward, H, last, carried,
    v_sb, v_sl, v_sh, K_sb, K_sl, K_sg, l, chunks, h, heads_a_group, p, n, bh, span,
    REVERSE: tl.constexpr, WRITE: tl.constexpr, PRECISION: tl.constexpr, Q: tl.constexpr, BQ: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Steps 1 and 2, a loop over chunks: H (b, chunks, h, p, n), the state that comes to each chunk, and the last.

    One program per head of a row, BN columns and section of `span` chunks, which reads BQ tokens at a time. start and
    last (sections, b, h, p, n). Without WRITE it computes the last alone.

    Forwards v = x, K = B and far = leave. In reverse v = dy, K = C, far = enter, and the state is the gradient of the
    one that leaves each chunk; `carried` (n / BN, b, chunks, h) is then the part of the gradient of a that acts on the
    whole state: across <gradient, state of the forward>.
    """
    program, section = tl.program_id(0).to(tl.int64), tl.program_id(2)
    b, head = program // h, program % h
    first = section * span
    count = tl.minimum(span, chunks - first)
    pieces: tl.constexpr = Q // BQ
    P, N, tokens = tl.arange(0, BP), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BQ)
    tile = P[:, None] * n + N[None, :]
    v_tile, K_tile = P[:, None] + tokens[None, :] * v_sl, tokens[:, None] * K_sl + N[None, :]
    inside = (P < p)[:, None] & (N < n)[None, :]
    ends = (section.to(tl.int64) * bh + program) * p * n + tile
    state = tl.load(start + ends, mask=inside, other=0.0)
    v += b * v_sb + head * v_sh
    K += b * K_sb + (head // heads_a_group) * K_sg
    H += (b * chunks * h + head) * p * n
    forward += (b * chunks * h + head) * p * n
    carried += tl.program_id(1) * bh * chunks + b * chunks * h + head
    across += program * chunks
    far += program * chunks * Q
    dt += program * chunks * Q
    decay = tl.load(across + (first + count - 1 if REVERSE else first))
    for k in range(0, count * pieces):
        c, piece = first + k // pieces, k % pieces
        following = tl.minimum(c + 1, chunks - 1)
        if REVERSE:
            c = first + count - 1 - k // pieces
            following = tl.maximum(c - 1, 0)
        token = tl.cast(c, tl.int64) * Q + piece * BQ
        place = tl.cast(c, tl.int64) * h * p * n
        next_decay = tl.load(across + following)
        there = tokens < (l - token).to(tl.int32)
        columns = tl.load(v + token * v_sl + v_tile, mask=(P < p)[:, None] & there[None, :], other=0.0)
        keys = tl.load(K + token * K_sl + K_tile, mask=there[:, None] & (N < n)[None, :], other=0.0)
        weight = tl.load(far + token + tokens)
        if not REVERSE:
            weight *= tl.load(dt + token + tokens)
        if piece == 0:
            if REVERSE and WRITE:
                other = tl.load(forward + place + tile, mask=inside, other=0.0).to(tl.float32)
                tl.store(carried + tl.cast(c, tl.int64) * h, tl.sum(tl.sum(state * other, axis=1), axis=0) * decay)
            if WRITE:
                tl.store(H + place + tile, state.to(H.dtype.element_ty), mask=inside)
            state *= decay
        scaled = (columns.to(tl.float32) * weight[None, :]).to(keys.dtype)
        state = tl.dot(scaled, keys, state, input_precision=PRECISION)
        if piece == pieces - 1:
            decay = next_decay
    tl.store(last + ends, state, mask=inside)


@triton.jit
def _place(chunks, heads_a_group, heads, blocks: tl.constexpr):
    """Of a program: which block of rows of chunk c of row b, and of group g the part of `heads` heads from `first`."""
    program, parts = tl.program_id(0).to(tl.int64), heads_a_group // heads
    chunk = program // blocks
    g, part = (tl.program_id(1) // parts).to(tl.int64), (tl.program_id(1) % parts).to(tl.int64)
    return (program % blocks).to(tl.int32), chunk // chunks, chunk % chunks, g, part, g * heads_a_group + part * heads


@triton.jit
def _scores(
    R, K, documents, R_sl, K_sl, rows, columns, left, n, REVERSE: tl.constexpr, DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Tiles of R and K, R K^T, and which columns a row sees: those of its document, up to itself (from itself on)."""
    N = tl.arange(0, BN)
    if REVERSE:
        seen = columns[None, :] >= rows[:, None]
    else:
        seen = columns[None, :] <= rows[:, None]
    if DOCUMENTS:
        seen = seen & (tl.load(documents + rows)[:, None] == tl.load(documents + columns)[None, :])
    r = tl.load(R + (rows[:, None] * R_sl + N[None, :]), mask=(rows < left)[:, None] & (N < n)[None, :], other=0.0)
    keys = tl.load(
        K + (columns[:, None] * K_sl + N[None, :]), mask=(columns < left)[:, None] & (N < n)[None, :], other=0.0
    )
    return r, keys, tl.dot(r, tl.trans(keys), input_precision=PRECISION), seen


@triton.jit
def _needed(columns, block, left, REVERSE: tl.constexpr, BR: tl.constexpr):
    """The columns that some row of a block sees, of `left` tokens."""
    if REVERSE:
        return (columns >= block * BR) & (columns < left)
    return (columns < block * BR + BR) & (columns < left)


@triton.jit
def _pair_decays(
    s, s_dt, dt, at, size, high, low, columns, REVERSE: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """exp(a_{j+1} + ... + a_i) of rows and columns, where they are not masked; forwards times dt_j."""
    if EXACT:
        d = high[:, None] - tl.load(s + at + columns)[None, :]
        d += low[:, None] - tl.load(s + size + at + columns)[None, :]
        if REVERSE:
            return tl.exp2(tl.minimum(-d, 0.0))
        return tl.exp2(tl.minimum(d, 0.0)) * tl.load(dt + at + columns)[None, :]
    if REVERSE:
        return tl.exp2(tl.minimum(tl.load(s + at + columns)[None, :] - high[:, None], _LARGEST))
    return tl.exp2(tl.minimum(high[:, None] - tl.load(s_dt + at + columns)[None, :], _LARGEST))


@triton.jit(do_not_specialize=_COUNTS)
def outputs(
    R, K, v, H, s, s_dt, near, dt, documents, D, out,
    R_sb, R_sl, R_sg, K_sb, K_sl, K_sg, v_sb, v_sl, v_sh, out_sb, out_sl, l, chunks, h, heads_a_group, heads, p, n,
    size,
    REVERSE: tl.constexpr, DOCUMENTS: tl.constexpr, SKIP: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Steps 3 and 4: what rows read from the state that comes to their chunk, and from the tokens of their chunk.

    Forwards v = x, near = enter, and out is y; in reverse v = dy, near = leave, and out is dx. D is part of the pairs'
    matrix, on its diagonal. One program per BR rows and `heads` heads, which share R K^T.
    """
    block, b, c, g, _, first = _place(chunks, heads_a_group, heads, Q // BR)
    P, N, columns = tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, Q)
    rows, left, token = block * BR + tl.arange(0, BR), (l - c * Q).to(tl.int32), c * Q
    R += b * R_sb + g * R_sg + token * R_sl
    K += b * K_sb + g * K_sg + token * K_sl
    documents += b * chunks * Q + token
    r, _, G, seen = _scores(R, K, documents, R_sl, K_sl, rows, columns, left, n, REVERSE, DOCUMENTS, PRECISION, BN)
    G = tl.where(seen, G, 0.0)
    v += b * v_sb + token * v_sl + first * v_sh
    H += ((b * chunks + c) * h + first) * p * n
    out += b * out_sb + token * out_sl + first * p
    D += first
    at = (b * h + first) * chunks * Q + token
    needed = _needed(columns, block, left, REVERSE, BR)
    v_tile, v_inside = columns[:, None] * v_sl + P[None, :], needed[:, None] & (P < p)[None, :]
    out_tile, out_inside = rows[:, None] * out_sl + P[None, :], (rows < left)[:, None] & (P < p)[None, :]
    state_tile, state_inside = P[:, None] * n + N[None, :], (P < p)[:, None] & (N < n)[None, :]
    high, by_state, step = tl.load(s + at + rows), tl.load(near + at + rows), tl.load(dt + at + rows)
    low, skip = high, 0.0
    if EXACT:
        low = tl.load(s + size + at + rows)
    if SKIP:
        skip = tl.load(D)
    for k in range(0, heads):
        values = tl.load(v + tl.cast(k, tl.int64) * v_sh + v_tile, mask=v_inside, other=0.0)
        state = tl.load(H + k * p * n + state_tile, mask=state_inside, other=0.0)
        following = at + tl.cast(tl.minimum(k + 1, heads - 1), tl.int64) * chunks * Q + rows
        next_high, next_by_state, next_step = tl.load(s + following), tl.load(near + following), tl.load(dt + following)
        M = G * _pair_decays(
            s, s_dt, dt, at + tl.cast(k, tl.int64) * chunks * Q, size, high, low, columns, REVERSE, EXACT
        )
        if EXACT:
            low = tl.load(s + size + following)
        if REVERSE:
            M *= step[:, None]
            by_state *= step
        if SKIP:
            M += tl.where(columns[None, :] == rows[:, None], skip, 0.0)
            skip = tl.load(D + tl.minimum(k + 1, heads - 1))
        acc = tl.dot(r, tl.trans(state), input_precision=PRECISION) * by_state[:, None]
        acc = tl.dot(M.to(values.dtype), values, acc, input_precision=PRECISION)
        tl.store(out + k * p + out_tile, acc.to(out.dtype.element_ty), mask=out_inside)
        high, by_state, step = next_high, next_by_state, next_step


@triton.jit(do_not_specialize=_COUNTS)
def pair_gradients(
    R, K, u, v, s, s_dt, dt, documents, out, pairs, own,
    R_sb, R_sl, R_sg, K_sb, K_sl, K_sg, u_sb, u_sl, u_sh, v_sb, v_sl, v_sh,
    l, chunks, h, heads_a_group, heads, p, n, size, part_stride,
    REVERSE: tl.constexpr, DOCUMENTS: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradient of R by way of the pairs of a chunk: forwards of C (u = dy, v = x), in reverse of B (u = x, v = dy).

    out (parts, b, l, g, n) float32, a part for each `heads` heads of a group. E is the derivative by each exponent
    a_{j+1} + ... + a_i, and `pairs` (b, h, L) its sum over a row; in reverse it lacks the factor dt of the row, and
    `own` is dy . x of each row. One program per BR rows and `heads` heads.
    """
    block, b, c, g, part, first = _place(chunks, heads_a_group, heads, Q // BR)
    groups = h // heads_a_group
    P, N, columns = tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, Q)
    rows, left, token = block * BR + tl.arange(0, BR), (l - c * Q).to(tl.int32), c * Q
    R += b * R_sb + g * R_sg + token * R_sl
    K += b * K_sb + g * K_sg + token * K_sl
    documents += b * chunks * Q + token
    _, keys, G, seen = _scores(R, K, documents, R_sl, K_sl, rows, columns, left, n, REVERSE, DOCUMENTS, PRECISION, BN)
    same = columns[None, :] == rows[:, None]  # a pair of one token has no exponent
    G = tl.where(seen & (columns[None, :] != rows[:, None]), G, 0.0)
    dG = tl.zeros((BR, Q), tl.float32)
    v += b * v_sb + token * v_sl + first * v_sh
    u += b * u_sb + token * u_sl + first * u_sh
    at = (b * h + first) * chunks * Q + token
    needed = _needed(columns, block, left, REVERSE, BR)
    v_tile, v_inside = columns[:, None] * v_sl + P[None, :], needed[:, None] & (P < p)[None, :]
    u_tile, u_inside = rows[:, None] * u_sl + P[None, :], (rows < left)[:, None] & (P < p)[None, :]
    high, step = tl.load(s + at + rows), tl.load(dt + at + rows)
    low = high
    if EXACT:
        low = tl.load(s + size + at + rows)
    for k in range(0, heads):
        values = tl.load(v + tl.cast(k, tl.int64) * v_sh + v_tile, mask=v_inside, other=0.0)
        mine = tl.load(u + tl.cast(k, tl.int64) * u_sh + u_tile, mask=u_inside, other=0.0)
        here = at + tl.cast(k, tl.int64) * chunks * Q
        following = at + tl.cast(tl.minimum(k + 1, heads - 1), tl.int64) * chunks * Q + rows
        next_high, next_step = tl.load(s + following), tl.load(dt + following)
        L = _pair_decays(s, s_dt, dt, here, size, high, low, columns, REVERSE, EXACT)
        if EXACT:
            low = tl.load(s + size + following)
        dM = tl.dot(mine, tl.trans(values), input_precision=PRECISION)
        if REVERSE:
            tl.store(own + here + rows, tl.sum(tl.where(same, dM, 0.0), axis=1))
        dM *= L
        tl.store(pairs + here + rows, tl.sum(dM * G, axis=1))
        if REVERSE:
            dG += dM * step[:, None]
        else:
            dG += dM
        high, step = next_high, next_step
    dR = tl.dot(tl.where(seen, dG, 0.0).to(keys.dtype), keys, input_precision=PRECISION)
    out += part * part_stride + (b * l + token) * groups * n + g * n
    inside = (rows < left)[:, None] & (N < n)[None, :]
    tl.store(out + (rows[:, None] * (groups * n) + N[None, :]), dR, mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
def key_gradients(
    R, u, H, near, dt, by_pairs, out, through,
    R_sb, R_sl, R_sg, u_sb, u_sl, u_sh, out_sb, out_sl, l, chunks, h, heads_a_group, heads, p, n, part_stride,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, Q: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """The gradient of R, `by_pairs` and by way of the state: forwards H are the states, in reverse their gradients.

    `through` (b, h, L) is the derivative by the exponent between a row and the state; in reverse it lacks the factor dt
    of the row. Programs, parts and the rest as in `pair_gradients`.
    """
    block, b, c, g, part, first = _place(chunks, heads_a_group, heads, Q // BR)
    groups = h // heads_a_group
    P, N = tl.arange(0, BP), tl.arange(0, BN)
    rows, left, token = block * BR + tl.arange(0, BR), (l - c * Q).to(tl.int32), c * Q
    inside = (rows < left)[:, None] & (N < n)[None, :]
    r = tl.load(R + b * R_sb + g * R_sg + token * R_sl + (rows[:, None] * R_sl + N[None, :]), mask=inside, other=0.0)
    place = part * part_stride + (b * l + token) * groups * n + g * n
    tile = rows[:, None] * (groups * n) + N[None, :]
    dR = tl.load(by_pairs + place + tile, mask=inside, other=0.0)
    u += b * u_sb + token * u_sl + first * u_sh
    H += ((b * chunks + c) * h + first) * p * n
    at = (b * h + first) * chunks * Q + token + rows
    u_tile, u_inside = rows[:, None] * u_sl + P[None, :], (rows < left)[:, None] & (P < p)[None, :]
    state_tile, state_inside = P[:, None] * n + N[None, :], (P < p)[:, None] & (N < n)[None, :]
    by_state, step = tl.load(near + at), tl.load(dt + at)
    for k in range(0, heads):
        mine = tl.load(u + tl.cast(k, tl.int64) * u_sh + u_tile, mask=u_inside, other=0.0)
        state = tl.load(H + k * p * n + state_tile, mask=state_inside, other=0.0)
        following = at + tl.cast(tl.minimum(k + 1, heads - 1), tl.int64) * chunks * Q
        next_by_state, next_step = tl.load(near + following), tl.load(dt + following)
        read = tl.dot(mine, state, input_precision=PRECISION) * by_state[:, None]
        tl.store(through + at + tl.cast(k, tl.int64) * chunks * Q, tl.sum(read * r.to(tl.float32), axis=1))
        if REVERSE:
            dR += read * step[:, None]
        else:
            dR += read
        by_state, step = next_by_state, next_step
    out += part * part_stride + b * out_sb + token * out_sl + g * n
    tl.store(out + (rows[:, None] * out_sl + N[None, :]), dR.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
def step_gradients(
    B, C, dt, A, read_pairs, read, written_pairs, written, own, carried, ddt, A_part, bias_part,
    B_sb, B_sl, B_sg, C_sb, C_sl, C_sg, ddt_sb, ddt_sl, l, h, chunks, heads_a_group, n, n_parts, part_stride,
    RAW: tl.constexpr, Q: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradients of dt (b, l, h) and, by chunk, of A (b, chunks, h): one program per chunk, group and BH heads.

    RAW, as in `prepare`: those of its dt and A, and by chunk of the bias.
    Directly, dt_j weighs what token j writes: to itself, to later tokens of the chunk and to the state that leaves it.
    By way of a_k it decays what tokens from k on read of earlier tokens and of the state that enters; and, in the state
    that leaves, what earlier tokens wrote and what entered.
    """
    chunk = tl.program_id(0).to(tl.int64)
    b, c = chunk // chunks, chunk % chunks
    g = tl.program_id(1)
    within = tl.program_id(2) * BH + tl.arange(0, BH)
    heads, there = g * heads_a_group + within, (within < heads_a_group)[:, None]
    tokens, N = tl.arange(0, Q), tl.arange(0, BN)
    inside = (tokens < l - c * Q)[:, None] & (N < n)[None, :]
    B += b * B_sb + c * Q * B_sl + g.to(tl.int64) * B_sg
    C += b * C_sb + c * Q * C_sl + g.to(tl.int64) * C_sg
    keys = tl.load(B + tokens[:, None] * B_sl + N[None, :], mask=inside, other=0.0).to(tl.float32)
    scores = tl.sum(keys * tl.load(C + tokens[:, None] * C_sl + N[None, :], mask=inside, other=0.0), axis=1)
    at = (b * h + heads.to(tl.int64))[:, None] * (chunks * Q) + (c * Q + tokens)[None, :]
    step = tl.load(dt + at, mask=there, other=0.0)
    columns, wrote = tl.load(written_pairs + at, mask=there, other=0.0), tl.load(written + at, mask=there, other=0.0)
    direct = columns + wrote + tl.load(own + at, mask=there, other=0.0) * scores[None, :]
    wrote *= step
    net = tl.load(read_pairs + at, mask=there, other=0.0) - columns * step + tl.load(read + at, mask=there, other=0.0)
    through = tl.zeros((BH,), tl.float32)
    for k in range(0, n_parts):
        through += tl.load(carried + k * part_stride + chunk * h + heads, mask=within < heads_a_group, other=0.0)
    da = tl.cumsum(net, axis=1, reverse=True) + (tl.cumsum(wrote, axis=1) - wrote) + through[:, None]
    rate = tl.load(A + heads, mask=within < heads_a_group, other=0.0).to(tl.float32)
    by_rate = tl.sum(da * step, axis=1)
    if RAW:
        rate = -tl.exp(rate)
        by_rate *= rate
    by_step = direct + da * rate[:, None]
    inside = there & (tokens < l - c * Q)[None, :]
    if RAW:
        by_step = tl.where(inside, by_step * softplus_slope(step), 0.0)
        tl.store(bias_part + chunk * h + heads, tl.sum(by_step, axis=1), mask=within < heads_a_group)
    place = b * ddt_sb + (c * Q + tokens)[None, :] * ddt_sl + heads[:, None]
    tl.store(ddt + place, by_step.to(ddt.dtype.element_ty), mask=inside)
    tl.store(A_part + chunk * h + heads, by_rate, mask=within < heads_a_group)
