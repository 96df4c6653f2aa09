"""The short convolution, against its definition written tap by tap."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruments import relative_error
from torch.nn import functional as F

from mamba2_min import devices
from mamba2_min.ops import conv
from mamba2_min.ops.conv import causal_conv_silu


def by_definition(u, weight, bias=None, state=None, seq_idx=None):
    """Token by token, tap by tap: what lies before the first token is the state, and it is of the first document."""
    b, l, c = u.shape
    K = weight.shape[1]
    seq_idx = torch.zeros(b, l, dtype=torch.int64) if seq_idx is None else seq_idx
    state = u.new_zeros(b, K - 1, c) if state is None else state
    ys, ends = [], []
    for row in range(b):
        names = [int(seq_idx[row, 0])] * (K - 1) + seq_idx[row].tolist()
        inputs = [*state[row], *u[row]]

        def same(start, end, names=names):
            return all(name == names[end] for name in names[start:end])

        y = []
        for t in range(K - 1, K - 1 + l):
            taps = [weight[:, k] * inputs[t - (K - 1) + k] for k in range(K) if same(t - (K - 1) + k, t)]
            y.append(F.silu(sum(taps) + (0 if bias is None else bias)))
        ys.append(torch.stack(y))
        last = len(inputs) - 1
        end = [inputs[t] if same(t, last) else torch.zeros_like(inputs[t]) for t in range(last + 2 - K, last + 1)]
        ends.append(torch.stack(end) if end else u.new_zeros(0, c))
    return torch.stack(ys), torch.stack(ends)


def make(b, l, c, K, bias=True, start=True, documents=True, seed=0):
    r = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=r, dtype=torch.float64)

    seq_idx = torch.rand(b, l, generator=r).lt(0.3).cumsum(1)
    return {
        "u": normal(b, l, c),
        "weight": normal(c, K),
        "bias": normal(c) if bias else None,
        "state": normal(b, K - 1, c) if start else None,
        "seq_idx": seq_idx if documents else None,
    }


def run(form, case):
    leaves = {name: t.clone().requires_grad_() for name, t in case.items() if t is not None and t.is_floating_point()}
    y, state = form(**{**case, **leaves})
    r = torch.Generator().manual_seed(1)
    total = sum((out * torch.randn(out.shape, generator=r, dtype=torch.float64)).sum() for out in (y, state))
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"y": y, "new state": state} | {"d" + name: gradient for name, gradient in zip(leaves, found, strict=True)}


def assert_close(got, expected, tolerance=1e-12):
    for name in expected:
        assert relative_error(got[name], expected[name]) <= tolerance, name


@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(1, 2),
    l=st.integers(1, 12),
    c=st.integers(1, 4),
    K=st.integers(1, 5),
    bias=st.booleans(),
    start=st.booleans(),
    documents=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_it_is_the_definition_in_values_and_gradients(b, l, c, K, bias, start, documents, seed):
    case = make(b, l, c, K, bias, start, documents, seed)
    assert_close(run(causal_conv_silu, case), run(by_definition, case))


@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(1, 2),
    l=st.integers(1, 12),
    c=st.integers(1, 4),
    K=st.integers(1, 5),
    bias=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_the_form_for_gpus_is_the_definition_too(b, l, c, K, bias, seed):
    case = make(b, l, c, K, bias, False, False, seed)
    with mock.patch.object(conv, "_is_cpu", return_value=False):
        assert_close(run(causal_conv_silu, case), run(by_definition, case))


def test_with_documents_only_the_inputs_are_kept_for_the_gradient():
    """Not a copy of them for each tap: what a batch of documents keeps is what the estimate of memory counts."""
    case = make(2, 300, 8, 4)
    leaves = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in case.items()}
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() if t.is_floating_point() else 0
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        causal_conv_silu(**leaves)
    documents = len(case["seq_idx"]) + int((case["seq_idx"].diff() > 0).sum())
    assert sum(kept.values()) <= 8 * 8 * (2 * 300 + 3 * documents) + 1000


@pytest.mark.parametrize("cpu", [False, True], ids=["gpu", "cpu"])
def test_a_compiler_finds_the_same_gradients(cpu):
    """Without its code generator: what it reads out of the hand-written derivative."""
    case = make(2, 9, 3, 4, start=False, documents=False)
    with mock.patch.object(conv, "_is_cpu", return_value=cpu):
        expected = run(causal_conv_silu, case)
        compiled = torch.compile(causal_conv_silu, backend="aot_eager", dynamic=False)
        with mock.patch.object(conv, "_on_cpu", side_effect=AssertionError("this is not for compilers")):
            assert_close(run(compiled, case), expected)


def test_allowing_products_to_be_rounded_changes_nothing():
    """Of a size at which a CPU with AMX would round."""
    case = make(1, 300, 256, 4, start=False, documents=False)
    case = {name: None if t is None else t.float() for name, t in case.items()}
    exact = run(causal_conv_silu, case)
    with devices.matmul_precision(torch.device("cpu"), "bf16"):
        allowed = run(causal_conv_silu, case)
        assert torch.get_float32_matmul_precision() == "medium"
    assert all(torch.equal(allowed[name], t) for name, t in exact.items())


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_gradcheck(documents):
    case = make(1, 5, 2, 3)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1]]) if documents else None
    leaves = [case[name].requires_grad_() for name in ("u", "weight", "bias", "state")]
    assert torch.autograd.gradcheck(lambda *args: causal_conv_silu(*args, seq_idx), leaves)


@pytest.mark.parametrize("names", [[7, 2, 7, 7, 7], [0, 0, 1, 0, 0], [1, 0, 1, 0, 1]], ids=str)
def test_a_third_document_named_as_the_first_does_not_see_it(names):
    case = {**make(1, 5, 2, 4), "seq_idx": torch.tensor([names])}
    assert_close(run(causal_conv_silu, case), run(by_definition, case))


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_pieces_equal_the_whole(K, bias):
    case = make(2, 11, 3, K, bias, documents=False)
    u, weight, bias = case["u"], case["weight"], case["bias"]
    whole, final = causal_conv_silu(u, weight, bias, case["state"])
    for pieces in ((1, 2, 5, 3), 1):
        state, ys = case["state"], []
        for piece in u.split(pieces, dim=1):
            y, state = causal_conv_silu(piece, weight, bias, state)
            ys.append(y)
        assert relative_error(torch.cat(ys, 1), whole) < 1e-12
        assert torch.equal(state, final)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_a_token_changes_nothing_before_it(documents):
    case = make(1, 12, 3, 4, documents=documents)
    before, _ = causal_conv_silu(**case)
    for t in range(12):
        changed = case["u"].clone()
        changed[:, t] += 1
        after, _ = causal_conv_silu(**{**case, "u": changed})
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


def test_the_gradient_across_documents_is_exactly_zero():
    case = make(1, 12, 3, 4)
    case["seq_idx"] = (torch.arange(12) >= 6).long()[None]
    leaves = [case["u"].requires_grad_(), case["state"].requires_grad_()]
    y, state = causal_conv_silu(**case)
    du, dstate = torch.autograd.grad(y[:, 6:].sum() + state.sum(), leaves)
    assert not du[:, :6].any() and du[:, 6:].any() and not dstate.any()
    y, _ = causal_conv_silu(**case)
    (du,) = torch.autograd.grad(y[:, :6].sum(), case["u"])
    assert not du[:, 6:].any()


def test_a_slice_of_a_wider_tensor_as_the_model_gives():
    case = make(2, 9, 4, 4, documents=False)
    wide = torch.cat([torch.zeros_like(case["u"]), case["u"], torch.ones_like(case["u"])], dim=-1)
    strided = {**case, "u": wide[..., 4:8], "weight": case["weight"].T.contiguous().T}
    assert_close(run(lambda **kw: causal_conv_silu(**kw), strided), run(by_definition, case))


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_the_result_has_the_dtype_of_its_input(documents, dtype, tolerance):
    """float32 weights beside bfloat16 activations, as under autocast."""
    case = make(2, 9, 4, 4, documents=documents)
    low = {name: t.float() if t is not None and t.is_floating_point() else t for name, t in case.items()}
    y, state = causal_conv_silu(**{**low, "u": low["u"].to(dtype)})
    assert y.dtype == state.dtype == dtype
    assert relative_error(y, by_definition(**case)[0]) < tolerance


def test_the_state_is_a_copy():
    """It neither keeps the sequence in memory nor changes with it."""
    case = make(1, 300, 4, 4, documents=False)
    _, state = causal_conv_silu(**case)
    assert state.untyped_storage().nbytes() == state.nbytes
    expected = case["u"][:, -3:].clone()
    case["u"].zero_()
    assert torch.equal(state, expected)
