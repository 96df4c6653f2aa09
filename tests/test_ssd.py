"""One linear map, computed in several ways: all agree with its definition, in values and in every gradient."""

import math
import threading
from contextlib import nullcontext
from functools import cache, partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruments import Allocated, Recorded, relative_error
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mamba2_min import ssd
from mamba2_min.ssd import SCANS, Shape, cpu, parts, ssd_chunked, ssd_plain, ssd_quadratic, ssd_recurrent, ssd_step
from mamba2_min.ssd.arguments import pad_to_chunks

INPUTS = ("x", "dt", "A", "B", "C", "D", "initial_state")


def by_definition(x, dt, A, B, C, D=None, initial_state=None, seq_idx=None):
    """Equation 1 of the paper, head by head and token by token: nothing of the package, and nothing clever."""
    b, l, h, p = x.shape
    heads_a_group = h // B.shape[2]
    n = B.shape[3]
    H = x.new_zeros(b, h, p, n) if initial_state is None else initial_state
    ys = []
    for t in range(l):
        if seq_idx is not None and t > 0:
            H = torch.where((seq_idx[:, t] != seq_idx[:, t - 1])[:, None, None, None], 0.0, H)
        B_t = B[:, t].repeat_interleave(heads_a_group, dim=1)  # (b, h, n)
        C_t = C[:, t].repeat_interleave(heads_a_group, dim=1)
        decay = torch.exp(dt[:, t] * A)[:, :, None, None]
        H = decay * H + dt[:, t, :, None, None] * x[:, t, :, :, None] * B_t[:, :, None, :]
        y = (H * C_t[:, :, None, :]).sum(-1)
        ys.append(y if D is None else y + D[None, :, None] * x[:, t])
    return torch.stack(ys, 1), H


def by_steps(x, dt, A, B, C, D=None, initial_state=None, seq_idx=None):
    """`ssd_step` called as a decoder calls it; a new document is a new state."""
    b, l, h, p = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    state = x.new_zeros(b, h, p, B.shape[3], dtype=wide) if initial_state is None else initial_state
    ys = []
    for t in range(l):
        if seq_idx is not None and t > 0:
            state = torch.where((seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None], state, 0)
        y, state = ssd_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D)
        ys.append(y)
    return torch.stack(ys, 1), state


def plain(chunk_size):
    def form(*args, **kwargs):
        return ssd_plain(*args, **kwargs, chunk_size=chunk_size)

    return form


def chunked(chunk_size, name=None):
    """`ssd_chunked` by the scan of that name, or by its own choice."""

    def form(*args, **kwargs):
        with ssd.using(name) if name else nullcontext():
            return ssd_chunked(*args, **kwargs, chunk_size=chunk_size)

    return form


def whole(chunk_size):
    """What is compiled on a CPU, without a compiler, in runs of three chunks. It takes one document per row."""

    def form(x, dt, A, B, C, D=None, initial_state=None, seq_idx=None):
        size, heads = cpu.separable(dt, A, B.shape[2], chunk_size)
        if seq_idx is not None or size < chunk_size or not heads.all():
            return ssd_chunked(x, dt, A, B, C, D, initial_state, seq_idx, chunk_size)
        l, narrow = x.shape[1], x.dtype
        wide = torch.promote_types(narrow, torch.float32 if initial_state is None else initial_state.dtype)
        if initial_state is None:
            initial_state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[3], dtype=wide)
        x, dt, A, D = (None if t is None else t.to(wide) for t in (x, dt, A, D))
        x, dt, B, C, _ = pad_to_chunks(chunk_size, x, dt, B, C, None)
        y, state = cpu.compiled_scan(x, dt, A, B, C, D, initial_state, chunk_size, cpu.whole_scan, most=3)
        return y[:, :l].to(narrow), state

    return form


# The scans of the table that a CPU can run, for every dtype of these tests.
TABLE = [
    name
    for name, (supports, _) in SCANS.items()
    if all(supports(torch.device("cpu"), dtype, Shape(1, 1, 1, 1, 1, 1, 1)) for dtype in (torch.float32, torch.float64))
]
FORMS = {
    "recurrent": ssd_recurrent,
    "quadratic": ssd_quadratic,
    "steps": by_steps,
    "plain, chunks of 1": plain(1),
    "plain, chunks of 16": plain(16),
    "chunks of 64": chunked(64),
    "whole chunks of 16": whole(16),
    **{f"{name} scan, chunks of {q}": chunked(q, name) for name in TABLE for q in (1, 16, 64, 256)},
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
# One of each kind, with a chunk that ends inside these tests' short sequences.
KINDS = {
    "recurrent": ssd_recurrent,
    "quadratic": ssd_quadratic,
    "plain": plain(8),
    "whole": whole(8),
    "steps": by_steps,
    **{f"{name} scan": chunked(8, name) for name in TABLE},
}
each_kind = pytest.mark.parametrize("form", KINDS.values(), ids=KINDS)


def make(l, g=1, b=2, h=4, p=4, n=6, skip=True, start=True, documents=True, seed=0, dtype=torch.float64):
    """Random arguments, every float drawn so that all of them matter: dt of many scales, D and the state not neutral.

    Drawn in float32, so that a float32 and a float64 run get the same numbers.
    """
    r = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=r).to(dtype)

    dt_bias = torch.randn(h, generator=r)
    return {
        "x": normal(b, l, h, p),
        "dt": F.softplus(torch.randn(b, l, h, generator=r) + dt_bias - 2).to(dtype),
        "A": -torch.exp(torch.randn(h, generator=r)).to(dtype),
        "B": normal(b, l, g, n),
        "C": normal(b, l, g, n),
        "D": normal(h) if skip else None,
        "initial_state": normal(b, h, p, n) if start else None,
        "seq_idx": torch.rand(b, l, generator=r).lt(4 / l).cumsum(1) if documents else None,
    }


