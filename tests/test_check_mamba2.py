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
from mamba2_min.evaluation.check import MISTAKES, check_mamba2
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


def test_made_without_a_mistake_the_logits_are_the_models():
    config = Mamba2Config(**check._SHAPE, ngroups=2)
    model, _ = check._pair(lambda c: Mamba2LM(c, seed=1), config)
    ids = torch.randint(50, (2, 40))
    torch.testing.assert_close(check._forward(model, ids, ""), model(ids)[0], rtol=1e-4, atol=1e-5)


# What is changed in the solution to make each of MISTAKES.
IN_TEXT = {
    "order": [("z, xBC, dt = self", "xBC, z, dt = self"),
              ("[c.d_inner, c.d_inner + 2 * groups,", "[c.d_inner + 2 * groups, c.d_inner,")],
    "B and C": [("x, B, C = xBC.split", "x, C, B = xBC.split")],
    "no convolution bias": [("F.silu(self.conv1d(xBC.mT)", "F.silu((self.conv1d(xBC.mT) - self.conv1d.bias[:, None])")],
    "taps": [("self.conv1d(xBC.mT)",
              "F.conv1d(xBC.mT, self.conv1d.weight.flip(-1), self.conv1d.bias, 1, 3, 1, xBC.shape[-1])")],
    "centred": [("(xBC.mT)[..., : normed.shape[1]]", "(xBC.mT)[..., 2 : 2 + normed.shape[1]]")],
    "no SiLU": [("F.silu(self.conv1d", "(self.conv1d")],
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


OTHERS = {
    "mask after exp": ("masked_fill(~below, -torch.inf).exp()", "exp().tril()", "fill in -inf before exp"),
    "no padding": ("(0, -l % q)", "(0, 0)", "33 tokens, chunks of 32: it fails"),
    "state is not decayed": ("s[:, k, :, -1].exp()[..., None, None] * H", "H", "is the state handed on"),
    "the future": ("masked_fill(~below, -torch.inf)", "clamp(max=0)", "lets the future in"),
    "N(0, 1)": ("nn.init.normal_(self.embedding.weight, std=0.02)", "pass", "N(0, 0.02)"),
    "dt uniform": ("torch.exp(torch.empty(c.nheads).uniform_(math.log(c.dt_min), math.log(c.dt_max)))",
                   "torch.empty(c.nheads).uniform_(c.dt_min, c.dt_max)", "Draw log(dt) uniformly"),
    "no inverse": ("dt + torch.log(-torch.expm1(-dt))", "dt", "inverse of softplus"),
    "D starts at 0": ("torch.ones(c.nheads)", "torch.zeros(c.nheads)", "mixer.D starts at 1"),
    "one time scale": ("torch.arange(1.0, c.nheads + 1).log()", "torch.zeros(c.nheads)", "a time scale for each"),
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
    "unusual": ("F.silu(z)", "F.gelu(z)", "none of the usual mistakes"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_another_mistake_is_named(name):
    old, new, expected = OTHERS[name]
    assert expected in hint((old, new))
