"""check_mamba2: a right model passes, and each of the usual mistakes fails with the hint that names it.

The right model is the solution of notebook 3b, which shares no code with the package's model; the mistakes are made in
its text.
"""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mamba2_min.config import Mamba2Config
from mamba2_min.evaluation import check
from mamba2_min.evaluation.check import check_mamba2
from mamba2_min.evaluation.mistakes import MISTAKES, forward_with
from mamba2_min.models.mamba2 import Mamba2LM

nbformat = pytest.importorskip("nbformat", reason="the extra [notebooks] is not installed")

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
spec = importlib.util.spec_from_file_location("run_all", NOTEBOOKS / "run_all.py")
run_all = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_all)

SOLUTION = next(
    code
    for code in run_all.solutions(nbformat.read(NOTEBOOKS / "03b_write_it.ipynb", as_version=4))
    if "class MyMamba2" in code
).partition("check_mamba2(")[0]


def made(*changes):
    """The solution's class, after changes of its text, each (old, new)."""
    code = SOLUTION
    for old, new in changes:
        assert old in code, old
        code = code.replace(old, new)
    names = {"torch": torch, "nn": nn, "F": F, "math": math, "ForTheTrainer": nn.Module}
    exec(compile(code, "solution", "exec"), names)
    return names["MyMamba2"]


def hint(*changes):
    with pytest.raises(AssertionError) as error:
        check_mamba2(made(*changes))
    return str(error.value)


def test_the_solution_is_short_and_right(capsys):
    assert SOLUTION.count("\n") <= 120
    check_mamba2(made())
    assert capsys.readouterr().out.count("right:") == 8


def test_the_packages_own_model_is_right():
    """Its logits come in a tuple, with the state."""
    check_mamba2(lambda config: Mamba2LM(config, seed=0))


def test_the_official_rates_are_right():
    check_mamba2(made((RATES, "torch.empty(c.nheads).uniform_(1, 16).log()")))


def test_made_without_a_mistake_the_logits_are_the_models():
    config = Mamba2Config(**check._SHAPE, ngroups=2)
    model, _ = check._pair(lambda c: Mamba2LM(c, seed=1), config)
    ids = torch.randint(50, (2, 40))
    torch.testing.assert_close(forward_with("", model, ids), model(ids)[0], rtol=1e-4, atol=1e-5)