def run(form, case, wanted=INPUTS, seed=1, through=(1, 1)):
    """y, the final state and the gradients to the `wanted` inputs of a random weighting of both (or of one)."""
    case = dict(case)
    leaves = [name for name in wanted if case[name] is not None]
    for name in leaves:
        case[name] = case[name].detach().clone().requires_grad_()
    y, state = form(**case)
    r = torch.Generator().manual_seed(seed)
    total = 0
    for weight, output in zip(through, (y, state), strict=True):
        total = total + weight * (output * torch.randn(output.shape, generator=r).to(output)).sum()
    gradients = torch.autograd.grad(total, [case[name] for name in leaves])
    return {"y": y.detach(), "state": state.detach()} | {
        "d" + name: gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def worst(got, expected):
    errors = {name: relative_error(got[name], expected[name]) for name in expected}
    name = max(errors, key=errors.get)
    return errors[name], name


def assert_close(got, expected, tolerance):
    error, name = worst(got, expected)
    assert error <= tolerance, f"{name} is off by {error:.1e}, more than {tolerance:.0e}"


@cache
def expected(l, g, full, b=2):
    case = make(l, g, b=b, skip=full, start=full, documents=full)
    return case, run(by_definition, case)


def to(case, dtype):
    return {name: t.to(dtype) if t is not None and t.is_floating_point() else t for name, t in case.items()}


def test_the_definition_itself_by_hand_on_numbers():
    """The reference against plain Python floats, one multiplication at a time."""
    case = make(l=7, g=2, b=1, h=4, p=2, n=3, seed=3)
    x, dt, A, B, C, D, H, documents = (case[name].tolist() for name in (*INPUTS, "seq_idx"))
    y, state = by_definition(**case)
    H = H[0]
    for t in range(7):
        for head in range(4):
            group = head // 2
            for channel in range(2):
                total = 0.0
                for k in range(3):
                    before = 0.0 if t > 0 and documents[0][t] != documents[0][t - 1] else H[head][channel][k]
                    decay = 2.718281828459045 ** (dt[0][t][head] * A[head])
                    H[head][channel][k] = decay * before + dt[0][t][head] * x[0][t][head][channel] * B[0][t][group][k]
                    total += C[0][t][group][k] * H[head][channel][k]
                assert float(y[0, t, head, channel]) == pytest.approx(total + D[head] * x[0][t][head][channel], 1e-12)
    assert relative_error(state[0], torch.tensor(H, dtype=torch.float64)) < 1e-13


# -- Equality ---------------------------------------------------------------------------------------------------------


@each_form
@pytest.mark.parametrize("g", [1, 2, 4])
@pytest.mark.parametrize("l", [1, 2, 63, 64, 65, 129])
def test_every_form_is_the_definition(form, g, l):
    case, reference = expected(l, g, full=True)
    assert_close(run(form, case), reference, 1e-10)
    assert_close(run(form, to(case, torch.float32)), reference, 2e-5)


@each_form
@pytest.mark.parametrize("l", [1, 65])
def test_without_skip_state_or_documents(form, l):
    case, reference = expected(l, 2, full=False)
    assert_close(run(form, case), reference, 1e-10)
    assert_close(run(form, to(case, torch.float32)), reference, 2e-5)


def test_a_compiler_takes_the_form_that_is_made_for_it():
    """Without its code generator. 5 chunks in runs of 3 and 2, a state, two groups."""
    case = make(40, g=2, documents=False)
    compiled = mock.Mock(wraps=torch.compile(cpu.whole_scan, backend="aot_eager", dynamic=False))
    with mock.patch.object(cpu, "_compiled", lambda: compiled), mock.patch.object(cpu, "_COMPILED_CHUNKS", 3):
        outer = torch.compile(ssd_chunked, backend="aot_eager", dynamic=False)
        got = run(lambda **kwargs: outer(**kwargs, chunk_size=8), case)
    assert compiled.call_count == 2
    assert_close(got, run(by_definition, case), 1e-10)


@each_form
def test_a_thousand_tokens(form):
    case, reference = expected(1000, 2, full=False, b=1)
    assert_close(run(form, case), reference, 1e-10)
    assert_close(run(form, to(case, torch.float32)), reference, 2e-5)


@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(1, 3),
    l=st.integers(1, 40),
    g=st.integers(1, 3),
    heads_a_group=st.integers(1, 3),
    p=st.integers(1, 5),
    n=st.integers(1, 5),
    chunk_size=st.integers(1, 50),
    skip=st.booleans(),
    start=st.booleans(),
    documents=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_shape(b, l, g, heads_a_group, p, n, chunk_size, skip, start, documents, seed):
    case = make(l, g, b, g * heads_a_group, p, n, skip, start, documents, seed)
    reference = run(by_definition, case)
    scans = [chunked(chunk_size, name) for name in TABLE]
    for form in (*scans, plain(chunk_size), whole(chunk_size), ssd_quadratic, ssd_recurrent, by_steps):
        assert_close(run(form, case), reference, 1e-10)


@each_kind
@pytest.mark.parametrize("through", [(0, 1), (1, 0)], ids=["final state", "y"])
def test_gradients_through_one_result_alone(form, through):
    case = make(l=19, g=2)
    assert_close(run(form, case, through=through), run(by_definition, case, through=through), 1e-10)


@pytest.mark.parametrize("only", ["y", "state"])
def test_a_result_that_nobody_uses_needs_no_gradient(only):
    case = make(l=19, g=2)
    case["x"].requires_grad_()
    gradients = []
    for form in (ssd_chunked, by_definition):
        y, state = form(**case)
        gradients.append(torch.autograd.grad((y if only == "y" else state).square().sum(), case["x"])[0])
    assert relative_error(*gradients) < 1e-10


@each_kind
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("g", [1, 2])
def test_gradcheck(form, documents, g):
    case = make(l=5, g=g, b=1, h=2, p=2, n=2, documents=False, seed=5)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1]]) if documents else None
    short = {f"{name} scan": chunked(2, name) for name in TABLE} | {"plain": plain(2), "whole": whole(2)}
    form = {KINDS[name]: short[name] for name in short}.get(form, form)
    inputs = [case[name].requires_grad_() for name in INPUTS]
    assert torch.autograd.gradcheck(lambda *args: form(*args, seq_idx=seq_idx), inputs, atol=1e-8, rtol=1e-6)


