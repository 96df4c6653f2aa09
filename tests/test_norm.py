"""RMSNorm with and without the gate, against the definition written with numbers of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruments import relative_error

from mamba2_min.ops.norm import gated_rms_norm, gated_rms_norm_plain, rms_norm, rms_norm_plain

EPS = 1e-5


def by_definition(x, weight, groups=1):
    """Row by row and group by group."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        parts = [part / torch.sqrt((part * part).sum() / len(part) + EPS) for part in row.chunk(groups)]
        rows.append(torch.cat(parts) * weight)
    return torch.stack(rows).view(x.shape)


def gated_by_definition(y, z, weight, norm_before_gate, groups):
    gate = z / (1 + torch.exp(-z))
    return by_definition(y, weight, groups) * gate if norm_before_gate else by_definition(y * gate, weight, groups)


def make(rows, d, seed=0, count=3):
    r = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=r, dtype=torch.float64) for shape in [(*rows, d)] * (count - 1) + [(d,)]]


def run(form, tensors, *args):
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = form(*leaves, *args)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)


def assert_close(got, expected, tolerance=1e-12):
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) <= tolerance


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    groups=st.integers(1, 3),
    width=st.integers(2, 6),
    before=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_values_and_gradients(rows, groups, width, before, seed):
    y, z, weight = make(rows, groups * width, seed)
    expected = run(gated_by_definition, [y, z, weight], before, groups)

    def form(y, z, weight):
        return gated_rms_norm(y, z, weight, EPS, before, groups)

    def plain(y, z, weight):
        return gated_rms_norm_plain(y, z, weight, EPS, before, groups)

    for f in (form, plain):
        assert_close(run(f, [y, z, weight]), expected)
        with torch.no_grad():
            assert_close([f(y, z, weight)], expected[:1])
    ungated = run(by_definition, [y, weight])
    for f in (rms_norm, rms_norm_plain):
        assert_close(run(lambda x, weight, f=f: f(x, weight, EPS), [y, weight]), ungated)
        with torch.no_grad():
            assert_close([f(y, weight, EPS)], ungated[:1])


@pytest.mark.parametrize("before", [False, True], ids=["gate, then norm", "norm, then gate"])
def test_a_compiler_finds_the_same_gradients(before):
    """Without its code generator."""
    tensors = make((2, 9), 8)
    compiled = torch.compile(gated_rms_norm, backend="aot_eager", dynamic=False)
    assert_close(run(compiled, tensors, EPS, before, 2), run(gated_by_definition, tensors, before, 2))


@pytest.mark.parametrize("before", [False, True], ids=["gate, then norm", "norm, then gate"])
def test_bfloat16_activations_beside_float32_weights(before):
    y, z, weight = make((3, 50), 16)
    leaves = [y.bfloat16().requires_grad_(), z.bfloat16().requires_grad_(), weight.float().requires_grad_()]
    out = gated_rms_norm(*leaves, EPS, before, 2)
    assert out.dtype == torch.float32
    wide = [t.detach().double() for t in leaves]
    assert relative_error(out, gated_by_definition(*wide, before, 2)) < 1e-6
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_any_strides():
    y, z, weight = make((3, 7), 4)
    turned = [t.permute(2, 1, 0).contiguous().permute(2, 1, 0) for t in (y, z)]
    assert_close(run(gated_rms_norm, [*turned, weight], EPS), run(gated_by_definition, [y, z, weight], False, 1))


def test_inputs_are_left_as_they_were():
    tensors = make((2, 3), 4)
    before = [t.clone() for t in tensors]
    run(gated_rms_norm, tensors, EPS)
    with torch.no_grad():
        gated_rms_norm(*tensors, EPS), gated_rms_norm(*tensors, EPS, True), rms_norm(tensors[0], tensors[2], EPS)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_a_second_derivative_is_refused():
    y, z, weight = (t.requires_grad_() for t in make((2, 3), 4))
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(gated_rms_norm(y, z, weight, EPS).sum(), y, create_graph=True)