# What is changed in the solution to make each of MISTAKES.
IN_TEXT = {
    "order": [("z, xBC, dt = self", "xBC, z, dt = self"),
              ("[c.d_inner, c.d_inner + 2 * groups,", "[c.d_inner + 2 * groups, c.d_inner,")],
    "B and C": [("x, B, C = xBC.split", "x, C, B = xBC.split")],
    "no convolution bias": [("F.silu(self.conv1d(xBC.mT)", "F.silu((self.conv1d(xBC.mT) - self.conv1d.bias[:, None])")],
    "taps": [("self.conv1d(xBC.mT)",
              "F.conv1d(xBC.mT, self.conv1d.weight.flip(-1), self.conv1d.bias, 1, 3, 1, xBC.shape[-1])")],
    "centred": [("(xBC.mT)[..., : normed.shape[1]]", "(xBC.mT)[..., 2 : 2 + normed.shape[1]]")],
    "zeros after": [("(xBC.mT)[..., : normed.shape[1]]", "(xBC.mT)[..., 3:]")],
    "one zero after": [("(xBC.mT)[..., : normed.shape[1]]", "(xBC.mT)[..., 1 : 1 + normed.shape[1]]")],
    "no SiLU": [("F.silu(self.conv1d", "(self.conv1d")],
    "dt first": [("z, xBC, dt = self", "dt, z, xBC = self"),
                 ("[c.d_inner, c.d_inner + 2 * groups, c.nheads]", "[c.nheads, c.d_inner, c.d_inner + 2 * groups]")],
    "x only": [("        xBC = F.silu(", "        raw = xBC\n        xBC = F.silu("),
               ("x, B, C = xBC.split",
                "x, B, C = torch.cat([xBC[..., : c.d_inner], raw[..., c.d_inner :]], -1).split")],
    "x only, SiLU": [("        xBC = F.silu(", "        raw = F.silu(xBC)\n        xBC = F.silu("),
                     ("x, B, C = xBC.split",
                      "x, B, C = torch.cat([xBC[..., : c.d_inner], raw[..., c.d_inner :]], -1).split")],
    "heads": [("x.unflatten(-1, (c.nheads, c.headdim))", "x.unflatten(-1, (c.headdim, c.nheads)).mT")],
    "heads, and back": [("x.unflatten(-1, (c.nheads, c.headdim))", "x.unflatten(-1, (c.headdim, c.nheads)).mT"),
                        ("y.flatten(-2)", "y.mT.flatten(-2)")],
    "exp": [("F.softplus(dt.float() + self.dt_bias)", "torch.exp(dt.float() + self.dt_bias)")],
    "clamped": [("F.softplus(dt.float() + self.dt_bias)",
                 "F.softplus(dt.float() + self.dt_bias).clamp(c.dt_min, c.dt_max)")],
    "sign of A": [("-self.A_log.exp()", "self.A_log.exp()")],
    "dt twice": [("X = dt[..., None] * x", "X = dt[..., None] ** 2 * x")],
    "zero before exp": [("masked_fill(~below, -torch.inf)", "masked_fill(~below, 0)")],
    "own state": [("        entering.append(H)\n", ""),
                  ("+ added[:, k]\n", "+ added[:, k]\n        entering.append(H)\n")],
    "not handed on": [("s[:, k, :, -1].exp()[..., None, None] * H + added", "added")],
    "not decayed": [("s[:, k, :, -1].exp()[..., None, None] * H", "H")],
    "not read": [("    y = y + (s.exp()[..., None] * C) @ torch.stack(entering, 1)", "    pass")],
    "added": [("((s[..., -1:] - s).exp()[..., None] * X)", "X")],
    "read": [("(s.exp()[..., None] * C)", "C")],
    "read late": [("(s.exp()[..., None] * C)", "((s - dt * A[:, None]).exp()[..., None] * C)")],
    "in front": [("(0, -l % q))", "(-l % q, 0))")],
    "D dt x": [("self.D[:, None] * x", "self.D[:, None] * dt[..., None] * x")],
    "D z": [("self.D[:, None] * x", "self.D[:, None] * z.unflatten(-1, (c.nheads, c.headdim))")],
    "eps outside": [("(parts.square().mean(-1, keepdim=True) + self.eps).rsqrt()",
                     "1 / (parts.square().mean(-1, keepdim=True).sqrt() + self.eps)")],
    "no root": [("rsqrt()", "reciprocal()")],
    "LayerNorm": [("parts = v.unflatten(-1, (self.groups, -1))",
                   "parts = v.unflatten(-1, (self.groups, -1))\n        parts = parts - parts.mean(-1, keepdim=True)")],
    "scaled embedding": [("stream = self.embedding(ids)", "stream = 8 * self.embedding(ids)")],
    "no dt_bias": [("dt.float() + self.dt_bias", "dt.float()")],
    "softplus first": [("F.softplus(dt.float() + self.dt_bias)", "F.softplus(dt.float()) + self.dt_bias")],
    "A": [("-self.A_log.exp()", "-self.A_log")],
    "no dt": [("X = dt[..., None] * x", "X = x")],
    "late": [("y = ((C @ B.mT) * L) @ X", "y = ((C @ B.mT) * L.tril(-1)) @ X")],
    "early decay": [("X = dt[..., None] * x", "X = (dt * (dt * A[:, None]).exp())[..., None] * x")],
    "no D": [(" + self.D[:, None] * x", "")],
    "sigmoid": [("F.silu(z)", "F.sigmoid(z)")],
    "plain gate": [("F.silu(z)", "z")],
    "no gated norm": [("self.norm(y.flatten(-2) * F.silu(z))", "y.flatten(-2) * F.silu(z)")],
    "norm first": [("self.norm(y.flatten(-2) * F.silu(z))", "self.norm(y.flatten(-2)) * F.silu(z)")],
    "one norm": [("Norm(c.d_inner, c.ngroups)", "Norm(c.d_inner)")],
    "groups": [("t.repeat_interleave(h // t.shape[2], dim=2)", "t.repeat(1, 1, h // t.shape[2], 1)")],
    "first norm": [("self.mixer(self.norm(stream))", "self.mixer(stream)")],
    "no residual": [("return stream + self.mixer", "return self.mixer")],
    "last norm": [("return self.norm_f(stream)", "return stream")],
    "eps": [("eps=1e-5", "eps=1e-6")],
}  # fmt: skip


def test_every_mistake_is_tried():
    assert IN_TEXT.keys() == MISTAKES.keys()


@pytest.mark.parametrize("name", IN_TEXT)
def test_a_mistake_in_the_logits_is_named(name):
    assert MISTAKES[name] in hint(*IN_TEXT[name])