@each_kind
@pytest.mark.parametrize("wanted", [*((name,) for name in INPUTS), ("x", "A"), ("dt", "initial_state"), ("B", "D")])
def test_gradients_to_some_inputs_only(form, wanted):
    case = make(l=19, g=2)
    assert_close(run(form, case, wanted), run(by_definition, case, wanted), 1e-10)


@each_kind
def test_no_gradients_at_all(form):
    case = make(l=19, g=2)
    y, state = form(**case)
    assert not y.requires_grad and not state.requires_grad
    with torch.inference_mode():
        assert torch.equal(form(**case)[0], y)


@pytest.mark.parametrize("form", [plain, *(partial(chunked, name=name) for name in TABLE)], ids=["plain", *TABLE])
def test_a_second_derivative_is_right_or_refused(form):
    case = make(l=9, g=1, b=1, h=2, p=2, n=2, documents=False)

    def second(form, name):
        inputs = {name: case[name].clone().requires_grad_() for name in INPUTS}
        y, state = form(**inputs)
        (first,) = torch.autograd.grad(y.square().sum() + state.square().sum(), inputs[name], create_graph=True)
        return torch.autograd.grad(first.square().sum(), inputs[name])[0]

    for name in INPUTS:
        try:
            got = second(form(4), name)
        except RuntimeError:
            continue
        assert relative_error(got, second(by_definition, name)) < 1e-8, name


# -- Layouts ----------------------------------------------------------------------------------------------------------


@each_kind
def test_slices_of_one_tensor_as_the_model_gives(form):
    b, l, h, p, g, n = 2, 19, 4, 3, 2, 5
    r = torch.Generator().manual_seed(0)
    whole = torch.randn(b, l, h * p + 2 * g * n + h, generator=r, dtype=torch.float64)
    A = -torch.rand(h, generator=r, dtype=torch.float64)

    def through(form, contiguous):
        leaf = whole.clone().requires_grad_()
        x, B, C, dt = leaf.split([h * p, g * n, g * n, h], dim=-1)
        inputs = [x.unflatten(-1, (h, p)), F.softplus(dt), A, B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n))]
        y, state = form(*([t.contiguous() for t in inputs] if contiguous else inputs))
        (y.square().sum() + state.square().sum()).backward()
        return {"y": y, "state": state, "gradient": leaf.grad}

    assert_close(through(form, contiguous=False), through(by_definition, contiguous=True), 1e-10)


