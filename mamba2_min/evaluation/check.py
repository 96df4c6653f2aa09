"""`check_mamba2`: is a Mamba-2 that somebody wrote right? Where it is not, the hint names the likely mistake.

The model in question is compared with `Mamba2LM`, at the same weights: names and shapes of the parameters, how a new
model's numbers are drawn, logits at several lengths and with several groups, and gradients, also where a head forgets
at once. Where the logits differ, the usual mistakes are made on purpose, one at a time (`MISTAKES`). If one of them
gives the very logits that the model in question gave, that is the hint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba2_min.config import Mamba2Config
from mamba2_min.models.mamba2 import Mamba2LM, Mamba2Mixer
from mamba2_min.ops.norm import rms_norm_plain
from mamba2_min.ssd import ssd_plain

_SHAPE: dict[str, Any] = {"vocab_size": 50, "d_model": 64, "n_layer": 2, "d_state": 16, "headdim": 16, "chunk_size": 32}

MISTAKES = {
    "order": "in_proj gives z, x, B, C, dt, in this order; yours seems to take x, B, C before z.",
    "B and C": "B and C are swapped: after the convolution come x, B, C, in this order.",
    "no convolution bias": "conv1d has a bias, and it is not added.",
    "taps": "the taps are in reverse: the last one, weight[:, 0, 3], belongs to the token itself.",
    "centred": "the convolution sees the future: put d_conv - 1 zeros before the first token, none after the last.",
    "no SiLU": "x, B and C pass through SiLU after the convolution.",
    "no dt_bias": "dt is softplus(dt + dt_bias); dt_bias is missing.",
    "softplus first": "dt_bias goes inside: softplus(dt + dt_bias), not softplus(dt) + dt_bias.",
    "A": "A = -exp(A_log), not -A_log.",
    "no dt": "what is written is dt B x; dt is missing. (It is not in A alone.)",
    "late": "a token reads the state after its own write: y_t = C_t H_t, not C_t H_(t-1).",
    "early decay": "a token's own decay must not shrink what it writes: L is 1 on the diagonal.",
    "no D": "the skip D x is missing from y.",
    "sigmoid": "the gate is SiLU(z) = z sigmoid(z), not sigmoid(z).",
    "plain gate": "the gate is y SiLU(z), not y z.",
    "no gated norm": "the norm between gate and out_proj is missing.",
    "norm first": "first the gate, then the norm: norm(y SiLU(z)), not norm(y) SiLU(z).",
    "one norm": "with several groups, each group of d_inner / ngroups channels has an rms of its own.",
    "groups": "head k reads the B and C of group k // (nheads / ngroups): repeat_interleave, not repeat.",
    "first norm": "each block begins with a norm, of the stream that it reads.",
    "no residual": "a block's output is added to the stream; it does not replace it.",
    "last norm": "norm_f, the norm before the head, is missing.",
    "eps": "eps is 1e-5, added to the mean square inside of the root.",
}

_NAN = "Above the diagonal s_i - s_j > 0, and its exp overflows: fill in -inf before exp, not 0 after it."


def check_mamba2(make: Callable[[Mamba2Config], nn.Module]) -> None:
    """Checks a Mamba-2 against the package's and prints what is right; AssertionError, with a hint, where it is wrong.

    make(config) returns a new model, with the names and shapes of the official parameters. Called with ids (b, l) it
    returns logits (b, l, vocab_size), or a tuple that begins with them.
    """
    torch.manual_seed(0)
    config = Mamba2Config(**_SHAPE)
    _check_names(make(config), config)
    print("right: names and shapes")
    _check_start(make(Mamba2Config(vocab_size=50, d_model=128, n_layer=4, d_state=8, headdim=4)))
    print("right: how a new model's numbers are drawn")
    cases = [("96 tokens, three chunks", 96, 1), ("two groups", 96, 2)]
    cases += [(f"{length} tokens, chunks of 32", length, 1) for length in (33, 5, 1)]
    for name, length, ngroups in cases:
        _check_logits(make, Mamba2Config(**_SHAPE, ngroups=ngroups), length, name)
        print(f"right: {name}")
    _check_gradients(make, config)
    print("right: gradients, also of a head that forgets at once")


def _check_names(model: nn.Module, config: Mamba2Config) -> None:
    wanted = {name: tuple(p.shape) for name, p in Mamba2LM(config, seed=0).state_dict().items()}
    found = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    assert not missing, (
        f"parameters are missing: {', '.join(missing[:4])}. Unknown here: {', '.join(unknown[:4]) or '-'}"
    )
    assert not unknown, f"the official model has no {', '.join(unknown[:4])}. (A constant tensor is no parameter.)"
    for name, shape in wanted.items():
        hint = " (nn.Linear keeps its weight as (outputs, inputs), a depthwise nn.Conv1d as (channels, 1, taps).)"
        assert found[name] == shape, f"{name} must be {shape}, not {found[name]}.{hint}"
    head, embedding = model.get_parameter("lm_head.weight"), model.get_parameter("backbone.embedding.weight")
    assert head is embedding, "with tie_embeddings, lm_head.weight is the embedding's weight: the same parameter."


def _check_start(model: nn.Module) -> None:
    """The numbers of a new model of 4 layers, width 128, 64 heads."""
    p = {name: value.detach().double() for name, value in model.state_dict().items()}
    size = p["backbone.embedding.weight"].std().item()
    hint = "with N(0, 1), PyTorch's own, the first loss is far above ln(vocab_size)."
    assert 0.015 < size < 0.025, (
        f"the embedding starts as N(0, 0.02); yours has a standard deviation of {size:.2g}: {hint}"
    )
    layers = [f"backbone.layers.{k}." for k in range(4)]
    dt = F.softplus(torch.cat([p[layer + "mixer.dt_bias"] for layer in layers]))
    assert ((dt > 0.9e-3) & (dt < 0.11)).all(), (
        f"softplus(dt_bias) must lie in [dt_min, dt_max] = [0.001, 0.1]; yours is {dt.min():.2g} to {dt.max():.2g}. "
        "dt_bias is the inverse of softplus, dt + log(-expm1(-dt)), of a dt that was drawn."
    )
    assert 0.006 < dt.median() < 0.017, (
        f"dt starts log-uniform in [0.001, 0.1], with a median near 0.01; yours has {dt.median():.2g}. "
        "Draw log(dt) uniformly, not dt."
    )
    A = torch.cat([p[layer + "mixer.A_log"] for layer in layers]).exp()
    assert A.min() >= 0.999 and A.std() > 1, (
        "A_log starts at log(1), log(2), ... over the heads: a time scale for each."
    )
    for name in ("mixer.D", "norm.weight", "mixer.norm.weight"):
        assert all((p[layer + name] == 1).all() for layer in layers), f"{name} starts at 1."
    for name, inputs, wanted in (("in_proj", 128, 1.0), ("out_proj", 256, 0.5)):
        weights = torch.cat([p[f"{layer}mixer.{name}.weight"].flatten() for layer in layers])
        ratio = (weights.std() * math.sqrt(3 * inputs)).item()
        rule = "U(+-1/sqrt(inputs))" + (", divided by sqrt(n_layer)" if name == "out_proj" else "")
        assert abs(ratio / wanted - 1) < 0.1, f"{name} starts as {rule}; yours is {ratio / wanted:.2f} times as large."


def _check_logits(make: Callable[[Mamba2Config], nn.Module], config: Mamba2Config, length: int, case: str) -> None:
    theirs, yours = _pair(make, config)
    ids = torch.randint(config.vocab_size, (2, length))
    with torch.no_grad():
        try:
            out = _call(yours, ids)
        except Exception as error:
            hint = "" if length % config.chunk_size == 0 else " Is the last chunk filled up, with tokens of dt = 0?"
            raise AssertionError(f"{case}: it fails with {type(error).__name__}: {error}.{hint}") from error
        wanted = theirs(ids)[0]
        assert out.shape == wanted.shape, f"{case}: logits must be {tuple(wanted.shape)}, not {tuple(out.shape)}."
        if not out.isfinite().all():
            hint = _likely(lambda name: not _forward(theirs, ids, name).isfinite().all()) or _NAN
            raise AssertionError(f"{case}: logits are not finite. {hint}")
        if _close(out, wanted):
            return
        hint = _likely(lambda name: _close(out, _forward(theirs, ids, name)))
        if not hint and length > 1:
            other = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % config.vocab_size], dim=1)
            q = config.chunk_size
            if not torch.allclose(_call(yours, other)[:, :-1], out[:, :-1], atol=1e-5):
                hint = "the last token changes earlier logits: a mask or the convolution lets the future in."
            elif length > q and _close(out[:, :q], wanted[:, :q]):
                hint = "the first chunk is right: is the state handed on, and decayed, from chunk to chunk?"
    gap = ((out - wanted).abs().max() / wanted.abs().max()).item()
    hint = hint or "It is none of the usual mistakes. Compare wire by wire with notebook 3, 3.2."
    raise AssertionError(f"{case}: logits differ by {gap:.2g} of the largest. {hint}")


def _likely(fits: Callable[[str], Any]) -> str:
    """The hint of the first of MISTAKES that fits, "" if none does."""
    return next((hint for name, hint in MISTAKES.items() if fits(name)), "")


def _check_gradients(make: Callable[[Mamba2Config], nn.Module], config: Mamba2Config) -> None:
    theirs, yours = _pair(make, config)
    ids, answers = torch.randint(config.vocab_size, (2, 2, 64))
    for model in (theirs, yours):
        model.get_parameter("backbone.layers.0.mixer.dt_bias").data[0] = 20.0  # this head forgets at once
    F.cross_entropy(theirs(ids)[0].flatten(0, 1), answers.flatten()).backward()
    out = _call(yours, ids)
    assert out.isfinite().all(), f"a head that forgets at once: logits are not finite. {_NAN}"
    F.cross_entropy(out.flatten(0, 1), answers.flatten()).backward()
    for name, parameter in theirs.named_parameters():
        wanted, found = parameter.grad, yours.get_parameter(name).grad
        assert wanted is not None
        assert found is not None, f"{name} has no gradient: is it used, and without .detach() or .data?"
        assert found.isfinite().all(), f"the gradient of {name} is not finite. {_NAN}"
        gap = ((found - wanted).norm() / wanted.norm().clamp(min=1e-8)).item()
        assert gap < 1e-2, f"the gradient of {name} differs by {gap:.2g} of its size, though the logits are right."


def _pair(make: Callable[[Mamba2Config], nn.Module], config: Mamba2Config) -> tuple[Mamba2LM, nn.Module]:
    """The package's model and yours, at the same weights, none of which is at a special value such as 0 or 1."""
    theirs, yours = Mamba2LM(config, seed=0), make(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith(("mixer.D", "norm.weight", "norm_f.weight")):
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            elif name.endswith("dt_bias"):
                parameter.add_(3)  # steps of about 0.2, so that every mistake in them shows
    yours.load_state_dict(theirs.state_dict())
    return theirs, yours


def _call(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids)
    return out[0] if isinstance(out, tuple) else out


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-3 * b.abs().max())


