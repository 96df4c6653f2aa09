"""The language model: a state that continues exactly, documents that stay apart, the official names and start."""

import functools
import math
import subprocess
import sys
import textwrap
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruments import Allocated, Recorded, relative_error
from torch import nn
from torch.nn import functional as F

from mamba2_min import ssd
from mamba2_min.config import Mamba2Config
from mamba2_min.models.mamba2 import Mamba2LM, State
from mamba2_min.ops import conv

V = 29

SHAPES = {
    "plain": {},
    "two groups": {"ngroups": 2},
    "a group a head": {"ngroups": 4},
    "no look back": {"d_conv": 1},
    "one token back": {"d_conv": 2, "conv_bias": False},
    "groups that share a norm": {"ngroups": 2, "norm_per_group": False},
    "gate after the norm": {"ngroups": 2, "norm_before_gate": True},
    "every switch turned": {
        "ngroups": 2,
        "norm_per_group": False,
        "norm_before_gate": True,
        "proj_bias": True,
        "tie_embeddings": False,
        "pad_vocab_size_multiple": 8,
    },
}
each_shape = pytest.mark.parametrize("shape", SHAPES)


def config(**changes) -> Mamba2Config:
    sizes = {"d_model": 16, "n_layer": 2, "d_state": 6, "headdim": 8, "chunk_size": 8, "vocab_size": V}
    return Mamba2Config(**{**sizes, **changes})


def stirred(dtype=torch.float64, **changes) -> Mamba2LM:
    """A model in which no parameter is neutral: D, dt_bias, norms and biases are random too."""
    model = Mamba2LM(config(**changes), seed=0).to(dtype)
    r = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "embedding" in name or "lm_head" in name:
                noise = torch.randn(parameter.shape, generator=r).to(dtype)
                parameter.copy_(noise if name.endswith(("D", "dt_bias")) else parameter + 0.5 * noise)
    return model


@cache
def shared(shape: str) -> Mamba2LM:
    """A stirred float64 model of one of SHAPES, for tests that do not change it."""
    return stirred(**SHAPES[shape])


def ids(b, l, seed=0):
    return torch.randint(V, (b, l), generator=torch.Generator().manual_seed(seed))


def parts(state: State):
    return [*state.conv, *state.ssm]


def assert_same(got, expected, tolerance=1e-10):
    assert relative_error(got, expected) <= tolerance


def assert_same_state(got: State, expected: State, tolerance=1e-10):
    for a, b in zip(parts(got), parts(expected), strict=True):
        assert_same(a, b, tolerance)


def gradients(model, total):
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(total, list(model.parameters())), strict=True))


def assert_same_gradients(got, expected, tolerance=1e-10):
    for name in expected:
        assert_same(got[name], expected[name], tolerance)


# -- The network ------------------------------------------------------------------------------------------------------


def by_definition(weights, c, tokens):
    """Logits of the official model, written out token by token in the paper's symbols; nothing of the package."""

    def rms_norm(x, weight, groups=1):
        x = x.unflatten(-1, (groups, -1))
        return (x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()).flatten(-2) * weight

    x = weights["backbone.embedding.weight"][tokens]
    b, l, _ = x.shape
    for i in range(c.n_layer):
        w = {name.split(f"layers.{i}.")[-1]: t for name, t in weights.items() if f"layers.{i}." in name}
        u = F.linear(rms_norm(x, w["norm.weight"]), w["mixer.in_proj.weight"], w.get("mixer.in_proj.bias"))
        z, xBC, dt = u.split([c.d_inner, c.conv_dim, c.nheads], dim=-1)
        before = F.pad(xBC, (0, 0, c.d_conv - 1, 0))
        xBC = sum(before[:, k : k + l] * w["mixer.conv1d.weight"][:, 0, k] for k in range(c.d_conv))
        xBC = F.silu(xBC + w.get("mixer.conv1d.bias", 0))
        X, B, C = xBC.split([c.d_inner, c.ngroups * c.d_state, c.ngroups * c.d_state], dim=-1)
        X = X.unflatten(-1, (c.nheads, c.headdim))
        B, C = (t.unflatten(-1, (c.ngroups, c.d_state)).repeat_interleave(c.nheads // c.ngroups, dim=2) for t in (B, C))
        dt = torch.log1p(torch.exp(dt + w["mixer.dt_bias"]))
        decay = torch.exp(-dt * w["mixer.A_log"].exp())
        H, ys = X.new_zeros(b, c.nheads, c.headdim, c.d_state), []
        for t in range(l):
            written = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], X[:, t], B[:, t])
            H = decay[:, t, :, None, None] * H + written
            ys.append(torch.einsum("bhpn,bhn->bhp", H, C[:, t]) + w["mixer.D"][:, None] * X[:, t])
        y, gate = torch.stack(ys, 1).flatten(-2), z * torch.sigmoid(z)
        groups = c.ngroups if c.norm_per_group else 1
        if c.norm_before_gate:
            y = rms_norm(y, w["mixer.norm.weight"], groups) * gate
        else:
            y = rms_norm(y * gate, w["mixer.norm.weight"], groups)
        x = x + F.linear(y, w["mixer.out_proj.weight"], w.get("mixer.out_proj.bias"))
    logits = rms_norm(x, weights["backbone.norm_f.weight"]) @ weights["lm_head.weight"].T
    return logits[..., : c.vocab_size]


