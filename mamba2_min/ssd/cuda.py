"""The chunked scan of bf16 activations on a GPU: plain PyTorch, made for matrix units and for a compiler.

Operands of matrix products are bf16; decays, states and sums are float32. No tensor is changed in place, so that
`torch.compile` can fuse whatever lies between two matrix products into one kernel. Without a compiler this works too,
at about half the speed.

Letters as in plain.py; m counts the chunks of all sequences, and a head is (g, r), the r-th of group g.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mamba2_min.ops.autograd import handwritten_backward, materialize
from mamba2_min.ops.seq_idx import document_numbers
from mamba2_min.ssd.arguments import Shape, pad_to_chunks, to_inner, to_outer

# exp(-88) is about the smallest normal float32: a token that decays by more has forgotten everything. The bound keeps
# the cumulative sums small enough for their differences to be exact enough for bf16.
_FORGOTTEN = -88.0

_BMM_WIDENS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)


def supports(device: torch.device, dtype: torch.dtype, shape: Shape) -> bool:
    """bf16 on a GPU of CUDA or ROCm."""
    return device.type == "cuda" and dtype == torch.bfloat16


def scan(x, dt, A, B, C, D, initial_state, seq_idx, chunk_size):
    """As every scan of `ssd.SCANS`. Raises ValueError where x, B and C are not bf16."""
    if x.dtype != torch.bfloat16:
        raise ValueError(f'the scan "cuda" takes x, B and C in bfloat16, not {x.dtype}')
    b, l = x.shape[:2]
    q = min(chunk_size, 1 << (l - 1).bit_length())  # a short sequence is one chunk: a power of two, for matrix units
    segment = None if seq_idx is None else document_numbers(seq_idx, b, l, x.device)
    x, dt, B, C, segment = pad_to_chunks(q, x, dt, B, C, segment)
    y, state = BF16Scan.apply(x, dt, A, B, C, D, initial_state, segment, q)
    return y[:, :l], state


class BF16Scan(torch.autograd.Function):
    """The scan for an l that is a multiple of q. It keeps the inputs and, in bf16, the state at each chunk's start."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial_state, segment, q):
        b, l, h, p = x.shape
        g, n = B.shape[2:]
        m, r = b * l // q, h // g
        s, enter, leave, across = _decays(dt, A, segment, b, q)  # (m, h, q) each, and (b, l / q, h)
        Bm, Cm = (t.reshape(m, q, g, n).transpose(1, 2).reshape(m * g, q, n) for t in (B, C))
        xdt = x.reshape(m, q, h, p) * dt.reshape(m, q, h, 1)

        # Step 1: what each chunk adds to the state; step 2: the state from chunk to chunk.
        written = _by_group(xdt * leave.transpose(1, 2)[..., None], g)
        added = _wide_product(Bm.transpose(1, 2), written).view(b, -1, g, n, r, p)
        state, entering = to_inner(initial_state, g), []
        for k in range(l // q):
            entering.append(state.bfloat16())
            state = across[:, k].view(b, g, 1, r, 1) * state + added[:, k]
        states = torch.stack(entering, 1).view(m * g, n, r * p)

        # Step 3: what each token reads from the state that enters its chunk; step 4: the diagonal blocks.
        entered = _product(Cm, states).view(m, g, q, r, p).permute(0, 1, 3, 2, 4).reshape(m, h, q, p)
        M, _ = _decay_matrix(s, _visible(segment, q, s.device), _product(Cm, Bm.transpose(1, 2)), g)
        inside = _product(M.bfloat16().view(m * h, q, q), _by_head(xdt)).view(m, h, q, p)
        y = (inside + entered * enter[..., None]).transpose(1, 2).reshape(b, l, h, p)
        if D is not None:
            y = y + D[:, None] * x
        ctx.save_for_backward(x, dt, A, B, C, D, states, segment)
        ctx.q = q
        # The clone is for the compiler of PyTorch 2.11, which loses the gradient of a result that is a view.
        return y.to(x.dtype), to_outer(state).clone()

    @staticmethod
    @handwritten_backward
    def backward(ctx, dy, dfinal):
        x, dt, A, B, C, D, states, segment = ctx.saved_tensors
        b, l, h, p = x.shape
        g, n = B.shape[2:]
        q = ctx.q
        m, r = b * l // q, h // g
        s, enter, leave, across = _decays(dt, A, segment, b, q)
        Bm, Cm = (t.reshape(m, q, g, n).transpose(1, 2).reshape(m * g, q, n) for t in (B, C))
        xm, dtm, dym = x.reshape(m, q, h, p), dt.reshape(m, q, h, 1), dy.reshape(m, q, h, p)
        xdt = xm * dtm
        enter_q, leave_q = enter.transpose(1, 2)[..., None], leave.transpose(1, 2)[..., None]  # (m, q, h, 1)

        # Step 3 reversed, then step 2: the gradient of the state that leaves each chunk, from the last to the first.
        dread = _by_group(dym * enter_q, g)
        read = _wide_product(Cm.transpose(1, 2), dread).view(b, -1, g, n, r, p)
        dstate, leaving = to_inner(dfinal, g), []
        for k in reversed(range(l // q)):
            leaving.append(dstate.bfloat16())
            dstate = across[:, k].view(b, g, 1, r, 1) * dstate + read[:, k]
        dleft = torch.stack(leaving[::-1], 1).view(m * g, n, r * p)

        # Step 4, y = (L G) (dt x): E is the derivative by each exponent a_{j+1} + ... + a_i.
        G = _product(Cm, Bm.transpose(1, 2))
        M, L = _decay_matrix(s, _visible(segment, q, s.device), G, g)
        dy_heads = _by_head(dym)
        dM = _product(dy_heads, _by_head(xdt).transpose(1, 2)).view(m, h, q, q) * L
        dG = _sum_heads(dM.view(m, g, r, q, q)).bfloat16().view(m * g, q, q)
        E = (dM * G.view(m, g, 1, q, q).expand(-1, -1, r, -1, -1).reshape(m, h, q, q)).tril(-1)
        rows, columns = E.sum(-1), E.sum(-2)  # (m, h, q)
        inside = _product(M.bfloat16().view(m * h, q, q).transpose(1, 2), dy_heads).view(m, h, q, p).transpose(1, 2)

        # Steps 1 and 3, for what a token writes to the state that leaves and reads from the one that enters.
        through = _ungroup(_product(Bm, dleft), m, g, r) * leave_q
        start = (dym * enter_q * _ungroup(_product(Cm, states), m, g, r)).sum(-1)  # (m, q, h)
        dxdt = inside + through
        dx = dxdt * dtm
        if D is not None:
            dx = dx + D[:, None] * dym
        direct = (dxdt * xm).sum(-1)
        dB = _product(_by_group(xdt * leave_q, g), dleft.transpose(1, 2)) + _product(dG.transpose(1, 2), Cm)
        dC = _product(dread, states.transpose(1, 2)) + _product(dG, Bm)

        # a_k decays what tokens from k on read of the state that enters and of earlier tokens, and, in the state that
        # leaves, what earlier tokens wrote and what entered.
        written = (through * xdt).sum(-1)
        carried = across.view(m, 1, h) * (states.float() * dleft.float()).view(m, g, n, r, p).sum((2, 4)).view(m, 1, h)
        net = (rows - columns).transpose(1, 2) + start
        da = net.flip(1).cumsum(1).flip(1) + carried + written.cumsum(1) - written
        ddt = direct + da * A
        dA = (da * dtm[..., 0]).sum((0, 1))
        dD = None if D is None else (dym * xm.float()).sum((0, 1, 3))
        return (
            materialize(dx.to(x.dtype)).view(b, l, h, p),
            ddt.reshape(b, l, h),
            dA,
            *(materialize(t.to(B.dtype).view(m, g, q, n).transpose(1, 2)).view(b, l, g, n) for t in (dB, dC)),
            dD,
            to_outer(dstate),
            None,
            None,
        )


def _decays(dt: Tensor, A: Tensor, segment: Tensor | None, b: int, q: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s (m, h, q), the sums of a = dt A from each chunk's start, and three decays, zero across documents: exp(s_i),
    from the chunk's start to token i; exp(s_q - s_j), from token j to the chunk's end; exp(s_q) (b, c, h)."""
    h = A.shape[0]
    s = (dt * A).clamp_min(_FORGOTTEN).reshape(-1, q, h).transpose(1, 2).cumsum(-1)
    enter, leave = s.exp(), (s[..., -1:] - s).clamp_max(0).exp()
    if segment is not None:
        chunks = segment.view(b, -1, q)
        before = torch.cat([chunks.new_zeros(b, 1), chunks[:, :-1, -1]], dim=1).view(-1, 1)  # the document so far
        seg = segment.view(-1, q)
        enter = enter * (seg == before)[:, None]
        leave = leave * (seg == seg[:, -1:])[:, None]
    return s, enter, leave, enter[..., -1].view(b, -1, h)


def _decay_matrix(s: Tensor, visible: Tensor, G: Tensor, g: int) -> tuple[Tensor, Tensor]:
    """L G and L, (m, h, q, q): L is exp(s_i - s_j) where token i sees token j and 0 elsewhere."""
    m, h, q = s.shape
    L = (s[..., :, None] - s[..., None, :]).clamp_max(0).masked_fill(~visible, -torch.inf).exp()
    return (L.view(m, g, -1, q, q) * G.view(m, g, 1, q, q)).view(m, h, q, q), L


def _visible(segment: Tensor | None, q: int, device: torch.device) -> Tensor:
    """Where token i of a chunk sees token j: j <= i, in the same document. (m or 1, 1, q, q)"""
    position = torch.arange(q, device=device)
    causal = (position[:, None] >= position)[None, None]
    if segment is None:
        return causal
    seg = segment.view(-1, 1, q)
    return causal & (seg[..., :, None] == seg[..., None, :])


def _sum_heads(t: Tensor) -> Tensor:
    """(m, g, r, q, q) -> (m, g, q, q). A few heads at a time: a compiler's code for many reads single elements."""
    while (r := t.shape[2]) > 1:
        few = max([f for f in range(2, 8) if r % f == 0] or [r])
        t = t.unflatten(2, (r // few, few)).sum(3)
    return t.squeeze(2)


def _by_group(t: Tensor, g: int) -> Tensor:
    """(m, q, h, p) -> (m g, q, r p), in bf16."""
    m, q = t.shape[:2]
    return t.bfloat16().reshape(m, q, g, -1).transpose(1, 2).reshape(m * g, q, -1)


def _ungroup(t: Tensor, m: int, g: int, r: int) -> Tensor:
    """(m g, q, r p) -> (m, q, h, p)"""
    q = t.shape[1]
    return t.view(m, g, q, r, -1).transpose(1, 2).reshape(m, q, g * r, -1)


def _by_head(t: Tensor) -> Tensor:
    """(m, q, h, p) -> (m h, q, p), in bf16."""
    return t.bfloat16().transpose(1, 2).flatten(0, 1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for each of a batch, summed in float32, rounded to bf16, and returned as float32."""
    return (torch.bmm(a.float(), b.float()).bfloat16() if a.device.type == "cpu" else torch.bmm(a, b)).float()


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for each of a batch, summed in float32 and not rounded: for what is added to a state."""
    if a.device.type == "cpu":
        return torch.bmm(a.float(), b.float())
    return torch.bmm(a, b, out_dtype=torch.float32) if _BMM_WIDENS else torch.bmm(a, b).float()