RATES = "torch.arange(1.0, c.nheads + 1).log()"
NEW_DT = "torch.exp(torch.empty(c.nheads).uniform_(math.log(c.dt_min), math.log(c.dt_max)))"
DIFFERENCE = "(s[..., :, None] - s[..., None, :]).masked_fill(~below, -torch.inf).exp()"
ROUNDED = "not bf16"

OTHERS = {
    "mask after exp": ("masked_fill(~below, -torch.inf).exp()", "exp().tril()", "fill in -inf before exp"),
    "times the mask": ("masked_fill(~below, -torch.inf).exp()", "exp() * below", "fill in -inf before exp"),
    "two exps": (DIFFERENCE, "(s.exp()[..., :, None] * (-s).exp()[..., None, :]).tril()", "do not split it"),
    "dt in bf16": ("F.softplus(dt.float() + self.dt_bias)", "F.softplus(dt + self.dt_bias).bfloat16()", ROUNDED),
    "decay in bf16": (".cumsum(-1)", ".bfloat16().float().cumsum(-1)", ROUNDED),
    "sums between chunks in bf16": ("s[:, k, :, -1].exp()", "s[:, k, :, -1].bfloat16().exp()", ROUNDED),
    "state in bf16": ("* H + added[:, k]", "* H + added[:, k].bfloat16().float()", ROUNDED),
    "rates without log": (RATES, "torch.arange(1.0, c.nheads + 1)", "Your -A begins with 2.72, 7.39"),
    "rates from 0": (RATES, "torch.arange(0.0, c.nheads)", "a time scale for each"),
    "rates twice": (RATES, "2 * " + RATES, "Your -A begins with 1, 4, 9"),
    "rates in reverse": (RATES, RATES + ".flip(0)", "over the heads"),
    "one dt": (NEW_DT, "torch.full((c.nheads,), math.sqrt(c.dt_min * c.dt_max))", "a dt of its own"),
    "log of dt": ("dt + torch.log(-torch.expm1(-dt))", "dt.log()", "only where dt is small"),
    "bias 0": ("self.A_log = nn", "self.conv1d.bias.data.zero_(); self.A_log = nn", "conv1d.bias starts"),
    "no padding": ("(0, -l % q)", "(0, 0)", "33 tokens, chunks of 32: it fails"),
    "state fades twice": ("s[:, k, :, -1].exp()[..., None, None] * H", "s[:, k, :, -1, None, None].exp() ** 2 * H",
                          "between chunks"),
    "the future": ("masked_fill(~below, -torch.inf)", "masked_fill(~below, -1)", "lets the future in"),
    "N(0, 1)": ("nn.init.normal_(self.embedding.weight, std=0.02)", "pass", "N(0, 0.02)"),
    "dt uniform": (NEW_DT, "torch.empty(c.nheads).uniform_(c.dt_min, c.dt_max)", "Draw log(dt) uniformly"),
    "no inverse": ("dt + torch.log(-torch.expm1(-dt))", "dt", "inverse of softplus"),
    "D starts at 0": ("torch.ones(c.nheads)", "torch.zeros(c.nheads)", "mixer.D starts at 1"),
    "one time scale": (RATES, "torch.zeros(c.nheads)", "a time scale for each"),
    "depth": ("/= math.sqrt(c.n_layer)", "/= 1", "divided by sqrt(n_layer); yours is 2.0"),
    "a wrong name": ("self.norm_f", "self.norm_last", "parameters are missing: backbone.norm_f.weight"),
    "a buffer": ("self.embedding = nn", "self.register_buffer('mask', torch.ones(3)); self.embedding = nn",
                 "the official model has no backbone.mask"),
    "a wrong shape": ("nn.Linear(c.d_inner, c.d_model, bias=False)", "nn.Linear(c.d_model, c.d_inner, bias=False)",
                      "out_proj.weight must be (64, 128), not (128, 64)"),
    "untied": ("self.lm_head.weight = self.backbone.embedding.weight", "pass", "the same parameter"),
    "detached": ("-self.A_log.exp()", "-self.A_log.detach().exp()", "A_log has no gradient"),
    "dt detached": ("X = dt[..., None] * x", "X = dt.detach()[..., None] * x", "though the logits are right"),
    "the last logits": ("self.lm_head(self.backbone(ids))", "self.lm_head(self.backbone(ids))[:, -1]",
                                 "logits must be (2, 96, 50), not (2, 50)"),
    "unusual": ("F.silu(z)", "F.gelu(z)", "none of the mistakes that are known"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_another_mistake_is_named(name):
    old, new, expected = OTHERS[name]
    assert expected in hint((old, new))