@each_shape
def test_the_model_is_its_definition(shape):
    model, tokens = shared(shape), ids(2, 19)
    weight = torch.randn(2, 19, V, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits = model(tokens)[0]
    expected = by_definition(dict(model.named_parameters(remove_duplicate=False)), model.config, tokens)
    assert_same(logits, expected)
    assert_same_gradients(gradients(model, (logits * weight).sum()), gradients(model, (expected * weight).sum()))
    with torch.no_grad():
        assert_same(stirred(torch.float32, **SHAPES[shape])(tokens)[0], expected, 2e-5)


@pytest.mark.parametrize("shape", ["plain", "gate after the norm"])
def test_a_second_derivative_is_right_or_refused(shape):
    model, tokens = shared(shape), ids(1, 6)

    def second(logits, parameter):
        (first,) = torch.autograd.grad(logits.square().sum(), parameter, create_graph=True)
        return torch.autograd.grad(first.square().sum(), parameter)[0]

    for name, parameter in model.named_parameters():
        try:
            got = second(model(tokens)[0], parameter)
        except RuntimeError:
            continue
        weights = dict(model.named_parameters(remove_duplicate=False))
        expected = second(by_definition(weights, model.config, tokens), parameter)
        assert relative_error(got, expected) < 1e-8, name


# -- A state continues exactly where it stopped -----------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize("lengths", [(1, 20), (20, 1), (2, 1, 3, 15), (8, 8, 5), (7, 7, 7), (1,) * 21], ids=str)
def test_any_split_equals_the_whole(shape, lengths):
    model, tokens = shared(shape), ids(2, 21)
    whole, final = model(tokens)
    state, logits = None, []
    for piece in tokens.split(lengths, dim=1):
        part, state = model(piece, state)
        logits.append(part)
    assert_same(torch.cat(logits, 1), whole)
    assert_same_state(state, final)


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, 32)), shape=st.sampled_from(list(SHAPES)), chunk_size=st.integers(1, 40))
def test_random_splits_equal_the_whole(cuts, shape, chunk_size):
    tokens = ids(1, 33, seed=4)
    whole, final = shared(shape)(tokens)
    model = stirred(**SHAPES[shape], chunk_size=chunk_size)
    state, logits = model.initial_state(1), []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 33], strict=True):
        part, state = model(tokens[:, start:end], state)
        logits.append(part)
    assert_same(torch.cat(logits, 1), whole)
    assert_same_state(state, final)


@each_shape
def test_gradients_flow_through_the_state(shape):
    model, tokens = shared(shape), ids(2, 21)
    weight = torch.randn(2, 21, V, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    whole, final = model(tokens)
    expected = gradients(model, (whole * weight).sum() + sum(t.square().sum() for t in parts(final)))
    state, total = None, 0
    for piece, w in zip(tokens.split((6, 1, 9, 5), 1), weight.split((6, 1, 9, 5), 1), strict=True):
        logits, state = model(piece, state)
        total = total + (logits * w).sum()
    assert_same_gradients(gradients(model, total + sum(t.square().sum() for t in parts(state))), expected)


def test_a_detached_state_ends_the_gradient_and_nothing_else():
    model, tokens = shared("plain"), ids(1, 12)
    _, state = model(tokens[:, :6])
    kept, _ = model(tokens[:, 6:], state)
    cut, _ = model(tokens[:, 6:], state.detach())
    assert torch.equal(kept, cut)
    assert all(t.requires_grad for t in state.ssm) and not any(t.requires_grad for t in parts(state.detach()))


@each_shape
def test_steps_equal_the_forward(shape):
    model, tokens = shared(shape), ids(3, 21)
    whole, final = model(tokens)
    state, logits = model.initial_state(3), []
    for t in range(21):
        step, state = model.step(tokens[:, t], state)
        logits.append(step)
    assert_same(torch.stack(logits, 1), whole)
    assert_same_state(state, final)


@each_shape
def test_steps_continue_a_forward_in_float32(shape):
    model, tokens = stirred(torch.float32, **SHAPES[shape]), ids(2, 30)
    with torch.no_grad():
        whole, final = model(tokens)
        _, state = model(tokens[:, :17])
    for t in range(17, 30):
        logits, state = model.step(tokens[:, t], state)
        assert_same(logits, whole[:, t], 2e-5)
    assert_same_state(state, final, 2e-5)


def test_a_state_can_be_continued_twice():
    model, tokens = shared("plain"), ids(1, 16)
    _, state = model(tokens[:, :9])
    before = [t.clone() for t in parts(state)]
    first, _ = model(tokens[:, 9:], state)
    second, _ = model(tokens[:, 9:], state)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(parts(state), before, strict=True))
    model.prefill(tokens[:, 9:], state)
    assert all(torch.equal(a, b) for a, b in zip(parts(state), before, strict=True))


