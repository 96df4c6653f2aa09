"""NaN and infinity never reach another document, nor an earlier token: neither a value nor a gradient."""

import contextlib
import math

import pytest
import torch
from instruments import relative_error
from test_bypass import IDS, mamba
from test_conv import make as make_convolution

from mamba2_min import ssd
from mamba2_min.ops.conv import causal_conv_silu

L, BAD = 23, 12  # documents of nine tokens; BAD is in the second
SEQ_IDX = torch.arange(L)[None] // 9
BEFORE, AFTER, REST = slice(0, BAD), slice(18, L), slice(BAD, 18)
FORMS = {
    "recurrent": lambda *args: ssd.ssd_recurrent(*args[:-1]),
    "quadratic": lambda *args: ssd.ssd_quadratic(*args[:-1]),
    "ssd_plain": ssd.ssd_plain,
    "chosen": ssd.ssd_chunked,
}


def make(dtype):
    r = torch.Generator().manual_seed(0)
    b, h, p, g, n = 1, 4, 3, 2, 5

    def normal(*shape):
        return torch.randn(*shape, generator=r, dtype=torch.float64).to(dtype)

    wide = torch.promote_types(dtype, torch.float32)
    return {
        "x": normal(b, L, h, p),
        "dt": normal(b, L, h).abs().to(wide),
        "A": -normal(h).abs().to(wide),
        "B": normal(b, L, g, n),
        "C": normal(b, L, g, n),
        "D": normal(h).to(wide),
        "initial_state": normal(b, h, p, n).to(wide),
    }


def run(form, case, seq_idx, kept):
    """y, the final state and the gradients of what is kept of y."""
    leaves = {name: t.clone().requires_grad_() for name, t in case.items()}
    y, state = form(*leaves.values(), seq_idx, 8)
    found = torch.autograd.grad(y[:, kept].square().sum(), list(leaves.values()))
    return y.detach(), state.detach(), dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("name", ["x", "dt", "B", "C"])
@pytest.mark.parametrize(
    "scan", [*FORMS, *(name for name in ssd.SCANS if name != "triton")]
)  # bf16 on a GPU: test_triton
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_scan_keeps_it_where_it_is(name, scan, bad):
    case = make(torch.bfloat16 if scan == "cuda" else torch.float64)
    tolerance = 1e-2 if scan == "cuda" else 1e-12
    harmed = {key: t.clone() for key, t in case.items()}
    head = 0 if name in ("B", "C") else 1  # of the first group
    harmed[name][0, BAD, head] = bad
    form = FORMS.get(scan, ssd.ssd_chunked)
    with ssd.using(scan) if scan in ssd.SCANS else contextlib.nullcontext():
        for seq_idx, kept in ((SEQ_IDX, [*range(BAD), *range(18, L)]), (None, list(range(BAD)))):
            (y, state, gradients), (exact, exact_state, expected) = (
                run(form, t, seq_idx, kept) for t in (harmed, case)
            )
            assert relative_error(y[:, kept], exact[:, kept]) <= tolerance
            assert y[:, BAD, 1].isnan().all() and y[:, BAD, 2:].isfinite().all()  # the other group has no part in it
            if name != "C":
                assert y[:, BAD:18, 1].isnan().all()
            if seq_idx is not None or name == "C":
                assert relative_error(state, exact_state) <= tolerance
            else:
                assert state[:, 1].isnan().all() and relative_error(state[:, 2:], exact_state[:, 2:]) <= tolerance
            for key, gradient in gradients.items():
                assert gradient.isfinite().all(), key
                assert relative_error(gradient, expected[key]) <= tolerance, key


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_state_that_is_not_finite_is_of_the_first_document(form):
    case = make(torch.float64)
    harmed = {**case, "initial_state": case["initial_state"].clone()}
    harmed["initial_state"][0, 1, 0, 0] = math.nan
    kept = list(range(9, L))
    (y, state, gradients), (exact, exact_state, expected) = (run(form, t, SEQ_IDX, kept) for t in (harmed, case))
    assert y[:, :9, 1].isnan().all() and relative_error(y[:, 9:], exact[:, 9:]) < 1e-12
    assert relative_error(state, exact_state) < 1e-12
    assert all(relative_error(gradients[key], expected[key]) < 1e-12 for key in gradients)


def test_values_of_which_the_sum_is_not_finite_are_left_alone():
    case = {key: t.float() for key, t in make(torch.float64).items()}
    case["x"][:] = 3e36
    assert case["x"].sum().isinf()
    y, state = ssd.ssd_recurrent(*case.values(), SEQ_IDX)
    exact, exact_state = ssd.ssd_recurrent(*(t.double() for t in case.values()), SEQ_IDX)
    assert relative_error(y, exact) < 1e-5 and relative_error(state, exact_state) < 1e-5


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_a_convolution_keeps_it_where_it_is(documents):
    case = make_convolution(1, 14, 3, 4, documents=False)
    case["seq_idx"] = torch.arange(14)[None] // 5 if documents else None
    kept = [*range(7), *(range(10, 14) if documents else range(11, 14))]

    def outputs(bad):
        leaves = {name: t.clone().requires_grad_() for name, t in case.items() if name in ("u", "weight", "bias")}
        u = leaves["u"].clone()
        u[0, 7, 1] = u[0, 7, 1] + bad
        y, state = causal_conv_silu(u, leaves["weight"], leaves["bias"], case["state"], case["seq_idx"])
        return y.detach(), state.detach(), torch.autograd.grad(y[:, kept].square().sum(), list(leaves.values()))

    (y, state, gradients), (exact, exact_state, expected) = outputs(math.nan), outputs(0.0)
    assert torch.equal(y[:, kept], exact[:, kept]) and torch.equal(state, exact_state)
    assert y[:, 7 : 10 if documents else 11, 1].isnan().all() and y[..., [0, 2]].isfinite().all()
    for gradient, other in zip(gradients, expected, strict=True):
        assert gradient.isfinite().all()
        assert relative_error(gradient, other) < 1e-12


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("scan", ["plain", "cpu"])
def test_a_model_keeps_it_where_it_is(documents, scan):
    """In one of two rows; with documents, in the second of three."""
    model = mamba()
    embeds = model.backbone.embedding(IDS).detach()
    seq_idx = torch.arange(14).expand(2, -1) // 5 if documents else None
    end = 10 if documents else 14
    kept = torch.tensor([*range(7), *range(end, 14)])

    def outputs(bad):
        leaf = embeds.clone().requires_grad_()
        x = leaf.clone()
        x[0, 7, 3] = x[0, 7, 3] + bad
        y, _ = model(inputs_embeds=x, seq_idx=seq_idx)
        return y.detach(), torch.autograd.grad(y[:, kept].square().sum(), leaf)[0]

    with ssd.using(scan):
        (y, gradient), (exact, expected) = outputs(math.nan), outputs(0.0)
    assert relative_error(y[:, kept], exact[:, kept]) < 1e-12 and relative_error(y[1], exact[1]) < 1e-12
    assert y[0, 7:end].isnan().all()
    assert relative_error(gradient[:, kept], expected[:, kept]) < 1e-12
    assert relative_error(gradient[1], expected[1]) < 1e-12
