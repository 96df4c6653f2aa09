"""The loss of a head without its logits, against PyTorch's cross-entropy of the logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruments import Recorded, relative_error
from torch.nn import functional as F

from mamba2_min import devices
from mamba2_min.ops import loss
from mamba2_min.ops.loss import linear_cross_entropy


def plain(hidden, weight, targets, vocab_size=None, reduction="mean"):
    logits = hidden @ weight[:vocab_size].T
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-100, reduction=reduction)


def make(shape=(3, 7), d=5, v=11, vocab_size=None, ignored=0.3, seed=0, dtype=torch.float64):
    r = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, d, generator=r).to(dtype)
    weight = torch.randn(v, d, generator=r).to(dtype)
    targets = torch.randint(vocab_size or v, shape, generator=r)
    targets[torch.rand(shape, generator=r) < ignored] = -100
    return hidden, weight, targets


def run(form, hidden, weight, targets, *args, scale=1.0, **kwargs):
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = form(*leaves, targets, *args, **kwargs)
    return loss.detach(), *torch.autograd.grad(loss * scale, leaves)


def assert_close(got, expected, tolerance=1e-12):
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) <= tolerance


@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(1, 3),
    l=st.integers(1, 9),
    d=st.integers(1, 6),
    vocab_size=st.integers(1, 12),
    padding=st.integers(0, 5),
    reduction=st.sampled_from(["mean", "sum"]),
    scale=st.sampled_from([1.0, -0.3, 1e3]),
    seed=st.integers(0, 2**32),
)
def test_it_is_the_cross_entropy_in_values_and_gradients(b, l, d, vocab_size, padding, reduction, scale, seed):
    hidden, weight, targets = make((b, l), d, vocab_size + padding, vocab_size, seed=seed)
    targets[0, 0] = 0  # at least one counts
    got = run(linear_cross_entropy, hidden, weight, targets, vocab_size, reduction, scale=scale)
    assert_close(got, run(plain, hidden, weight, targets, vocab_size, reduction, scale=scale))


def test_the_padding_of_a_vocabulary_gets_no_probability_and_no_gradient():
    hidden, weight, targets = make(v=16, vocab_size=11)
    weight[11:] = 1e3
    _, _, dweight = run(linear_cross_entropy, hidden, weight, targets, 11)
    assert not dweight[11:].any() and dweight[:11].any()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
def test_it_does_not_depend_on_the_slices(dtype, tolerance):
    """Ten million logits, more than are made at a time."""
    hidden, weight, targets = make((2, 1000), d=8, v=5000)
    low = run(linear_cross_entropy, hidden.to(dtype), weight.to(dtype), targets)
    assert_close(low, run(plain, hidden, weight, targets), tolerance)


def test_products_that_may_be_rounded_to_bf16():
    """In slices of twice the size; on a CPU without AMX nothing is rounded."""
    hidden, weight, targets = make((2, 1000), d=8, v=5000, dtype=torch.float32)
    expected = run(plain, hidden, weight, targets)
    usual = loss.slice_elements(hidden.device)
    with devices.matmul_precision(torch.device("cpu"), "bf16"):
        assert loss.slice_elements(hidden.device) == 2 * usual
        assert_close(run(linear_cross_entropy, hidden, weight, targets), expected, 2e-2)


def test_a_target_of_no_probability_has_its_exact_loss():
    """exp(-200) is no float32; its logarithm is."""
    hidden = torch.tensor([[200.0, 0.0], [0.0, 3.0], [-150.0, 0.0]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    targets = torch.tensor([2, 1, 0])
    got = run(linear_cross_entropy, hidden, weight, targets)
    expected = run(plain, hidden.double(), weight.double(), targets)
    assert got[0] > 100
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 2e-5


def test_all_logits_are_never_held():
    hidden, weight, targets = make((4, 512), d=8, v=8000, dtype=torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    with Recorded() as seen:
        linear_cross_entropy(hidden, weight, targets).backward()
    assert seen.largest <= targets.numel() * 8000 / 3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_targets_no_loss_and_no_gradient(reduction):
    hidden, weight, targets = make(ignored=1.1)
    assert (targets == -100).all()
    assert not any(t.any() for t in run(linear_cross_entropy, hidden, weight, targets, None, reduction))


@pytest.mark.parametrize("only", [0, 1], ids=["hidden", "weight"])
def test_a_gradient_to_one_of_both(only):
    hidden, weight, targets = make()
    leaves = [hidden, weight]
    leaves[only].requires_grad_()
    (got,) = torch.autograd.grad(linear_cross_entropy(*leaves, targets), leaves[only])
    (expected,) = torch.autograd.grad(plain(*leaves, targets), leaves[only])
    assert relative_error(got, expected) < 1e-12


def test_without_gradients_it_is_the_same_number():
    hidden, weight, targets = make()
    loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    assert relative_error(loss, plain(hidden, weight, targets)) < 1e-12


def test_gradients_of_several_losses_add_up():
    """Two micro-batches, each weighing a half, as in gradient accumulation."""
    hidden, weight, targets = make((4, 6), ignored=0)
    weight.requires_grad_()
    for half in (slice(0, 2), slice(2, 4)):
        (linear_cross_entropy(hidden[half], weight, targets[half]) / 2).backward()
    (expected,) = torch.autograd.grad(plain(hidden, weight, targets), weight)
    assert relative_error(weight.grad, expected) < 1e-12


def test_a_second_backward_is_right_or_refused():
    hidden, weight, targets = make()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    try:
        (second,) = torch.autograd.grad(loss, weight)
    except RuntimeError:
        return
    assert torch.equal(first, second)


def test_a_second_derivative_is_right_or_refused():
    def second(form):
        hidden, weight, targets = make()
        weight.requires_grad_()
        (first,) = torch.autograd.grad(form(hidden, weight, targets), weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)[0]

    expected = second(plain)
    try:
        got = second(linear_cross_entropy)
    except RuntimeError:
        return
    assert relative_error(got, expected) < 1e-12


def test_huge_logits_stay_finite_and_right():
    hidden, weight, targets = make(dtype=torch.float32)
    got = run(linear_cross_entropy, hidden * 1e4, weight * 1e3, targets)
    expected = run(plain, hidden.double() * 1e4, weight.double() * 1e3, targets)
    assert_close(got, expected, 2e-5)


def test_any_strides():
    hidden, weight, targets = make((3, 7))
    turned = hidden.permute(2, 1, 0).contiguous().permute(2, 1, 0), weight.T.contiguous().T, targets.T.contiguous().T
    assert_close(run(linear_cross_entropy, *turned), run(plain, hidden, weight, targets))


def test_a_float32_loss_of_bfloat16():
    hidden, weight, targets = make((4, 50), 16, 40, dtype=torch.float32)
    exact = run(plain, hidden.double(), weight.double(), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = run(linear_cross_entropy, hidden, weight, targets)
    assert [t.dtype for t in under_autocast] == [torch.float32] * 3
    assert_close(under_autocast, exact, 2e-2)
    low = run(linear_cross_entropy, hidden.bfloat16(), weight.bfloat16(), targets)
    assert [t.dtype for t in low] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert_close(low, exact, 2e-2)


@pytest.mark.parametrize("target", [-1, -99, 11, 15])
def test_a_target_outside_the_vocabulary_is_an_error(target):
    hidden, weight, targets = make(v=16, vocab_size=11)
    targets[1, 1] = target
    with pytest.raises(ValueError, match="vocabulary"):
        linear_cross_entropy(hidden, weight, targets, 11)


def test_impossible_arguments_are_value_errors():
    hidden, weight, targets = make()
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(hidden, weight, targets, reduction="none")
    with pytest.raises(ValueError, match=r"\(3, 7\)"):
        linear_cross_entropy(hidden, weight, targets[:, :-1])