def test_a_clone_stays_where_it_was():
    model, tokens = shared("plain"), ids(1, 16)
    _, state = model.prefill(tokens)
    clone = state.clone()
    before = [t.clone() for t in parts(state)]
    expected, _ = model.step(tokens[:, 0], state)
    for t in range(5):
        model.step(tokens[:, t], state)
    assert all(torch.equal(a, b) for a, b in zip(parts(clone), before, strict=True))
    assert torch.equal(model.step(tokens[:, 0], clone)[0], expected)
    copied = clone.clone()
    assert not {t.data_ptr() for t in parts(copied)} & {t.data_ptr() for t in parts(clone)}


@pytest.mark.parametrize("length", [1, 2048, 4100])
def test_a_long_prompt_read_in_slices_equals_one_pass(length):
    model = stirred(n_layer=1, headdim=16, chunk_size=64)
    tokens = ids(1, length)
    with torch.no_grad():
        whole, final = model(tokens)
    logits, state = model.prefill(tokens)
    assert_same(logits, whole[:, -1])
    assert_same_state(state, final)


def test_a_prompt_continues_a_state():
    model, tokens = shared("two groups"), ids(2, 21)
    whole, final = model(tokens)
    _, state = model.prefill(tokens[:, :10])
    logits, state = model.prefill(tokens[:, 10:], state)
    assert_same(logits, whole[:, -1])
    assert_same_state(state, final)


def test_the_state_has_one_size():
    model = shared("plain")
    c = model.config
    size = 8 * c.n_layer * ((c.d_conv - 1) * c.conv_dim + c.d_inner * c.d_state)
    assert model.initial_state().nbytes == size
    assert model.initial_state(3).nbytes == 3 * size
    assert all(model(ids(1, l))[1].nbytes == size for l in (1, 2, 50))
    assert model.prefill(ids(1, 5000))[1].nbytes == size


def test_a_state_holds_no_more_memory_than_it_counts():
    """No tensor of a state is a view that keeps a whole sequence alive."""
    model = shared("plain")
    with torch.no_grad():
        _, state = model(ids(1, 300))
    _, stepped = model.step(ids(1, 1)[0], state.clone())
    for s in (state, stepped):
        assert sum(t.untyped_storage().nbytes() for t in parts(s)) <= 2 * s.nbytes


def test_every_token_costs_the_same():
    """The same operations on tensors of the same sizes, after one token and after a thousand."""
    model = shared("plain")
    work = []
    for l in (1, 1000):
        _, state = model.prefill(ids(1, l))
        with Recorded() as seen:
            for t in range(3):
                model.step(ids(1, 1, seed=t)[0], state)
        work.append(seen.outputs)
    assert work[0] == work[1]


def test_a_prompt_is_read_in_bounded_memory(tmp_path):
    model, peaks = stirred(torch.float32, n_layer=1), []
    for l in (4096, 8192):
        tokens = ids(1, l)
        with Allocated(tmp_path) as memory:
            model.prefill(tokens)
        peaks.append(memory.peak)
    assert peaks[1] <= 1.1 * peaks[0]


def test_training_memory_is_linear_in_the_length_and_small(tmp_path):
    """No more than 24 activations of the inner width a token and layer, where (b, l, h, p, n) alone would be 64."""
    model = stirred(torch.float32, d_model=64, headdim=32, d_state=64, chunk_size=64, vocab_size=100)
    c, peaks = model.config, []
    for l in (512, 1024):
        tokens = ids(2, l)
        with Allocated(tmp_path) as memory:
            model.loss(tokens, tokens).backward()
        model.zero_grad()
        peaks.append(memory.peak)
    assert peaks[1] <= 2.2 * peaks[0]
    assert peaks[1] <= 24 * 4 * 2 * 1024 * c.d_inner * c.n_layer


@pytest.mark.parametrize("chunk_size", [1, 5, 64, 256])
def test_the_result_does_not_depend_on_the_chunk_size(chunk_size):
    tokens, targets = ids(2, 40), ids(2, 40, seed=1)
    model, other = shared("two groups"), stirred(**SHAPES["two groups"], chunk_size=chunk_size)
    assert_same(other(tokens)[0], model(tokens)[0])
    assert_same_state(other(tokens)[1], model(tokens)[1])
    assert_same_gradients(gradients(other, other.loss(tokens, targets)), gradients(model, model.loss(tokens, targets)))


@each_shape
@pytest.mark.parametrize("l", [1, 2, 3, 4])
def test_prompts_shorter_than_the_convolution(shape, l):
    logits, state = shared(shape)(ids(2, l))
    assert logits.shape == (2, l, V)
    assert state.conv[0].shape == (2, shared(shape).config.d_conv - 1, shared(shape).config.conv_dim)


