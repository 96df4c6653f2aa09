"""The usual mistakes in a Mamba-2, each made on purpose, with the hint that names it, for `check_mamba2`.

One forward pass in plain tensors, where `mistake` says what is done wrong; "" does everything right. It is written for
the small models of the check: float32, no state to begin with, no dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba2_min.models.mamba2 import Mamba2LM, Mamba2Mixer
from mamba2_min.ops.norm import rms_norm_plain

_X_ONLY = "the convolution and SiLU run over x, B and C together, not over x alone."
_HEADS = "channels of a head are neighbours: unflatten to (nheads, headdim), not (headdim, nheads)."
_ZEROS = "the convolution sees the future: put d_conv - 1 zeros before the first token, none after the last."
_EPS = "eps is 1e-5, added to the mean square inside of the root."

MISTAKES = {
    "order": "in_proj gives z, x, B, C, dt, in this order; yours seems to take x, B, C before z.",
    "dt first": "in_proj gives z, x, B, C, dt, in this order; yours seems to take dt first.",
    "B and C": "B and C are swapped: after the convolution come x, B, C, in this order.",
    "no convolution bias": "conv1d has a bias, and it is not added.",
    "taps": "the taps are in reverse: the last one, weight[:, 0, 3], belongs to the token itself.",
    "zeros after": _ZEROS,
    "centred": _ZEROS,
    "one zero after": _ZEROS,
    "no SiLU": "x, B and C pass through SiLU after the convolution.",
    "x only": _X_ONLY,
    "x only, SiLU": _X_ONLY,
    "heads": _HEADS,
    "heads, and back": _HEADS,
    "no dt_bias": "dt is softplus(dt + dt_bias); dt_bias is missing.",
    "softplus first": "dt_bias goes inside: softplus(dt + dt_bias), not softplus(dt) + dt_bias.",
    "exp": "dt is softplus(dt + dt_bias), not exp(dt + dt_bias).",
    "clamped": "dt is clamped. [dt_min, dt_max] limits how dt_bias starts, not what a token makes of it.",
    "A": "A = -exp(A_log), not -A_log.",
    "sign of A": "A = -exp(A_log), not +exp(A_log): a state that does not fade grows until it overflows.",
    "no dt": "what is written is dt B x; dt is in the decay exp(dt A), but missing here.",
    "dt twice": "what is written is dt B x; yours has dt twice.",
    "late": "a token reads the state after its own write: y_t = C_t H_t, not C_t H_(t-1).",
    "early decay": "a token's own decay must not shrink what it writes: L is 1 on the diagonal.",
    "zero before exp": "above the diagonal goes -inf before exp. You seem to fill in 0 there, and exp(0) is 1.",
    "own state": "a chunk reads the state that enters it: note H down before the loop updates it, not after.",
    "not handed on": "the state is not handed on: H = exp(s_last) H + added, from chunk to chunk.",
    "not decayed": "on its way through a chunk the state fades: H = exp(s_last) H + added, not H + added.",
    "not read": "what the chunks before left in the state is not read: add C_i exp(s_i) H to y.",
    "added": "what a token adds to the state fades until the chunk's end: exp(s_last - s_j) is missing.",
    "read": "a token reads the entering state after it has faded to it: C_i exp(s_i) H; exp(s_i) is missing.",
    "read late": "a token reads the entering state after its own decay, too: C_i exp(s_i) H, not exp(s_i - a_i).",
    "in front": "fill the last chunk up behind the last token. You seem to fill up in front, and to keep the first l.",
    "no D": "the skip D x is missing from y.",
    "D dt x": "the skip is D x, without dt: take x as it is before it is multiplied with dt.",
    "D z": "the skip is D x, of the x that the scan takes; yours seems to be D z.",
    "sigmoid": "the gate is SiLU(z) = z sigmoid(z), not sigmoid(z).",
    "plain gate": "the gate is y SiLU(z), not y z.",
    "no gated norm": "the norm between gate and out_proj is missing.",
    "norm first": "first the gate, then the norm: norm(y SiLU(z)), not norm(y) SiLU(z).",
    "one norm": "with several groups, each group of d_inner / ngroups channels has an rms of its own.",
    "groups": "head k reads the B and C of group k // (nheads / ngroups): repeat_interleave, not repeat.",
    "first norm": "each block begins with a norm, of the stream that it reads.",
    "no residual": "a block's output is added to the stream; it does not replace it.",
    "last norm": "norm_f, the norm before the head, is missing.",
    "eps": _EPS,
    "eps outside": _EPS,
    "no root": "a norm divides by the root of the mean square: rsqrt, not reciprocal.",
    "LayerNorm": "the norms are RMS norms: no mean is subtracted (LayerNorm does that).",
    "scaled embedding": "the stream begins with the embedding as it is, not times sqrt(d_model).",
}


def forward_with(mistake: str, model: Mamba2LM, ids: Tensor) -> Tensor:
    """The logits (b, l, vocab_size) of the model with one of MISTAKES made, or with "" as they should be."""
    stream = model.backbone.embedding.weight[ids]
    if mistake == "scaled embedding":
        stream = stream * model.config.d_model**0.5
    for block in model.backbone.blocks:
        normed = stream if mistake == "first norm" else _norm(stream, block.norm.weight, 1, mistake)
        out = _mixed(block.mixer, normed, mistake)
        stream = out if mistake == "no residual" else stream + out
    if mistake != "last norm":
        stream = _norm(stream, model.backbone.norm_f.weight, 1, mistake)
    return stream @ model.lm_head.weight.T


def _norm(v: Tensor, weight: Tensor, groups: int, mistake: str) -> Tensor:
    parts = v.unflatten(-1, (groups, -1))
    if mistake == "LayerNorm":
        parts = parts - parts.mean(-1, keepdim=True)
    mean = parts.square().mean(-1, keepdim=True)
    if mistake == "no root":
        return (parts / (mean + 1e-5)).flatten(-2) * weight
    if mistake == "eps outside":
        return (parts / (mean.sqrt() + 1e-5)).flatten(-2) * weight
    return rms_norm_plain(parts.flatten(-2), weight, 1e-6 if mistake == "eps" else 1e-5, groups)


def _mixed(m: Mamba2Mixer, u: Tensor, mistake: str) -> Tensor:
    """One mixer, (b, l, d_model) -> the same."""
    c = m.config
    wires = u @ m.in_proj.weight.T
    if mistake == "order":
        xBC, z, dt = wires.split([c.conv_dim, c.d_inner, c.nheads], dim=-1)
    elif mistake == "dt first":
        dt, z, xBC = wires.split([c.nheads, c.d_inner, c.conv_dim], dim=-1)
    else:
        z, xBC, dt = wires.split([c.d_inner, c.conv_dim, c.nheads], dim=-1)
    x, B, C = m._split_heads(_convolved(m, xBC, mistake))
    if mistake.startswith("heads"):
        x = x.flatten(-2).unflatten(-1, (c.headdim, c.nheads)).mT
    if mistake == "B and C":
        B, C = C, B
    if mistake == "groups":
        B, C = (t.repeat(1, 1, c.nheads // c.ngroups, 1) for t in (B, C))
    dt, A = _steps(m, dt, mistake), {"A": -m.A_log, "sign of A": m.A_log.exp()}.get(mistake, -m.A_log.exp())
    skip = {"D z": z.unflatten(-1, (c.nheads, c.headdim)), "D dt x": dt[..., None] * x, "no D": 0 * x}.get(mistake, x)
    y = _scanned(x, dt, A, B, C, c.chunk_size, mistake) + m.D[:, None] * skip
    y = (y.mT if mistake == "heads, and back" else y).flatten(-2)
    gate = {"sigmoid": z.sigmoid(), "plain gate": z}.get(mistake, F.silu(z))
    groups = 1 if mistake == "one norm" else c.ngroups
    if mistake == "no gated norm":
        y = y * gate
    elif mistake == "norm first":
        y = _norm(y, m.norm.weight, groups, mistake) * gate
    else:
        y = _norm(y * gate, m.norm.weight, groups, mistake)
    return y @ m.out_proj.weight.T


def _convolved(m: Mamba2Mixer, xBC: Tensor, mistake: str) -> Tensor:
    """x, B and C after convolution and SiLU, (b, l, conv_dim)."""
    c = m.config
    before = {"zeros after": 0, "centred": 1, "one zero after": c.d_conv - 2}.get(mistake, c.d_conv - 1)
    taps = m.conv1d.weight.flip(-1) if mistake == "taps" else m.conv1d.weight
    bias = None if mistake == "no convolution bias" else m.conv1d.bias
    padded = F.pad(xBC.transpose(1, 2), (before, c.d_conv - 1 - before))
    out = F.conv1d(padded, taps, bias, groups=c.conv_dim).transpose(1, 2)
    out = out if mistake == "no SiLU" else F.silu(out)
    if mistake.startswith("x only"):
        rest = xBC[..., c.d_inner :]
        out = torch.cat([out[..., : c.d_inner], F.silu(rest) if mistake == "x only, SiLU" else rest], dim=-1)
    return out


def _steps(m: Mamba2Mixer, dt: Tensor, mistake: str) -> Tensor:
    """dt as the scan takes it, (b, l, h)."""
    if mistake == "softplus first":
        return F.softplus(dt) + m.dt_bias
    if mistake == "exp":
        return (dt + m.dt_bias).exp()
    dt = F.softplus(dt if mistake == "no dt_bias" else dt + m.dt_bias)
    return dt.clamp(m.config.dt_min, m.config.dt_max) if mistake == "clamped" else dt


def _scanned(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, q: int, mistake: str) -> Tensor:
    """The scan in chunks of q tokens, x (b, l, h, p) -> y (b, l, h, p)."""
    if mistake == "no dt":
        x = x / dt[..., None]
    if mistake == "dt twice":
        x = x * dt[..., None]
    if mistake == "early decay":
        x = x * torch.exp(dt * A)[..., None]
    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in (B, C))
    H, ys = x.new_zeros(len(x), x.shape[2], x.shape[3], B.shape[3]), []
    for start in range(0, x.shape[1], q):
        x_, dt_, B_, C_ = (t[:, start : start + q] for t in (x, dt, B, C))
        y, H = _chunk(x_, dt_, A, B_, C_, H, mistake)
        ys.append(y)
    y = torch.cat(ys, dim=1)
    if mistake == "late":
        y = y - ((C * B).sum(-1) * dt)[..., None] * x
    if mistake == "in front":
        y = F.pad(y, (0, 0, 0, 0, -y.shape[1] % q, 0))[:, : y.shape[1]]
    return y


def _chunk(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, H: Tensor, mistake: str) -> tuple[Tensor, Tensor]:
    """One chunk, which the state H (b, h, p, n) enters: its y, and the state that leaves it."""
    X, s = dt[..., None] * x, (dt * A).cumsum(1)  # s (b, q, h)
    future = torch.ones(2 * [x.shape[1]], dtype=torch.bool).triu(1)[..., None]
    above = 0.0 if mistake == "zero before exp" else -torch.inf
    L = (s[:, :, None] - s[:, None]).masked_fill(future, above).exp()  # (b, i, j, h)
    y = torch.einsum("bihn,bjhn,bijh,bjhp->bihp", C, B, L, X)
    to_end = torch.ones_like(s) if mistake == "added" else (s[:, -1:] - s).exp()
    added = torch.einsum("bjh,bjhp,bjhn->bhpn", to_end, X, B)
    kept = H if mistake == "not decayed" else s[:, -1, :, None, None].exp() * H
    left = added if mistake == "not handed on" else kept + added
    share = {"read": torch.zeros_like(s), "read late": s - dt * A}.get(mistake, s).exp()
    read = torch.einsum("bihn,bhpn->bihp", C, left if mistake == "own state" else H)
    return (y if mistake == "not read" else y + share[..., None] * read), left