@each_kind
def test_any_strides(form):
    """Every input laid out back to front in memory, and the gradient of y too."""
    case = make(l=19, g=2)
    weight = torch.randn(3, 4, 19, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def through(form, turn):
        inputs = {name: turn(t.detach()) for name, t in case.items()}
        leaves = [inputs[name].requires_grad_() for name in INPUTS]
        y, state = form(**inputs)
        gradients = torch.autograd.grad((y[..., :3] * weight.permute(3, 2, 1, 0)).sum() + state.sum(), leaves)
        return {"y": y, "state": state} | dict(zip(INPUTS, gradients, strict=True))

    assert_close(through(form, back_to_front), through(by_definition, torch.clone), 1e-10)


def back_to_front(t):
    axes = tuple(reversed(range(t.dim())))
    return t.permute(axes).contiguous().permute(axes)


@each_kind
def test_inputs_are_left_as_they_were(form):
    case = make(l=19, g=2)
    before = {name: t.clone() for name, t in case.items()}
    for name in INPUTS:
        case[name].requires_grad_()
    y, state = form(**case)
    (y.sum() + state.sum()).backward()
    assert all(torch.equal(case[name], before[name]) for name in case)


@each_kind
def test_the_final_state_shares_no_memory_with_the_initial_one(form):
    case = make(l=1, g=1)
    before = case["initial_state"].clone()
    _, state = form(**case)
    state.zero_()
    assert torch.equal(case["initial_state"], before)


@each_kind
@pytest.mark.parametrize("sizes", [{"n": 1}, {"p": 1, "h": 2, "g": 2}], ids=str)
def test_gradients_that_two_scans_share_are_left_as_they_are(form, sizes):
    case = make(11, **({"g": 1} | sizes), documents=False)
    leaves = [case["initial_state"].clone().requires_grad_() for _ in range(2)]
    weight = torch.randn(case["initial_state"].shape, dtype=torch.float64)
    kept = weight.clone()
    states = [form(**{**case, "initial_state": leaf})[1] for leaf in leaves]
    found = torch.autograd.grad(states[0] + states[1], leaves, weight)
    wanted = torch.autograd.grad(by_definition(**{**case, "initial_state": leaves[0]})[1], leaves[0], weight)
    assert torch.equal(weight, kept)
    for gradient in found:
        assert relative_error(gradient, wanted[0]) < 1e-10


# -- Documents --------------------------------------------------------------------------------------------------------


def part(case, tokens, start=None):
    """The arguments for some of the tokens alone, as a sequence of their own."""
    cut = {name: case[name][:, tokens] for name in ("x", "dt", "B", "C")}
    return {**case, **cut, "initial_state": start, "seq_idx": None}


@each_kind
@pytest.mark.parametrize("lengths", [(1, 1, 1), (8, 8, 8), (3, 17, 6), (7, 1, 9), (15, 2, 23)], ids=str)
@pytest.mark.parametrize("names", [(0, 1, 2), (5, -3, 5), (9, 4, 1)], ids=["rising", "first again", "falling"])
def test_packed_documents_equal_separate_ones(form, lengths, names):
    l = sum(lengths)
    case = make(l, g=2, documents=False)
    seq_idx = torch.tensor(names).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    packed = form(**{**case, "seq_idx": seq_idx})
    ends = torch.tensor(lengths).cumsum(0).tolist()
    starts = [case["initial_state"], None, None]
    alone = [
        by_definition(**part(case, slice(end - length, end), start))
        for end, length, start in zip(ends, lengths, starts, strict=True)
    ]
    assert relative_error(packed[0], torch.cat([y for y, _ in alone], 1)) < 1e-10
    assert relative_error(packed[1], alone[-1][1]) < 1e-10


@each_kind
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_documents_may_differ_from_row_to_row(form, dtype):
    case = make(l=23, g=2)
    seq_idx = torch.tensor([[0] * 23, [7] * 9 + [2] * 14], dtype=dtype)
    y, state = form(**{**case, "seq_idx": seq_idx})
    first, second = (
        {name: t if name in ("A", "D") else t[row : row + 1] for name, t in case.items()} for row in range(2)
    )
    y0, state0 = by_definition(**{**first, "seq_idx": None})
    ya, _ = by_definition(**part(second, slice(0, 9), second["initial_state"]))
    yb, state1 = by_definition(**part(second, slice(9, 23)))
    assert relative_error(y, torch.cat([y0, torch.cat([ya, yb], 1)])) < 1e-10
    assert relative_error(state, torch.cat([state0, state1])) < 1e-10


@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_gradient_across_a_boundary_is_exactly_zero(form, dtype):
    for boundary in (1, 8, 13, 39):
        case = to(make(l=40, g=2, documents=False), dtype)
        case["seq_idx"] = (torch.arange(40) >= boundary).long().expand(2, -1)
        names = ("x", "dt", "B", "C", "initial_state")
        for name in names:
            case[name].requires_grad_()
        y, state = form(**case)
        later = torch.autograd.grad(y[:, boundary:].square().sum() + state.square().sum(), [case[n] for n in names])
        for name, gradient in zip(names, later, strict=True):
            before = gradient if name == "initial_state" else gradient[:, :boundary]
            assert not before.any(), f"{name} leaks {float(before.abs().max()):.1e} over {boundary}"
        y, state = form(**case)
        earlier = torch.autograd.grad(y[:, :boundary].square().sum(), [case[n] for n in names])
        for name, gradient in zip(names[:-1], earlier, strict=False):
            after = gradient[:, boundary:]
            assert not after.any(), f"{name} leaks {float(after.abs().max()):.1e} back over {boundary}"


# -- Causality --------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("token", [1, 7, 8, 21])
def test_a_token_changes_nothing_before_it(form, token, dtype):
    case = to(make(l=22, g=2, documents=False), dtype)
    y, _ = form(**case)
    for name in ("x", "dt", "B", "C"):
        changed = {**case, name: case[name].clone()}
        changed[name][:, token] *= 3
        after, _ = form(**changed)
        assert torch.equal(after[:, :token], y[:, :token]), name
        assert not torch.equal(after[:, token:], y[:, token:]), name


@each_kind
def test_the_past_gets_gradients_and_the_future_exactly_none(form):
    case = make(l=22, g=2, documents=False)
    names = ("x", "dt", "B", "C")
    for name in names:
        case[name].requires_grad_()
    y, _ = form(**case)
    for name, gradient in zip(names, torch.autograd.grad(y[:, 12].sum(), [case[n] for n in names]), strict=True):
        assert gradient[:, 12].any()
        assert not gradient[:, 13:].any(), name


# -- Dtypes -----------------------------------------------------------------------------------------------------------


@each_kind
def test_bfloat16_inputs_are_computed_in_float32(form):
    case = make(l=70, g=2)
    half = {name: case[name].bfloat16() if name in ("x", "B", "C") else case[name].float() for name in INPUTS}
    y, state = form(**half, seq_idx=case["seq_idx"])
    wide = {name: t.double() for name, t in half.items()}
    y0, state0 = by_definition(**wide, seq_idx=case["seq_idx"])
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert relative_error(y, y0.bfloat16()) < 1e-3  # some of the last bits
    assert relative_error(state, state0) < 2e-5


@each_kind
def test_each_gradient_has_the_dtype_of_its_input(form):
    """bfloat16 activations and float32 parameters, as under autocast, and a float64 state, as a test may have."""
    case = make(l=9, g=2)
    dtypes = [
        torch.bfloat16,
        torch.float32,
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ]
    leaves = [case[name].to(dtype).requires_grad_() for name, dtype in zip(INPUTS, dtypes, strict=True)]
    y, state = form(*leaves, seq_idx=case["seq_idx"])
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float64
    assert [g.dtype for g in torch.autograd.grad(y.float().sum() + state.sum(), leaves)] == dtypes


@each_kind
def test_float64_stays_float64(form):
    y, state = form(**make(l=9))
    assert y.dtype == state.dtype == torch.float64


@pytest.mark.parametrize("backward_too", [False, True], ids=["forward", "forward and backward"])
def test_decays_and_sums_are_float32_under_autocast(backward_too):
    case = to(make(l=70, g=2), torch.float32)
    for name in INPUTS:
        case[name].requires_grad_()
    with Recorded() as seen:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, state = ssd_chunked(**{**case, "x": case["x"].bfloat16(), "B": case["B"].bfloat16()})
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward_too):
            (y.float().sum() + state.sum()).backward()
    assert state.dtype == torch.float32
    decays = [dtype for name, _, dtype in seen.outputs if name.rstrip("_") in ("exp", "cumsum")]
    assert {dtype for dtype in decays if dtype.is_floating_point} <= {torch.float32, torch.float64}