@each_shape
def test_the_result_is_the_same_without_gradients(shape):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model, tokens = stirred(dtype, **SHAPES[shape]), ids(2, 21)
        logits, state = model(tokens)
        loss = model.loss(tokens, tokens)
        with torch.no_grad():
            assert_same(model(tokens)[0], logits, tolerance)
            assert_same_state(model(tokens)[1], state, tolerance)
            assert_same(model.loss(tokens, tokens), loss, tolerance)


# -- Causality and documents ------------------------------------------------------------------------------------------


@each_shape
def test_a_token_changes_nothing_before_it(shape):
    model, tokens = shared(shape), ids(1, 20)
    before, _ = model(tokens)
    for t in (1, 7, 8, 19):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % V
        after, _ = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


@each_shape
@pytest.mark.parametrize("names", [(0, 1, 2, 3), (4, 9, 4, 0)], ids=["counted", "third named as the first"])
def test_packed_documents_equal_separate_ones(shape, names):
    model = shared(shape)
    documents = [ids(2, l, seed=l) for l in (5, 1, 3, 14)]
    seq_idx = torch.tensor(names).repeat_interleave(torch.tensor([5, 1, 3, 14])).expand(2, -1)
    packed, final = model(torch.cat(documents, 1), seq_idx=seq_idx)
    alone = [model(document) for document in documents]
    assert_same(packed, torch.cat([logits for logits, _ in alone], 1))
    assert_same_state(final, alone[-1][1])


@each_shape
def test_packed_documents_have_the_gradients_of_separate_ones(shape):
    model = shared(shape)
    documents, targets = [ids(1, l, seed=l) for l in (6, 2, 9)], [ids(1, l, seed=50 + l) for l in (6, 2, 9)]
    seq_idx = torch.tensor([[0] * 6 + [1] * 2 + [2] * 9])
    packed = model.loss(torch.cat(documents, 1), torch.cat(targets, 1), seq_idx=seq_idx)
    alone = sum(model.loss(d, t) * d.numel() for d, t in zip(documents, targets, strict=True)) / 17
    assert_same(packed, alone)
    assert_same_gradients(gradients(model, packed), gradients(model, alone))


@each_shape
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_gradient_across_documents_is_exactly_zero(shape, dtype):
    model = stirred(dtype, **SHAPES[shape])
    embedded = []

    def watch(module, args, output):
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    model.backbone.embedding.register_forward_hook(watch)
    seq_idx = (torch.arange(24) >= 11).long()[None]
    logits, state = model(ids(1, 24), seq_idx=seq_idx)
    later = logits[:, 11:].square().sum() + sum(t.square().sum() for t in parts(state))
    (gradient,) = torch.autograd.grad(later, embedded[0], retain_graph=True)
    assert not gradient[:, :11].any() and gradient[:, 11:].any()
    (gradient,) = torch.autograd.grad(logits[:, :11].square().sum(), embedded[0])
    assert not gradient[:, 11:].any() and gradient[:, :11].any()


def test_a_state_belongs_to_the_first_document_only():
    model = shared("plain")
    _, state = model(ids(1, 9, seed=7))
    first, second = ids(1, 4, seed=1), ids(1, 6, seed=2)
    packed, final = model(torch.cat([first, second], 1), state, torch.tensor([[3] * 4 + [4] * 6]))
    assert_same(packed[:, :4], model(first, state)[0])
    alone, expected = model(second)
    assert_same(packed[:, 4:], alone)
    assert_same_state(final, expected)


@each_shape
def test_left_padded_equals_unpadded(shape):
    """Pads are a document of their own, so rows of different lengths share a batch."""
    model, pad = shared(shape), 0
    prompts = [ids(1, l, seed=l)[0] for l in (11, 4, 1)]
    rows = torch.stack([F.pad(prompt, (11 - len(prompt), 0), value=pad) for prompt in prompts])
    seq_idx = torch.stack([(torch.arange(11) >= 11 - len(prompt)).long() for prompt in prompts])
    logits, state = model(rows, seq_idx=seq_idx)
    for row, prompt in enumerate(prompts):
        alone, expected = model(prompt[None])
        assert_same(logits[row, 11 - len(prompt) :], alone[0])
        for got, wanted in zip(parts(state), parts(expected), strict=True):
            assert_same(got[row : row + 1], wanted)


def test_pads_are_out_of_the_loss():
    model, tokens, targets = shared("plain"), ids(1, 7), ids(1, 7, seed=1)
    padded = F.pad(tokens, (4, 0)), F.pad(targets, (4, 0), value=-100)
    seq_idx = (torch.arange(11) >= 4).long()[None]
    got, expected = model.loss(*padded, seq_idx=seq_idx), model.loss(tokens, targets)
    assert_same(got, expected)
    assert_same_gradients(gradients(model, got), gradients(model, expected))


# -- The loss ---------------------------------------------------------------------------------------------------------


