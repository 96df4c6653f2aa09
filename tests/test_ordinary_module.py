"""What PyTorch's users do with any module works here, or is refused in one line."""

import copy
import io
import pickle
import threading

import pytest
import torch
from instruments import relative_error
from test_bypass import IDS, TARGETS, V, mamba, transformer
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters
from torch.utils.checkpoint import checkpoint

from mamba2_min import Mamba2Config, Mamba2LM, State
from mamba2_min.models.evaluating import evaluating
from mamba2_min.models.transformer import TransformerLM

each_model = pytest.mark.parametrize("build", [mamba, transformer], ids=lambda f: f.__name__)


def steps(model, state, ids):
    return torch.stack([model.step(ids[:, t], state)[0].clone() for t in range(ids.shape[1])], 1)


def gradients(model, total):
    return torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad])


def assert_close(got, expected, tolerance=1e-10):
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < tolerance


# -- Modes ------------------------------------------------------------------------------------------------------------


def uses(model):
    yield lambda: model.prefill(IDS)
    yield lambda: model.step(IDS[:, 0], model.initial_state(2))
    yield lambda: list(model.generate([1, 2], 3, seed=0))


@each_model
@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
def test_every_modules_own_mode_survives_a_text(build, hooked):
    model = build().train()
    model.backbone.layers[0].eval()
    model.backbone.layers[1].norm.eval()
    if hooked:
        model.lm_head.register_forward_hook(lambda *_: None)
    modes = [module.training for module in model.modules()]
    for use in uses(model):
        use()
        assert [module.training for module in model.modules()] == modes
    text = model.generate([1, 2], 9, seed=0)
    next(text)
    assert [module.training for module in model.modules()] == modes  # also between two tokens


def test_a_mode_is_put_back_when_reading_fails():
    model = mamba().train()
    model.backbone.norm_f.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.prefill(IDS)
    assert all(module.training for module in model.modules())


def test_a_foreign_dropout_does_not_act_in_a_text():
    model = mamba()
    model.backbone.layers[0].mixer.out_proj = nn.Sequential(model.backbone.layers[0].mixer.out_proj, nn.Dropout(0.5))
    expected = list(model.eval().generate([1, 2, 3], 12, temperature=0))
    assert list(model.train().generate([1, 2, 3], 12, temperature=0)) == expected
    assert all(module.training for module in model.modules())


def test_threads_write_side_by_side():
    model = mamba(dropout=0.5).train()
    model.lm_head.register_forward_hook(lambda *_: None)
    expected = list(copy.deepcopy(model).eval().generate([1, 2, 3], 20, temperature=0))
    written = []
    threads = [
        threading.Thread(
            target=lambda: written.extend(list(model.generate([1, 2, 3], 20, temperature=0)) for _ in "12")
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written == [expected] * 6
    assert all(module.training for module in model.modules())


def test_evaluating_may_be_nested():
    model = mamba().train()
    with evaluating(model):
        with evaluating(model):
            pass
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())


# -- Copies and files -------------------------------------------------------------------------------------------------


def through_a_file(thing, **options):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **options)


@each_model
def test_a_state_is_saved_and_loaded_without_running_code(build):
    model = build()
    _, state = model.prefill(IDS)
    model.step(IDS[:, 0], state)
    loaded = through_a_file(state, weights_only=True)
    assert type(loaded) is type(state)
    assert torch.equal(steps(model, loaded, IDS), steps(model, state, IDS))


@each_model
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_a_file])
def test_a_model_is_copied(build, copied):
    options = {"weights_only": False} if copied is through_a_file else {}
    model = build().eval()
    steps(model, model.initial_state(2), IDS)  # with a decoder in use
    model.compile_blocks()  # which only training would do
    other = copied(model, **options)
    assert other.lm_head.weight is other.backbone.embedding.weight
    assert torch.equal(other(IDS)[0], model(IDS)[0]) and not other.backbone.compiled
    assert_close(gradients(other, other.loss(IDS, TARGETS)), gradients(model, model.loss(IDS, TARGETS)))


@pytest.mark.parametrize("how", [pytest.param("wrapper", marks=pytest.mark.slow), "in place"])
def test_a_compiled_model_is_used_and_saved_as_one_that_is_not(how):
    model = mamba()
    expected = model(IDS)[0], model.loss(IDS, TARGETS), list(model.generate([1], 4, temperature=0))
    if how == "wrapper":
        compiled = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
        compiled = model
    assert relative_error(compiled(IDS)[0], expected[0]) < 1e-10
    assert relative_error(compiled.loss(IDS, TARGETS), expected[1]) < 1e-10
    assert list(compiled.generate([1], 4, temperature=0)) == expected[2]
    loaded = through_a_file(compiled, weights_only=False)
    assert relative_error(loaded(IDS)[0], expected[0]) < 1e-10