def _forward(model: Mamba2LM, ids: Tensor, mistake: str) -> Tensor:
    """The logits of the model with one of MISTAKES made, or with "" as they should be."""
    eps = 1e-6 if mistake == "eps" else model.config.norm_eps
    stream = model.backbone.embedding.weight[ids]
    for block in model.backbone.blocks:
        normed = stream if mistake == "first norm" else rms_norm_plain(stream, block.norm.weight, eps)
        out = _mixed(block.mixer, normed, eps, mistake)
        stream = out if mistake == "no residual" else stream + out
    if mistake != "last norm":
        stream = rms_norm_plain(stream, model.backbone.norm_f.weight, eps)
    return stream @ model.lm_head.weight.T


def _mixed(m: Mamba2Mixer, u: Tensor, eps: float, mistake: str) -> Tensor:
    """One mixer, (b, l, d_model) -> the same."""
    c = m.config
    wires = u @ m.in_proj.weight.T
    if mistake == "order":
        xBC, z, dt = wires.split([c.conv_dim, c.d_inner, c.nheads], dim=-1)
    else:
        z, xBC, dt = wires.split([c.d_inner, c.conv_dim, c.nheads], dim=-1)
    before = 1 if mistake == "centred" else c.d_conv - 1
    taps = m.conv1d.weight.flip(-1) if mistake == "taps" else m.conv1d.weight
    bias = None if mistake == "no convolution bias" else m.conv1d.bias
    padded = F.pad(xBC.transpose(1, 2), (before, c.d_conv - 1 - before))
    xBC = F.conv1d(padded, taps, bias, groups=c.conv_dim).transpose(1, 2)
    x, B, C = m._split_heads(xBC if mistake == "no SiLU" else F.silu(xBC))
    if mistake == "B and C":
        B, C = C, B
    if mistake == "groups":
        B, C = (t.repeat(1, 1, c.nheads // c.ngroups, 1) for t in (B, C))
    if mistake == "softplus first":
        dt = F.softplus(dt) + m.dt_bias
    else:
        dt = F.softplus(dt if mistake == "no dt_bias" else dt + m.dt_bias)
    A = -m.A_log if mistake == "A" else -m.A_log.exp()
    y = _scanned(x, dt, A, B, C, mistake)
    y = (y if mistake == "no D" else y + m.D[:, None] * x).flatten(-2)
    gate = {"sigmoid": z.sigmoid(), "plain gate": z}.get(mistake, F.silu(z))
    groups = 1 if mistake == "one norm" else c.ngroups
    if mistake == "no gated norm":
        y = y * gate
    elif mistake == "norm first":
        y = rms_norm_plain(y, m.norm.weight, eps, groups) * gate
    else:
        y = rms_norm_plain(y * gate, m.norm.weight, eps, groups)
    return y @ m.out_proj.weight.T


def _scanned(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, mistake: str) -> Tensor:
    if mistake == "no dt":
        x = x / dt[..., None]
    if mistake == "early decay":
        x = x * torch.exp(dt * A)[..., None]
    y, _ = ssd_plain(x, dt, A, B, C)
    if mistake == "late":
        own = (C * B).sum(-1).repeat_interleave(x.shape[2] // B.shape[2], dim=2)  # (b, l, h)
        y = y - (own * dt)[..., None] * x
    return y