@each_shape
def test_the_loss_is_the_cross_entropy_of_the_logits(shape):
    model, tokens, targets = shared(shape), ids(3, 15), ids(3, 15, seed=1)
    targets[0, :4] = targets[2, 3] = -100
    loss = model.loss(tokens, targets)
    expected = F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())
    assert_same(loss, expected)
    assert_same_gradients(gradients(model, loss), gradients(model, expected))


def test_the_loss_continues_a_state():
    model, tokens, targets = shared("plain"), ids(2, 15), ids(2, 15, seed=1)
    _, state = model(tokens[:, :6])
    expected = F.cross_entropy(model(tokens)[0][:, 6:].flatten(0, 1), targets[:, 6:].flatten())
    loss = model.loss(tokens[:, 6:], targets[:, 6:], state)
    assert_same(loss, expected)
    assert_same_gradients(gradients(model, loss), gradients(model, expected))


def test_a_batch_without_targets_costs_nothing_and_teaches_nothing():
    model = shared("plain")
    loss = model.loss(ids(2, 9), torch.full((2, 9), -100))
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients(model, loss).values())


def test_the_loss_of_a_new_model_is_that_of_a_guess():
    model = Mamba2LM(config(vocab_size=1000, d_model=64), seed=0)
    r = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(1000, (4, 64), generator=r) for _ in range(2))
    assert model.loss(tokens, targets).item() == pytest.approx(math.log(1000), rel=0.02)


def test_the_loss_never_holds_the_logits():
    model = stirred(torch.float32, vocab_size=8000, n_layer=1)
    tokens = torch.randint(8000, (4, 512), generator=torch.Generator().manual_seed(0))
    with Recorded() as seen:
        model.loss(tokens, tokens).backward()
    assert seen.largest <= tokens.numel() * 8000 / 3


# -- Dtypes -----------------------------------------------------------------------------------------------------------


def test_a_float64_model_stays_float64():
    model, tokens = shared("plain"), ids(1, 9)
    logits, state = model(tokens)
    step, stepped = model.step(tokens[:, 0], model.initial_state())
    loss = model.loss(tokens, tokens)
    for t in (logits, step, loss, *parts(state), *parts(stepped), *parts(model.initial_state())):
        assert t.dtype == torch.float64


def test_under_bfloat16_autocast_the_state_and_the_decays_are_float32():
    model, tokens = stirred(torch.float32), ids(2, 20)
    with Recorded() as seen:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, state = model(tokens)
            loss = model.loss(tokens, tokens)
        loss.backward()
    assert all(t.dtype == torch.float32 for t in state.ssm)
    assert loss.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    of = {}
    for name, _, dtype in seen.outputs:
        of.setdefault(name.rstrip("_"), set()).add(dtype)
    assert of["softplus"] == {torch.float32}  # dt
    assert of["exp"] | {t for t in of["cumsum"] if t.is_floating_point} <= {torch.float32, torch.float64}  # A, decays
    with torch.no_grad():
        exact, _ = model(tokens)
    assert relative_error(logits, exact) < 3e-2


def test_bfloat16_weights_keep_a_float32_state():
    model, tokens = stirred(torch.float32), ids(2, 20)
    with torch.no_grad():
        exact, _ = model(tokens)
        model.bfloat16()
        logits, state = model(tokens)
    assert logits.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in (*state.ssm, *model.initial_state().ssm))
    assert relative_error(logits, exact) < 5e-2
    step, state = model.step(tokens[:, 0], state)
    assert step.isfinite().all() and state.ssm[0].dtype == torch.float32


@pytest.mark.parametrize("weights", [False, True], ids=["autocast", "weights"])
def test_the_residual_stream_is_float32_in_bfloat16(weights):
    model, seen = stirred(torch.float32), []
    if weights:
        model.bfloat16()
    for layer in model.backbone.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not weights):
        model(ids(1, 4))
    assert seen == [torch.float32] * 2


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("a_log, dt_bias", [(9.2, 1e3), (9.2, -18.0), (-20.0, 1e3), (0.0, 0.0)], ids=str)
def test_extreme_decays_stay_finite_and_right(a_log, dt_bias, precision):
    """A of -1e4 and -2e-9, dt of 1e3 and 1e-8, in heads beside ordinary ones."""
    model, tokens = stirred(torch.float32), ids(1, 200)
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.A_log[::2] = a_log
            layer.mixer.dt_bias[::2] = dt_bias
    reference = stirred(torch.float64)
    reference.load_state_dict(model.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is torch.bfloat16):
        logits, _ = model(tokens)
        loss = model.loss(tokens, tokens)
    got = gradients(model, loss)
    assert all(gradient.isfinite().all() for gradient in got.values())
    assert relative_error(logits, reference(tokens)[0]) < (1e-4 if precision is torch.float32 else 5e-2)


# -- Construction -----------------------------------------------------------------------------------------------------