def test_state_dict_hooks_and_ordinary_rewrites_of_a_model():
    model = mamba()
    model.register_state_dict_post_hook(lambda module, weights, prefix, metadata: weights.update(extra=torch.ones(1)))
    assert "extra" in model.state_dict()
    vector_to_parameters(1.1 * parameters_to_vector(model.parameters()), model.parameters())
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert_close([steps(model, model.initial_state(2), IDS)], [model(IDS)[0]])
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert_close([averaged(IDS)[0]], [model(IDS)[0]])


def test_pruned_weights_act_everywhere():
    model = mamba()
    for module in (model.lm_head, model.backbone.layers[0].mixer.conv1d, model.backbone.layers[1].mixer.in_proj):
        prune.random_unstructured(module, "weight", 0.4)
    logits = model(IDS)[0]
    assert_close([steps(model, model.initial_state(2), IDS)], [logits])
    assert_close([model.loss(IDS, TARGETS)], [F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())])


# -- Dtypes and devices -----------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32], ids=str)
def test_ids_may_be_integers_of_any_type(build, dtype):
    model, ids = build(), IDS.to(dtype)
    assert torch.equal(model(ids)[0], model(IDS)[0])
    assert torch.equal(model.loss(ids, TARGETS.to(torch.int32)), model.loss(IDS, TARGETS))
    assert torch.equal(model.prefill(ids)[0], model.prefill(IDS)[0])
    assert torch.equal(steps(model, model.initial_state(2), ids), steps(model, model.initial_state(2), IDS))


@each_model
@pytest.mark.parametrize("bad", [IDS.double(), IDS > 3, IDS.to(torch.complex64), IDS.tolist(), None], ids=type)
def test_other_ids_are_refused_in_one_line(build, bad):
    model = build()
    for use in (lambda: model(bad), lambda: model.loss(bad, TARGETS), lambda: model.prefill(bad)):
        with pytest.raises(ValueError) as error:
            use()
        assert "\n" not in str(error.value) and "input_ids" in str(error.value)
    with pytest.raises(ValueError, match="targets must be"):
        model.loss(IDS, TARGETS.double())


@each_model
@pytest.mark.parametrize("bad", [[V, 0], [-1, 0]], ids=str)
def test_a_step_refuses_ids_outside_the_vocabulary(build, bad):
    model = build()
    state = model.initial_state(2)
    before = copy.deepcopy(state)
    for ids in (torch.tensor(bad), torch.tensor([[1], [2]]), torch.tensor([1]), torch.tensor([1.0, 2.0])):
        with pytest.raises(ValueError):
            model.step(ids, state)
    assert torch.equal(steps(model, state, IDS), steps(model, before, IDS))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_another_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        model = Mamba2LM(mamba().config, seed=0)
        model.loss(IDS, TARGETS).backward()
        text = list(model.generate([1, 2], 5, seed=0, repeat_penalty=1.1))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(p.dtype == p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())
    assert all(t.dtype == torch.promote_types(dtype, torch.float32) for t in model.initial_state().ssm)
    assert len(text) == 5


