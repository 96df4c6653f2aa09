"""The prepared step: it computes what the forward computes, whatever has happened to the model or the state since."""

import copy
import io

import pytest
import torch
from instruments import Allocated, relative_error
from torch import nn

from mamba2_min.config import Mamba2Config
from mamba2_min.inference import stepping
from mamba2_min.inference.decoding import lay_out_columns
from mamba2_min.models.mamba2 import Mamba2LM, State

V = 37
IDS = torch.randint(V, (2, 12), generator=torch.Generator().manual_seed(0))


def build(dtype=torch.float64, **changes):
    sizes = {"d_model": 16, "n_layer": 2, "d_state": 6, "headdim": 8, "chunk_size": 8, "vocab_size": V}
    model = Mamba2LM(Mamba2Config(**{**sizes, **changes}), seed=0).to(dtype)
    r = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=r).to(dtype))
    return model


def steps(model, state, ids):
    return torch.stack([model.step(ids[:, t], state)[0].clone() for t in range(ids.shape[1])], 1)


def assert_continues(model, state, after):
    """Steps over `after` give what a forward from a clone of the state gives."""
    with torch.no_grad():
        expected, final = model(after, state.clone())
    assert relative_error(steps(model, state, after), expected) < 1e-10
    assert relative_error(torch.stack(state.ssm), torch.stack(final.ssm)) < 1e-10


def trained(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model.loss(IDS[:, :-1], IDS[:, 1:]).backward()
    optimizer.step()


def loaded(model):
    model.load_state_dict(build(a_init="uniform").state_dict())


def assigned(model):
    other = Mamba2LM(model.config, seed=5).double()
    model.load_state_dict(other.state_dict(), assign=True)


def moved(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def replaced(model):
    model.backbone.layers[1].mixer.D = nn.Parameter(torch.full_like(model.backbone.layers[1].mixer.D, 3.0))


def widened(model):
    mixer = model.backbone.layers[0].mixer
    mixer.in_proj = nn.Sequential(mixer.in_proj, nn.Hardtanh(-0.2, 0.2))


@pytest.mark.parametrize("change", [trained, loaded, assigned, moved, replaced, widened], ids=lambda f: f.__name__)
def test_a_model_that_changes_within_a_text_is_noticed(change):
    model = build()
    state = model.initial_state(2)
    before = steps(model, state.clone(), IDS)
    steps(model, state, IDS[:, :5])
    change(model)
    assert relative_error(steps(model, model.initial_state(2), IDS), before) > 1e-3
    assert_continues(model, state, IDS[:, 5:])


def test_a_state_serves_one_model_after_another():
    first, second = build(), build(a_init="uniform")
    state = first.initial_state(2)
    steps(first, state, IDS[:, :5])
    assert_continues(second, state, IDS[:, 5:])


def test_states_take_turns():
    model = build()
    a, b = model.initial_state(2), model.initial_state(2)
    alone = steps(model, model.initial_state(2), IDS)
    by_turns = [(model.step(IDS[:, t], a)[0], model.step(IDS[:, -1 - t], b)[0])[0] for t in range(12)]
    assert torch.equal(torch.stack(by_turns, 1), alone)


@pytest.mark.parametrize("copied", [copy.deepcopy, State.clone, State.detach], ids=["deepcopy", "clone", "detach"])
def test_a_copy_has_no_decoder_of_its_own_yet(copied):
    model = build()
    state = model.initial_state(2)
    steps(model, state, IDS[:, :5])
    other = copied(state)
    assert other not in stepping._decoders and all(torch.equal(a, b) for a, b in zip(other.ssm, state.ssm, strict=True))
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() < 20_000  # neither the model nor its buffers


def test_tensors_of_a_state_may_be_replaced():
    model = build()
    state, other = model.initial_state(2), model.initial_state(2)
    steps(model, state, IDS[:, :3])
    steps(model, other, IDS[:, 3:9])
    state.conv[1], state.ssm[0] = other.conv[1], other.ssm[0]
    assert_continues(model, state, IDS[:, 9:])


@pytest.mark.parametrize("made", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=lambda f: f.__name__)
@pytest.mark.parametrize("stepped", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=lambda f: f.__name__)
def test_a_state_is_stepped_wherever_it_was_made(made, stepped):
    model = build()
    with torch.no_grad():
        expected, _ = model(IDS)
    with made():
        _, state = model(IDS[:, :7])
    with stepped():
        assert relative_error(steps(model, state, IDS[:, 7:]), expected[:, 7:]) < 1e-10


def test_autocast_changes_nothing():
    model = build(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = steps(model, model.initial_state(2), IDS)
    assert torch.equal(got, steps(model, model.initial_state(2), IDS))


def test_a_state_that_was_stepped_can_be_trained_from():
    model = build()
    state = model.initial_state(2)
    steps(model, state, IDS[:, :5])
    model.loss(IDS[:, 5:-1], IDS[:, 6:], state).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_state_whose_tensors_lie_otherwise_is_laid_out_once():
    model = build()
    one = model.initial_state(1)
    steps(model, one, IDS[:1, :4])
    two = State([t.expand(2, -1, -1) for t in one.conv], [t.mT.contiguous().mT.expand(2, -1, -1, -1) for t in one.ssm])
    with torch.no_grad():
        expected, _ = model(IDS[:, 4:], two)
    assert relative_error(steps(model, two, IDS[:, 4:]), expected) < 1e-10
    kept = [t.data_ptr() for t in (*two.conv, *two.ssm)]
    steps(model, two, IDS[:, :1])
    assert kept == [t.data_ptr() for t in (*two.conv, *two.ssm)]


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "proj_bias": True}], ids=["tied", "untied"])
def test_matrices_stored_by_columns_are_the_same_matrices(changes, tmp_path):
    model, other = build(**changes), lay_out_columns(build(**changes))
    weights, same = model.state_dict(), other.state_dict()
    assert list(same) == list(weights) and all(torch.equal(same[name], weights[name]) for name in weights)
    assert other.lm_head.weight.t().is_contiguous() and (other.lm_head.weight is other.backbone.embedding.weight) == (
        not changes
    )
    assert relative_error(steps(other, other.initial_state(2), IDS), model(IDS)[0]) < 1e-10
    for m in (model, other):
        trained(m)
    assert relative_error(other(IDS)[0], model(IDS)[0]) < 1e-10
    other.save_pretrained(tmp_path)
    assert relative_error(Mamba2LM.from_pretrained(tmp_path)(IDS)[0], other(IDS)[0]) < 1e-5


@pytest.mark.parametrize("rows", [1, 3])
def test_ids_of_other_rows_than_the_state_are_a_value_error(rows):
    model = build()
    with pytest.raises(ValueError, match=rf"the state has 2 rows, and ids must be \(2,\), not \({rows},\)"):
        model.step(torch.zeros(rows, dtype=torch.long), model.initial_state(2))


def test_a_token_takes_little_memory_beside_its_logits(tmp_path):
    """What is as large as the state would be new memory, and page faults, in every layer of every token."""
    model = build(torch.float32, d_model=64, d_state=64, headdim=16)
    state = model.initial_state(1)
    model.step(IDS[:1, 0], state)
    with Allocated(tmp_path) as seen:
        model.step(IDS[:1, 1], state)
    assert seen.peak < state.ssm[0].nbytes / 4