OFFICIAL_LAYER = {
    "mixer.in_proj.weight": ("d_in_proj", "d_model"),
    "mixer.conv1d.weight": ("conv_dim", 1, "d_conv"),
    "mixer.conv1d.bias": ("conv_dim",),
    "mixer.dt_bias": ("nheads",),
    "mixer.A_log": ("nheads",),
    "mixer.D": ("nheads",),
    "mixer.norm.weight": ("d_inner",),
    "mixer.out_proj.weight": ("d_model", "d_inner"),
    "norm.weight": ("d_model",),
}


@each_shape
def test_names_and_shapes_are_the_official_ones(shape):
    model = shared(shape)
    c = model.config
    expected = {"backbone.embedding.weight": (c.padded_vocab_size, c.d_model)}
    layer = dict(OFFICIAL_LAYER)
    if not c.conv_bias:
        del layer["mixer.conv1d.bias"]
    if c.proj_bias:
        layer |= {"mixer.in_proj.bias": ("d_in_proj",), "mixer.out_proj.bias": ("d_model",)}
    for i in range(c.n_layer):
        for name, sizes in layer.items():
            expected[f"backbone.layers.{i}.{name}"] = tuple(getattr(c, s) if isinstance(s, str) else s for s in sizes)
    expected |= {"backbone.norm_f.weight": (c.d_model,), "lm_head.weight": (c.padded_vocab_size, c.d_model)}
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == expected


def test_the_rows_of_in_proj_are_z_x_B_C_dt():
    """Each part of in_proj, set to zero alone, does what only that part can do."""
    c = config(n_layer=1, ngroups=2)
    ends = torch.tensor([0, c.d_inner, c.d_inner, c.ngroups * c.d_state, c.ngroups * c.d_state, c.nheads]).cumsum(0)
    tokens = ids(1, 9)

    def mixed(part=None, d=0.0):
        model = stirred(n_layer=1, ngroups=2, conv_bias=False)
        mixer = model.backbone.layers[0].mixer
        with torch.no_grad():
            mixer.D.fill_(d)
            if part is not None:
                mixer.in_proj.weight[ends[part] : ends[part + 1]] = 0
            normed = model.backbone.layers[0].norm(model.backbone.embedding(tokens))
            return mixer(normed, None, None, None)

    for part in range(4):
        assert not mixed(part)[0].any()  # no gate, no input, nothing written, nothing read: no output
    x, B, C = (mixed(part) for part in (1, 2, 3))
    assert not x[2].any() and not B[2].any() and C[2].any()  # the state is made of x and B, not of C
    assert not mixed(1, d=1.0)[0].any() and mixed(2, d=1.0)[0].any()  # the skip passes x, not B
    assert mixed(4)[0].any()


def test_a_tied_head_is_the_embedding():
    tied, untied = shared("plain"), shared("every switch turned")
    assert tied.lm_head.weight is tied.backbone.embedding.weight
    assert untied.lm_head.weight is not untied.backbone.embedding.weight
    assert tied.double().lm_head.weight is tied.backbone.embedding.weight


def test_dt_starts_within_its_limits():
    """And not at 1, where softplus of a fresh normal or zero dt_bias would be."""
    model = Mamba2LM(config(d_model=256, headdim=4, dt_min=2e-3, dt_max=0.3), seed=0)
    dt = torch.cat([F.softplus(layer.mixer.dt_bias) for layer in model.backbone.layers]).detach()
    assert dt.min() >= 2e-3 * (1 - 1e-5) and dt.max() <= 0.3 * (1 + 1e-5)
    assert dt.min() < 3e-3 and dt.max() > 0.2  # all of the range, evenly in the logarithm
    assert dt.log().mean().item() == pytest.approx((math.log(2e-3) + math.log(0.3)) / 2, abs=0.3)


def test_dt_has_a_floor():
    model = Mamba2LM(config(dt_min=1e-7, dt_max=0.05, dt_init_floor=0.04), seed=0)
    for layer in model.backbone.layers:
        dt = F.softplus(layer.mixer.dt_bias)
        assert ((dt >= 0.04 * (1 - 1e-5)) & (dt <= 0.05 * (1 + 1e-5))).all()


def test_hippo_gives_each_head_a_time_scale_of_its_own():
    for layer in Mamba2LM(config(), seed=0).backbone.layers:
        assert relative_error(layer.mixer.A_log.exp(), torch.tensor([1.0, 2.0, 3.0, 4.0])) < 1e-6


def test_uniform_draws_A_between_1_and_16():
    model = Mamba2LM(config(d_model=256, headdim=4, a_init="uniform"), seed=0)
    A = torch.cat([layer.mixer.A_log.exp() for layer in model.backbone.layers]).detach()
    assert A.min() >= 1 and A.max() <= 16
    assert A.min() < 2 and A.max() > 15 and A.mean().item() == pytest.approx(8.5, abs=1)