@each_model
def test_another_default_device_does_not_reach_a_model_that_is_elsewhere(build):
    model = build()
    how = {"seed": 1, "repeat_penalty": 1.2, "top_k": 9, "top_p": 0.9, "min_p": 0.01}
    expected = list(model.generate([1, 2], 8, **how)), model.loss(IDS, TARGETS), model(IDS, seq_idx=IDS // 9)[0]
    with torch.device("meta"):
        assert list(model.generate([1, 2], 8, **how)) == expected[0]
        assert torch.equal(model.loss(IDS, TARGETS), expected[1])
        assert torch.equal(model(IDS, seq_idx=IDS // 9)[0], expected[2])
        assert model.step(IDS[:, 0], model.initial_state(2))[0].device.type == "cpu"
        assert next(type(model)(model.config).parameters()).is_meta  # and a new model is there


@each_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_model_may_change_its_dtype_within_a_text(build, dtype):
    model = build()
    _, state = model.prefill(IDS[:, :5])
    steps(model, state, IDS[:, 5:7])
    exact = model(IDS)[0][:, 7:]
    model.to(dtype)
    got = steps(model, state, IDS[:, 7:])
    assert got.dtype == dtype and relative_error(got, exact) < (1e-5 if dtype == torch.float32 else 5e-2)


# -- Inputs -----------------------------------------------------------------------------------------------------------


@each_model
def test_embeddings_may_be_given_in_the_place_of_ids(build):
    model = build()
    embeds = model.backbone.embedding(IDS).detach().requires_grad_()
    assert torch.equal(model(inputs_embeds=embeds)[0], model(IDS)[0])
    loss = model.loss(None, TARGETS, inputs_embeds=embeds)
    assert torch.equal(loss, model.loss(IDS, TARGETS))
    assert torch.autograd.grad(loss, embeds)[0].any()
    logits, state = model.prefill(inputs_embeds=embeds)
    expected, other = model.prefill(IDS)
    assert torch.equal(logits, expected) and torch.equal(steps(model, state, IDS), steps(model, other, IDS))
    _, state = model(inputs_embeds=embeds[:, :6])
    assert_close([model(inputs_embeds=embeds[:, 6:], state=state)[0]], [model(IDS)[0][:, 6:]])


def test_a_soft_prompt_is_trained_and_read():
    model = mamba().requires_grad_(False)
    prompt = nn.Parameter(torch.randn(3, 16, dtype=torch.float64))
    embeds = torch.cat([prompt.expand(2, -1, -1), model.backbone.embedding(IDS)], 1)
    model.loss(None, F.pad(TARGETS, (3, 0), value=-100), inputs_embeds=embeds).backward()
    assert prompt.grad.any() and all(p.grad is None for p in model.parameters())
    _, state = model.prefill(inputs_embeds=prompt[None].expand(2, -1, -1))
    assert_close([steps(model, state, IDS)], [model(inputs_embeds=embeds)[0][:, 3:]])


@each_model
def test_inputs_that_contradict_each_other_are_refused(build):
    model = build()
    embeds = model.backbone.embedding(IDS)
    for arguments, words in (
        ({}, "give either input_ids or inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": embeds}, "give either input_ids or inputs_embeds"),
        ({"inputs_embeds": embeds[..., 1:]}, r"inputs_embeds must be \(b, l, 16\)"),
        ({"inputs_embeds": embeds[:, :0]}, r"inputs_embeds must be \(b, l, 16\)"),
        ({"input_ids": IDS, "seq_idx": IDS[:, 1:]}, "seq_idx must be"),
        ({"input_ids": IDS, "state": model.initial_state(3)}, "the state has 3 rows, and the input 2"),
        ({"input_ids": IDS, "state": [1, 2]}, "state must be one that an earlier call returned, not a list"),
    ):
        with pytest.raises(ValueError, match=words):
            model(**arguments)


@each_model
@pytest.mark.parametrize(
    "prompts", [[[1, 2], [3, 4]], torch.tensor([[1, 2]]), torch.ones(2, 3).long(), ["a"], [1.0], 3, None], ids=str
)
def test_more_than_one_prompt_is_refused_and_told_what_to_do(build, prompts):
    with pytest.raises(ValueError, match=r"^prompt_ids must be one prompt, .* prefill\(input_ids, seq_idx=\.\.\.\)"):
        build().generate(prompts, 3)


@each_model
def test_a_prompt_may_be_any_sequence_of_integers(build):
    model = build()
    expected = list(model.generate([1, 2, 3], 4, seed=0))
    for prompt in ((1, 2, 3), torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3]).numpy(), range(1, 4)):
        assert list(model.generate(prompt, 4, seed=0)) == expected
    for bad in (-1, 1.5, None, True):
        with pytest.raises(ValueError, match="max_new_tokens"):
            model.generate([1], bad)


@each_model
def test_prompts_of_several_lengths_are_read_and_continued_together(build):
    """As the refusal above says: padded on the left, where the padding is a document of its own."""
    model, prompts = build(), [IDS[0, :9], IDS[1, :4], IDS[0, 3:4]]
    rows = torch.stack([F.pad(prompt, (9 - len(prompt), 0)) for prompt in prompts])
    seq_idx = torch.stack([(torch.arange(9) >= 9 - len(prompt)).long() for prompt in prompts])
    logits, state = model.prefill(rows, seq_idx=seq_idx)
    written = []
    for _ in range(6):
        written.append(logits.argmax(-1))
        logits, state = model.step(written[-1], state)
    for row, prompt in enumerate(prompts):
        assert [int(ids[row]) for ids in written] == list(model.generate(prompt, 6, temperature=0))


# -- Training ---------------------------------------------------------------------------------------------------------