def test_autocast_costs_no_more_than_rounding_the_inputs():
    case = make(l=200, g=2)
    y0, state0 = by_definition(**case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = ssd_chunked(**to(case, torch.float32))
    assert relative_error(y, y0) < 1e-2
    assert relative_error(state, state0) < 1e-2


def test_fast_products_round_nothing_but_their_operands():
    """Where float32 matrices are multiplied as bfloat16, results are near, and what must be zero is zero."""
    case = to(make(l=40, g=2, documents=False), torch.float32)
    case["seq_idx"] = (torch.arange(40) >= 20).long().expand(2, -1)
    reference = run(by_definition, to(case, torch.float64))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert_close(run(chunked(8), case), reference, 2e-2)
        case["dt"].requires_grad_()
        y, state = ssd_chunked(**case, chunk_size=8)
        (gradient,) = torch.autograd.grad(y[:, 20:].square().sum() + state.square().sum(), case["dt"])
    finally:
        torch.set_float32_matmul_precision(before)
    assert state.dtype == torch.float32
    assert not gradient[:, :20].any()


# -- Memory and work --------------------------------------------------------------------------------------------------


def test_the_largest_tensor_is_of_the_size_of_the_inputs():
    """(b, l, h, p, n), 64 times as large, is never formed; nor are all chunks' (q, q) matrices at once."""
    case = to(make(l=8192, h=8, g=1, b=1, p=32, n=64, documents=False), torch.float32)
    for name in INPUTS:
        case[name].requires_grad_()
    with Recorded() as seen:
        y, state = ssd_chunked(**case)
        (y.sum() + state.sum()).backward()
    states = (4096 // 64 + 1) * case["initial_state"].numel()
    assert seen.largest <= max(case["x"].numel(), states)


def plain_chunked(x, dt, A, B, C, D, q=64):
    """Listing 1 of the paper, as autograd would have it: what a hand-written backward is compared with."""
    l, h = x.shape[1:3]
    B, C = (t.repeat_interleave(h // t.shape[2], dim=2).unflatten(1, (-1, q)) for t in (B, C))
    X = (x * dt[..., None]).unflatten(1, (-1, q))
    s = (dt * A).unflatten(1, (-1, q)).cumsum(2).permute(0, 3, 1, 2)  # (b, h, c, q)
    causal = torch.ones(q, q, dtype=torch.bool).tril()
    L = (s[..., :, None] - s[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    diagonal = torch.einsum("bcihn,bcjhn,bhcij,bcjhp->bcihp", C, B, L, X)
    states = torch.einsum("bcjhn,bhcj,bcjhp->bchpn", B, (s[..., -1:] - s).exp(), X)
    H, entering = torch.zeros_like(states[:, 0]), []
    for k in range(l // q):
        entering.append(H)
        H = H * s[:, :, k, -1].exp()[..., None, None] + states[:, k]
    through = torch.einsum("bcihn,bchpn,bhci->bcihp", C, torch.stack(entering, 1), s.exp())
    return (diagonal + through).flatten(1, 2) + D[:, None] * x, H


def test_a_quarter_is_kept_for_the_backward_and_half_is_the_peak(tmp_path):
    """Bytes of PyTorch's CPU allocator, against plain autograd through the same chunks.

    Kept: allocated in the forward and alive after it, beyond the inputs and the two results, which are the caller's.
    Peak: the most that was allocated at one time in forward and backward, beyond the inputs.
    """
    case = to(make(l=4096, h=8, g=1, b=1, p=64, n=64, start=False, documents=False), torch.float32)
    inputs = [case[name] for name in ("x", "dt", "A", "B", "C", "D")]
    weight = torch.randn_like(case["x"])

    def measure(form):
        leaves = [t.clone().requires_grad_() for t in inputs]
        with Allocated(tmp_path) as forward:
            y, state = form(*leaves)
        kept = forward.kept - y.nbytes - state.nbytes
        with Allocated(tmp_path) as both:
            y, state = form(*leaves)
            gradients = torch.autograd.grad((y, state), leaves, (weight, torch.ones_like(state)))
        return kept, both.peak, (y.detach(), state.detach(), *gradients)

    kept, peak, results = measure(ssd_chunked)
    plain_kept, plain_peak, plain_results = measure(plain_chunked)
    for got, wanted in zip(results, plain_results, strict=True):
        assert relative_error(got, wanted) < 2e-5
    assert kept <= plain_kept / 4
    assert peak <= plain_peak / 2


def test_b_times_c_is_computed_once_a_group():
    """The forward's floating-point operations are those of the four steps, with C·B once for the eight heads."""
    l, h, p, n, q = 1024, 8, 16, 64, 64
    case = to(make(l, h=h, g=1, b=1, p=p, n=n, documents=False), torch.float32)
    with FlopCounterMode(display=False) as counter:
        ssd_chunked(**case, chunk_size=q)
    products, attend, states = 2 * l * q * n, 2 * l * q * h * p, 2 * 2 * l * h * p * n
    assert counter.get_total_flops() <= 1.1 * (products + attend + states)
    assert counter.get_total_flops() < h * products


# -- Extremes ---------------------------------------------------------------------------------------------------------

EXTREMES = {
    "dt of 1e3": ([-1.0, -1e4, -1e-3, -16.0], lambda dt: dt.fill_(1e3)),
    "dt of 1e-8": ([-1.0, -1e4, -1e-3, -16.0], lambda dt: dt.fill_(1e-8)),
    "A of -1e4": ([-1e4] * 4, lambda dt: dt),
    "half of the decay that is separated": ([-1.0, -0.5, -1e-3, -0.99], lambda dt: dt.fill_(59.9 / 64)),
    "as much decay as is separated": ([-1.0, -0.5, -1e-3, -0.99], lambda dt: dt.fill_(119.8 / 64)),
    "the most of a token that is separated": ([-1.0, -0.5, -1e-3, -0.9], lambda dt: dt.fill_(1e-3)[:, ::9].fill_(7.99)),
    "one extreme token, then ordinary ones": ([-1.0, -1e4, -1e-3, -16.0], lambda dt: dt[:, ::50].fill_(1e3)),
    "dt from 1e-8 to 1e3 in every chunk": (
        [-1.0, -1e4, -1e-3, -16.0],
        lambda dt: dt.copy_(10 ** (torch.rand(dt.shape, generator=torch.Generator().manual_seed(2)) * 11 - 8)),
    ),
}


def extreme(name, l):
    A, change = EXTREMES[name]
    case = make(l, g=2, b=1, documents=False)
    case["A"] = torch.tensor(A).double()
    change(case["dt"])
    case["dt"] = case["dt"].float().double()
    return case


def by_head_and_size_of_dt(values, dt):
    """Each head's results, and of those that have tokens each power of ten of dt apart: the large hide nothing."""
    power = dt.log10().floor()
    found = {name: values[name] for name in ("dB", "dC", "dD")}
    for head in range(dt.shape[-1]):
        for name, axis in (("state", 1), ("dinitial_state", 1), ("dA", 0)):
            found[name, head] = values[name].select(axis, head)
        for p in power[..., head].unique().tolist():
            for name in ("y", "dx", "ddt"):
                found[name, head, p] = values[name][:, :, head][power[..., head] == p]
    return found


WHOLE = whole(64)


@pytest.mark.parametrize(
    "form",
    [ssd_recurrent, ssd_quadratic, plain(64), WHOLE, *(chunked(64, name) for name in TABLE)],
    ids=["recurrent", "quadratic", "plain", "whole", *(f"{name} scan" for name in TABLE)],
)
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_are_still_right(name, form):
    case = extreme(name, 130)
    reference = run(by_definition, case)
    # One token at a time, float32 multiplies decays such as 1 - 1.6e-7, and rounds each to a multiple of 6e-8.
    float32 = 1e-3 if form is ssd_recurrent else 2e-5
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, float32)):
        got = run(form, to(case, dtype))
        assert_close(got, reference, tolerance)
        # In float32 the gradient by A of each head is coarser in three cases. With the largest factors that separated
        # decays may have, what is left of a sum depends on the CPU: 5 in 100,000. Where tokens forget nearly everything
        # and are separated all the same, what is left beyond such a token is a difference of large sums: 1 in 100. What
        # is compiled leaves such differences to autograd everywhere: 1 in 10,000.
        of_case = {"the most of a token that is separated": 1e-2, "as much decay as is separated": 5e-5}
        coarse = max(1e-4 if form is WHOLE else tolerance, of_case.get(name, 0))
        by_head = [by_head_and_size_of_dt(values, case["dt"]) for values in (got, reference)]
        for part in [key for key in by_head[0] if key[0] == "dA"] if dtype == torch.float32 else []:
            assert_close(*({part: values.pop(part)} for values in by_head), coarse)
        assert_close(*by_head, tolerance)


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_are_finite_at_4096_tokens(name):
    case = to(extreme(name, 4096), torch.float32)
    for values in (run(ssd_chunked, case), run_autocast(case)):
        assert all(t.isfinite().all() for t in values.values())


@pytest.mark.parametrize(
    "decays, chunk",
    [
        ([59.9 / 64] * 64, 64),
        ([119.8 / 64] * 64, 64),
        ([120.2 / 64] * 64, 32),
        ([239.6 / 64] * 64, 32),
        ([240.4 / 64] * 64, 16),
        ([479.2 / 64] * 64, 16),
        ([480.8 / 64] * 64, None),
        ([7.9] + [1e-3] * 63, 64),
        ([8.1] + [1e-3] * 63, None),
        ([math.nan] * 64, None),
    ],
)
def test_decays_are_separated_only_where_that_is_safe(decays, chunk):
    """The decay of a quarter of a chunk counts, and a single token's, of the one head and chunk where it is largest."""
    case = to(make(130, g=2, b=2, start=False, documents=False), torch.float32)
    case["A"].fill_(-1.0)
    case["dt"].fill_(1e-3)[1, 64:128, 2] = torch.tensor(decays)
    size, heads = cpu.separable(case["dt"], case["A"], 2, 64)
    assert heads.tolist() == [True, True, chunk is not None, chunk is not None]  # a group at a time
    assert size == (chunk or 64)
    if math.isnan(decays[0]):  # test_nonfinite says what becomes of it
        return
    y, y_plain = (form(**case)[0] for form in (chunked(64, "cpu"), chunked(64, "plain")))
    for head in range(4):
        assert torch.equal(y[:, :, head], y_plain[:, :, head]) == (chunk is None and head > 1)


@pytest.mark.parametrize("q, size", [(63, 32), (65, 33), (1, 1), (2, 2), (200, 50)])
def test_a_chunk_of_any_length_is_halved(q, size):
    assert cpu.separable(torch.full((1, 130, 1), 2.0), torch.tensor([-1.0]), 1, q) == (size, torch.tensor([True]))


@pytest.mark.parametrize("g", [1, 2, 4])
@pytest.mark.parametrize("strong", [(0,), (3,), (0, 2), (0, 1, 3)], ids=str)
def test_heads_that_forget_at_once_are_computed_apart(strong, g):
    case = make(70, g=g)
    case["A"] = case["A"].clamp(min=-4)
    case["A"][list(strong)] = -1e3
    assert_close(run(chunked(16, "cpu"), case), run(by_definition, case), 1e-10)
    assert_close(run(chunked(16, "cpu"), to(case, torch.float32)), run(by_definition, case), 2e-5)


@pytest.mark.parametrize("decay", [59.9, 119.8])
def test_separated_decays_leave_room_for_large_values(decay):
    case = to(make(128, g=2, b=1, start=False, documents=False), torch.float32)
    case["A"].fill_(-1.0)
    case["dt"].fill_(decay / 64)
    case["x"] *= 1e10 / case["x"].abs().max()
    got, wanted = run(ssd_chunked, case), run(by_definition, to(case, torch.float64))
    assert all(t.isfinite().all() for t in got.values())
    assert_close(got, wanted, 2e-5)


def run_autocast(case):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return run(ssd_chunked, {**case, **{name: case[name].bfloat16() for name in ("x", "B", "C")}})


# -- The table --------------------------------------------------------------------------------------------------------


def test_a_scan_is_forced_in_its_thread_alone():
    case = make(200, documents=False)
    own, plain_ = ssd_chunked(**case)[0], ssd_plain(**case)[0]
    assert not torch.equal(own, plain_)
    elsewhere = []
    with ssd.using("plain"):
        thread = threading.Thread(target=lambda: elsewhere.append(ssd_chunked(**case)[0]))
        thread.start()
        thread.join()
        assert torch.equal(ssd_chunked(**case)[0], plain_)
        with ssd.using("cpu"):
            assert torch.equal(ssd_chunked(**case)[0], own)
        assert torch.equal(ssd_chunked(**case)[0], plain_)
    assert torch.equal(elsewhere[0], own)
    with pytest.raises(KeyError), ssd.using("plain"):
        raise KeyError  # an error inside leaves nothing forced
    assert torch.equal(ssd_chunked(**case)[0], own)


def test_what_was_compiled_under_another_scan_is_compiled_again():
    case = make(40)
    compiled = torch.compile(lambda: ssd_chunked(**case, chunk_size=8)[0], backend="eager")
    with ssd.using("plain"):
        assert torch.equal(compiled(), ssd_plain(**case, chunk_size=8)[0])
    assert not torch.equal(compiled(), ssd_plain(**case, chunk_size=8)[0])


@pytest.mark.parametrize("name", ["", "Plain", "no such scan", None])
def test_an_unknown_scan_is_a_value_error_that_lists_the_known(name):
    with pytest.raises(ValueError, match=", ".join(SCANS)):
        ssd.using(name)


def test_some_scan_supports_everything():
    for device in ("cpu", "cuda", "mps", "meta"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            for shape in (Shape(1, 1, 1, 1, 1, 1, 1), Shape(3, 4097, 24, 64, 3, 128, 256)):
                assert any(supports(torch.device(device), dtype, shape) for supports, _ in SCANS.values())


@pytest.mark.parametrize("l", [1, 2, 8, 9, 30, 67])
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_the_plain_scan_in_parts_is_the_plain_scan(monkeypatch, documents, l):
    """Parts of two rows and of one or two chunks, and the first token of a part may begin a document."""
    case = make(l, b=3, g=2, documents=False)
    if documents:
        case["seq_idx"] = torch.stack([torch.arange(l) // 8, torch.arange(l) // 5, torch.zeros(l, dtype=torch.int64)])
    monkeypatch.setattr(parts, "_CPU_ELEMENTS", 2 * 4 * 8 * 8)
    assert_close(run(chunked(8, "plain"), case), run(plain(8), case), 1e-13)
    monkeypatch.setattr(parts, "_CPU_ELEMENTS", 6 * 4 * 8 * 8)
    assert_close(run(chunked(8, "plain"), case), run(plain(8), case), 1e-13)


def test_the_plain_scan_in_parts_holds_a_part_at_a_time():
    case = to(make(l=4096, h=8, g=1, b=1, p=32, n=64, documents=False), torch.float32)
    for name in INPUTS:
        case[name].requires_grad_()
    with Recorded() as seen, ssd.using("plain"):
        y, state = ssd_chunked(**case)
        (y.sum() + state.sum()).backward()
    assert seen.largest <= max(case["x"].numel(), 2 * 8 * 64 * 64 * 16)


# -- Arguments --------------------------------------------------------------------------------------------------------

WRONG = {
    "x": lambda t: t[..., 0],
    "dt": lambda t: t[:, :-1],
    "A": lambda t: t[:-1],
    "B": lambda t: t[:, :, :0],
    "C": lambda t: t[..., :-1],
    "D": lambda t: t[:1],
    "initial_state": lambda t: t.mT,
    "seq_idx": lambda t: t[0],
}
CHECKED = {"recurrent": ssd_recurrent, "quadratic": ssd_quadratic, "plain": ssd_plain, "chunked": ssd_chunked}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("form", CHECKED.values(), ids=CHECKED)
def test_shapes_that_do_not_fit_are_value_errors(form, name):
    case = make(5, g=2)
    with pytest.raises(ValueError, match=name):
        form(**{**case, name: WRONG[name](case[name])})


@pytest.mark.parametrize("form", CHECKED.values(), ids=CHECKED)
def test_no_tokens_or_groups_that_do_not_divide_are_value_errors(form):
    case = make(5, g=3)  # of 4 heads
    with pytest.raises(ValueError, match="g a divisor of h = 4"):
        form(**case)
    with pytest.raises(ValueError, match="l >= 1"):
        form(**part(case, slice(0, 0)))


@pytest.mark.parametrize("form", [ssd_plain, ssd_chunked])
@pytest.mark.parametrize("chunk_size", [0, -1, 2.0, True, None])
def test_an_impossible_chunk_is_a_value_error(form, chunk_size):
    with pytest.raises(ValueError, match="chunk_size"):
        form(**make(5), chunk_size=chunk_size)


def test_shapes_of_a_step_that_do_not_fit_are_value_errors():
    case = make(1, g=2)
    token = {name: case[name][:, 0] for name in ("x", "dt", "B", "C")} | {name: case[name] for name in ("A", "D")}
    y, state = ssd_step(case["initial_state"], **token)
    assert y.shape == (2, 4, 4) and state.shape == case["initial_state"].shape
    for name in token:
        with pytest.raises(ValueError, match="must be"):
            ssd_step(case["initial_state"], **{**token, name: token[name][..., :1]})
    with pytest.raises(ValueError, match="initial_state"):
        ssd_step(case["initial_state"][:1], **token)


# -- Transforms -------------------------------------------------------------------------------------------------------


class Scan(torch.nn.Module):
    def forward(self, x, dt, A, B, C):
        return ssd_chunked(x, dt, A, B, C, chunk_size=8)


def test_transforms_of_torch_func():
    """They can ask for no values, and take no function with a backward pass of its own."""
    x, dt, A, B, C, *_ = make(20, g=2, skip=False, start=False, documents=False).values()
    expected = ssd_chunked(x, dt, A, B, C)[0]
    by_row = torch.func.vmap(lambda x, dt, B, C: ssd_chunked(x[None], dt[None], A, B[None], C[None])[0][0])
    assert relative_error(by_row(x, dt, B, C), expected) < 1e-12
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(ssd_chunked(leaf, dt, A, B, C)[0].square().sum(), leaf)
    got = torch.func.grad(lambda x: ssd_chunked(x, dt, A, B, C)[0].square().sum())(x)
    assert relative_error(got, wanted) < 1e-12
    _, tangent = torch.func.jvp(lambda x: ssd_chunked(x, dt, A, B, C)[0], (x,), (x,))
    assert relative_error(tangent, expected) < 1e-12  # a linear map


def test_export():
    x, dt, A, B, C, *_ = make(20, g=2, skip=False, start=False, documents=False).values()
    exported = torch.export.export(Scan(), (x, dt, A, B, C)).module()
    for got, expected in zip(exported(x, dt, A, B, C), ssd_chunked(x, dt, A, B, C), strict=True):
        assert relative_error(got, expected) < 1e-12