def test_the_other_parameters_start_as_the_table_says():
    c = config(vocab_size=4000, d_model=64, tie_embeddings=False, proj_bias=True, n_layer=3)
    model = Mamba2LM(c, seed=0)
    assert model.backbone.embedding.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert (model.backbone.norm_f.weight == 1).all()
    for layer in model.backbone.layers:
        mixer = layer.mixer
        assert all((t == 1).all() for t in (mixer.D, mixer.norm.weight, layer.norm.weight))
        assert not mixer.in_proj.bias.any() and not mixer.out_proj.bias.any()
        for weight, bound in (
            (mixer.in_proj.weight, c.d_model**-0.5),
            (mixer.out_proj.weight, (c.d_inner * c.n_layer) ** -0.5),
            (mixer.conv1d.weight, c.d_conv**-0.5),
            (mixer.conv1d.bias, c.d_conv**-0.5),
        ):
            assert 0.9 * bound < weight.abs().max().item() <= bound
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_the_same_seed_gives_the_same_weights():
    a, b, other = (Mamba2LM(config(a_init="uniform"), seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["backbone.embedding.weight"], other["backbone.embedding.weight"])


def test_without_a_seed_torchs_own_decides():
    models = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        models.append(Mamba2LM(config()).backbone.embedding.weight)
    assert torch.equal(models[0], models[1]) and not torch.equal(models[0], models[2])


def test_a_seeded_construction_leaves_torchs_own_random_numbers_alone():
    before = torch.get_rng_state()
    Mamba2LM(config(), seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=25, deadline=None)
@given(
    vocab_size=st.integers(1, 70),
    heads=st.sampled_from([(8, 1, 4, 2), (12, 2, 4, 3), (6, 3, 3, 6), (5, 1, 5, 1)]),
    n_layer=st.integers(1, 3),
    d_state=st.integers(1, 9),
    d_conv=st.integers(1, 5),
    multiple=st.integers(1, 20),
    tie=st.booleans(),
    conv_bias=st.booleans(),
    proj_bias=st.booleans(),
)
def test_parameters_are_counted_before_they_are_made(
    vocab_size, heads, n_layer, d_state, d_conv, multiple, tie, conv_bias, proj_bias
):
    d_model, expand, headdim, ngroups = heads
    c = Mamba2Config(
        vocab_size=vocab_size,
        d_model=d_model,
        expand=expand,
        headdim=headdim,
        ngroups=ngroups,
        n_layer=n_layer,
        d_state=d_state,
        d_conv=d_conv,
        pad_vocab_size_multiple=multiple,
        tie_embeddings=tie,
        conv_bias=conv_bias,
        proj_bias=proj_bias,
    )
    assert c.num_parameters() == sum(p.numel() for p in Mamba2LM(c, seed=0).parameters())


def test_torch_and_numpy_are_enough():
    """To build, train and run a model: no compiled kernels, no compiler, none of the packages of the extras."""
    program = """
        import sys
        for name in ("triton", "causal_conv1d", "mamba_ssm", "transformers", "safetensors", "matplotlib", "ollama"):
            sys.modules[name] = None  # an import of it fails
        import torch
        from mamba2_min.config import Mamba2Config
        from mamba2_min.models.mamba2 import Mamba2LM
        model = Mamba2LM(Mamba2Config(vocab_size=9, d_model=8, headdim=4, d_state=4))
        ids = torch.tensor([[1, 2, 3]])
        model.loss(ids, ids).backward()
        print(list(model.generate([1], 2)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- Modules are modules ----------------------------------------------------------------------------------------------


def test_every_projection_is_called_as_a_module():
    model, tokens, called = stirred(), ids(1, 6), []
    for i, layer in enumerate(model.backbone.layers):
        for name in ("in_proj", "out_proj"):
            getattr(layer.mixer, name).register_forward_hook(lambda *_, key=(i, name): called.append(key))
    expected = [(i, name) for i in range(2) for name in ("in_proj", "out_proj")]
    for use in (
        lambda: model(tokens),
        lambda: model.loss(tokens, tokens),
        lambda: model.prefill(tokens),
        lambda: model.step(tokens[:, 0], model.initial_state()),
    ):
        called.clear()
        use()
        assert called == expected


class Adapter(nn.Module):
    """A low-rank addition to a projection, the way adapters wrap one."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        r = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=r, dtype=base.weight.dtype))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=r, dtype=base.weight.dtype))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("name", ["in_proj", "out_proj"])
def test_a_wrapped_projection_has_its_effect_and_its_gradient(name):
    model, tokens = stirred(), ids(1, 6)
    before = model(tokens)[0], model.loss(tokens, tokens), model.step(tokens[:, 0], model.initial_state())[0]
    mixer = model.backbone.layers[1].mixer
    setattr(mixer, name, Adapter(getattr(mixer, name)))
    after = model(tokens)[0], model.loss(tokens, tokens), model.step(tokens[:, 0], model.initial_state())[0]
    assert all(relative_error(b, a) > 1e-3 for a, b in zip(before, after, strict=True))
    assert_same(after[2], after[0][:, 0])
    after[1].backward()
    adapter = getattr(mixer, name)
    assert adapter.down.grad.any() and adapter.up.grad.any()


def test_dropout_acts_in_training_only():
    model, tokens = stirred(dropout=0.5), ids(1, 30)
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])
    assert_same(model(tokens)[0], shared("plain")(tokens)[0])
    model.train()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])