@each_model
def test_frozen_parameters_get_no_gradient_and_the_others_theirs(build):
    model = build()
    everything = dict(zip(model.state_dict(), gradients(model, model.loss(IDS, TARGETS)), strict=False))
    model.backbone.embedding.weight.requires_grad_(False)
    for parameter in model.backbone.layers[0].parameters():
        parameter.requires_grad_(False)
    model.loss(IDS, TARGETS).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad)
        assert parameter.grad is None or relative_error(parameter.grad, everything[name]) < 1e-10
    model.requires_grad_(False)
    assert not model.loss(IDS, TARGETS).requires_grad


@each_model
@pytest.mark.parametrize("how", ["recompute", "checkpoint", "reentrant"])
def test_gradients_of_a_forward_that_is_computed_again(build, how):
    model = build().train()
    expected = gradients(model, model.loss(IDS, TARGETS))
    if how == "recompute":
        model.recompute = True
        loss = model.loss(IDS, TARGETS)
    elif how == "checkpoint":
        loss = checkpoint(model.loss, IDS, TARGETS, use_reentrant=False)
    else:
        embeds = model.backbone.embedding(IDS)
        loss = checkpoint(lambda x: model.loss(None, TARGETS, inputs_embeds=x), embeds, use_reentrant=True)
        loss.backward()
        assert_close([p.grad for p in model.parameters()], expected)
        return
    assert_close(gradients(model, loss), expected)


@each_model
def test_inference_mode_before_training(build):
    model = build().train()
    expected = gradients(model, model.loss(IDS, TARGETS))
    with torch.inference_mode():
        _, state = model(IDS)
        model.prefill(IDS), list(model.generate([1], 3, seed=0))
        model.step(IDS[:, 0], state)
    assert_close(gradients(model, model.loss(IDS, TARGETS)), expected)
    model.loss(IDS, TARGETS, state.clone()).backward()  # a state that was read in inference mode starts a training


@each_model
def test_pytorchs_hooks_on_saved_tensors_and_its_anomaly_detection(build):
    model = build()
    expected = gradients(model, model.loss(IDS, TARGETS))
    with torch.autograd.graph.save_on_cpu():
        assert_close(gradients(model, model.loss(IDS, TARGETS)), expected, 1e-14)
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        assert_close(gradients(model, model.loss(IDS, TARGETS)), expected, 1e-14)


@each_model
def test_replicas_and_shared_memory(build):
    model = build()
    expected = model(IDS)[0]
    replica = model._replicate_for_data_parallel()
    replica._parameters = dict(model._parameters)
    assert torch.equal(replica(IDS)[0], expected)
    assert torch.equal(nn.DataParallel(model)(IDS)[0], expected)
    assert model.share_memory().lm_head.weight is model.backbone.embedding.weight
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
    averaged.update_parameters(model), averaged.update_parameters(model)
    assert_close([averaged(IDS)[0]], [expected])


@each_model
def test_mixed_precision_as_pytorch_documents_it(build):
    model = build().float()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model.loss(IDS, TARGETS)
    scaler.scale(loss).backward()
    before = model.lm_head.weight.clone()
    scaler.step(optimizer), scaler.update()
    assert loss.dtype == torch.float32 and not torch.equal(model.lm_head.weight, before)


@each_model
def test_documents_may_be_named_by_any_integers(build):
    model, names = build(), torch.arange(14).expand(2, -1) // 5
    expected = model(IDS, seq_idx=names)[0]
    for dtype in (torch.int32, torch.uint8, torch.int16):
        assert torch.equal(model(IDS, seq_idx=names.to(dtype))[0], expected)
    assert torch.equal(model(IDS, seq_idx=names % 2 == 1)[0], expected)


def test_nothing_is_trained_by_a_text():
    model = mamba()
    assert not any(t.requires_grad for t in model.prefill(IDS)[1].ssm)
    logits, state = model.step(IDS[:, 0], model.initial_state(2))
    assert not logits.requires_grad
    model.lm_head.register_forward_hook(lambda *_: None)
    logits, state = model.step(IDS[:, 0], state)
    assert not logits.requires_grad and not state.ssm[0].requires_grad
    model.loss(IDS, TARGETS, state).backward()  # and a state that was stepped may be trained from


def test_a_config_and_a_class_are_what_a_tool_expects():
    model = mamba()
    assert model.config.to_dict()["d_model"] == 16 and isinstance(model.backbone.embedding, nn.Embedding)
    assert Mamba2Config.from_dict(pickle.loads(pickle.dumps(model.config)).to_dict()) == model.config
    assert repr(model) and isinstance(model.initial_state(), State) and isinstance(transformer(), TransformerLM)