def test_dropout_never_acts_in_generation():
    model = stirred(dropout=0.5)
    expected = continued(model.eval(), [1, 2, 3], 10, temperature=0)
    assert continued(model.train(), [1, 2, 3], 10, temperature=0) == expected


# -- Generation -------------------------------------------------------------------------------------------------------


def continued(model, prompt, n, **sampling):
    return list(model.generate(prompt, n, **sampling))


@each_shape
def test_greedy_takes_the_likeliest_of_the_full_forward(shape):
    model, prompt = shared(shape), ids(1, 5, seed=3)[0].tolist()
    tokens = list(prompt)
    for _ in range(25):
        tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
    assert continued(model, prompt, 25, temperature=0) == tokens[5:]


def test_generation_ends_before_a_stop_token():
    model, prompt = shared("plain"), [1, 2, 3]
    free = continued(model, prompt, 40, seed=5)
    stop = free[7]
    assert continued(model, prompt, 40, seed=5, stop_ids=[stop, V + 5]) == free[: free.index(stop)]


def test_the_same_seed_gives_the_same_text():
    model = shared("plain")
    a, b, other = (continued(model, [1, 2], 30, seed=s) for s in (1, 1, 2))
    assert a == b != other
    before = torch.get_rng_state()
    continued(model, [1, 2], 3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_generation_yields_what_was_asked_for():
    model = shared("every switch turned")  # whose vocabulary is padded: ids from V on do not exist
    assert continued(model, [0], 0) == []
    tokens = continued(model, [0], 300, temperature=5.0, seed=0)
    assert len(tokens) == 300 and set(tokens) == set(range(V))


def test_a_prompt_is_left_as_it_was():
    prompt = [1, 2, 3]
    continued(shared("plain"), prompt, 5, seed=0)
    assert prompt == [1, 2, 3]


@pytest.mark.parametrize("prompt", [[], [V], [0, -1], [1, 2, 10**6]], ids=str)
def test_impossible_prompts_are_value_errors(prompt):
    with pytest.raises(ValueError):
        continued(shared("plain"), prompt, 5)


@pytest.mark.parametrize(
    "tokens", [torch.zeros(1, 0), torch.zeros(3), torch.tensor([[V]]), torch.tensor([[-1]])], ids=str
)
def test_impossible_ids_are_value_errors(tokens):
    with pytest.raises(ValueError):
        shared("plain")(tokens.long())
    with pytest.raises(ValueError):
        shared("plain").loss(tokens.long(), tokens.long())


@pytest.mark.parametrize(
    "arguments",
    [
        {"seq_idx": torch.zeros(2, 5, dtype=torch.int64)},
        {"seq_idx": torch.zeros(6, dtype=torch.int64)},
        {"state": Mamba2LM(config(), seed=0).double().initial_state(3)},
    ],
    ids=["seq_idx too short", "seq_idx without rows", "state of another batch"],
)
def test_arguments_that_do_not_fit_are_value_errors(arguments):
    with pytest.raises(ValueError):
        shared("plain")(ids(2, 6), **arguments)


@pytest.mark.parametrize(("b", "l"), [(3, 5), (2, 40)], ids=["one chunk", "two chunks"])
def test_a_compiler_finds_the_same_gradients_of_the_form_for_gpus(monkeypatch, b, l):
    """A whole model in bf16, as a GPU trains it but for the code generator, in one graph a block."""
    monkeypatch.setattr(conv, "_is_cpu", lambda t: False)
    row, found = ids(b, l + 1), []
    for backend in (None, "aot_eager"):
        model = stirred(torch.float32).train()
        if backend:
            compiled = functools.partial(torch.compile, backend=backend, dynamic=False, fullgraph=True)
            monkeypatch.setattr(torch, "compile", compiled)
            model.compile_blocks()
        with torch.autocast("cpu", dtype=torch.bfloat16), ssd.using("cuda"):
            model.loss(row[:, :-1].contiguous(), row[:, 1:].contiguous()).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in found[0].items():
        assert relative_error(found[1][name], expected) < 2e-2, name


@pytest.mark.slow
def test_a_compiled_block_computes_the_same():
    model, tokens = stirred(torch.float32), ids(2, 32)
    block = model.backbone.layers[0]
    x = model.backbone.embedding(tokens).detach()
    expected, got = block(x, None, None, None), torch.compile(block)(x, None, None, None)
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 2e-5
    weights = list(block.parameters())
    for a, b in zip(
        torch.autograd.grad(got[0].square().sum(), weights),
        torch.autograd.grad(expected[0].square().sum(), weights),
        strict=True,
    ):
        assert relative_error(a, b) < 2e-4
