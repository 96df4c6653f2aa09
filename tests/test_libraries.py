"""What peft and accelerate do to a model."""

import copy

import pytest
import torch
from instruments import relative_error
from test_bypass import IDS, TARGETS, assert_one_model, mamba
from torch.nn import functional as F

from mamba2_min import Mamba2LM
from mamba2_min.errors import UserError
from mamba2_min.inference.quantize import quantize


def stir(model):
    """Trained parameters get values that act."""
    r = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=r).to(parameter.dtype))
    return model


# -- peft -------------------------------------------------------------------------------------------------------------

ALL = ["in_proj", "out_proj", "lm_head", "embedding"]
ADAPTERS = {
    "default targets": {"target_modules": ["in_proj", "out_proj"], "lora_dropout": 0.1},
    "all": {"target_modules": ALL},
    "all linear": {"target_modules": "all-linear"},
    "head": {"target_modules": ["lm_head"]},
    "convolution": {"target_modules": ["conv1d"], "r": 44},  # peft wants a rank that the groups divide
    "DoRA": {"target_modules": ["in_proj", "out_proj"], "use_dora": True},
    "whole modules": {"target_modules": ["in_proj"], "modules_to_save": ["lm_head", "conv1d", "norm_f"]},
    "some tokens": {"target_modules": ["in_proj"], "trainable_token_indices": {"embedding": [1, 2]}},
    "one layer": {"target_modules": ["in_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_peft_acts_and_learns(name, tied):
    peft = pytest.importorskip("peft")
    if tied and name == "whole modules":
        pytest.skip("peft itself unties the head")
    model = mamba(tie_embeddings=tied)
    before = copy.deepcopy(model)
    wrapped = stir(peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, **ADAPTERS[name]}))).eval()
    assert_one_model(wrapped.get_base_model(), before)
    assert torch.equal(wrapped(IDS)[0], wrapped.get_base_model()(IDS)[0])
    wrapped.loss(IDS, TARGETS).backward()
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad.any() for parameter in trained)


@pytest.mark.parametrize("name", ["IA3Config", "LoHaConfig", "OFTConfig", "LNTuningConfig"])
def test_other_adapters_of_peft_act(name):
    peft = pytest.importorskip("peft")
    options = {
        "IA3Config": {"target_modules": ["in_proj", "out_proj"], "feedforward_modules": ["out_proj"]},
        "LoHaConfig": {"target_modules": ["in_proj"]},
        "OFTConfig": {"target_modules": ["in_proj"], "oft_block_size": 4},
        "LNTuningConfig": {"target_modules": ["norm_f"]},
    }[name]
    model = mamba(tie_embeddings=False).float()
    before = copy.deepcopy(model)
    wrapped = stir(peft.get_peft_model(model, getattr(peft, name)(**options))).eval()
    whole, base = wrapped(IDS)[0], wrapped.get_base_model()
    assert relative_error(whole, before(IDS)[0]) > 1e-3
    state = base.initial_state(2)
    got = torch.stack([base.step(IDS[:, t], state)[0].clone() for t in range(IDS.shape[1])], 1)
    assert relative_error(got, whole) < 1e-5
    assert relative_error(base.loss(IDS, TARGETS), F.cross_entropy(whole.flatten(0, 1), TARGETS.flatten())) < 1e-6


def test_an_adapter_of_peft_is_switched_merged_saved_and_loaded(tmp_path):
    peft = pytest.importorskip("peft")
    model = mamba(tie_embeddings=False)
    before = copy.deepcopy(model)
    wrapped = stir(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=ALL))).eval()
    logits = wrapped(IDS)[0].detach()
    with pytest.raises(UserError, match="is not a plain layer, and would lose what it adds: merge adapters"):
        quantize(copy.deepcopy(wrapped.get_base_model()).float(), "bf16")
    with wrapped.disable_adapter():
        assert relative_error(wrapped(IDS)[0], before(IDS)[0]) < 1e-12
        state = model.initial_state(2)
        assert relative_error(model.step(IDS[:, 0], state)[0], before(IDS[:, :1])[0][:, 0]) < 1e-10
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(before), tmp_path).eval()
    assert relative_error(loaded(IDS)[0], logits) < 1e-6  # written as float32
    assert list(loaded.generate([1, 2], 5, temperature=0)) == list(wrapped.generate([1, 2], 5, temperature=0))
    merged = wrapped.merge_and_unload()
    assert type(merged) is Mamba2LM and relative_error(merged(IDS)[0], logits) < 1e-10
    merged.requires_grad_(True)
    assert_one_model(merged, before)


# -- accelerate -------------------------------------------------------------------------------------------------------


def read(model, expected):
    """Forward, prompt and steps, and text, against those of the model before it was moved."""
    with torch.no_grad():
        assert relative_error(model(IDS)[0], expected(IDS)[0]) < 1e-10
        documents = torch.arange(IDS.shape[1]).expand(2, -1) // 4
        assert relative_error(model(IDS, seq_idx=documents)[0], expected(IDS, seq_idx=documents)[0]) < 1e-10
        assert relative_error(model.loss(IDS, TARGETS), expected.loss(IDS, TARGETS)) < 1e-10
        logits, state = model.prefill(IDS[:, :6])
        got = [logits, *(model.step(IDS[:, t], state)[0].clone() for t in range(6, IDS.shape[1]))]
        assert relative_error(torch.stack(got, 1), expected(IDS)[0][:, 5:]) < 1e-10
    assert list(model.generate([1, 2, 3], 6, temperature=0)) == list(expected.generate([1, 2, 3], 6, temperature=0))
    assert model.initial_state(2).ssm[0].device.type == "cpu"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("where", ["cpu", "disk", "a layer on disk", "hooks alone"])
def test_a_model_whose_weights_are_elsewhere(where, tied, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = mamba(tie_embeddings=tied).eval()
    expected = copy.deepcopy(model)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif where == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        parts = ["backbone.embedding", "backbone.layers.0", "backbone.layers.1", "backbone.norm_f", "lm_head"]
        places = dict.fromkeys(parts, "cpu")
        if where == "a layer on disk":
            places["backbone.layers.1"] = "disk"
        accelerate.dispatch_model(
            model, device_map=places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
        )
    read(model, expected)


def test_a_model_that_is_made_empty_and_filled(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    safetensors = pytest.importorskip("safetensors.torch")
    expected = mamba(tie_embeddings=False).float().eval()
    safetensors.save_file(expected.state_dict(), tmp_path / "model.safetensors")
    with accelerate.init_empty_weights():
        model = Mamba2LM(expected.config)
    assert model.lm_head.weight.is_meta
    file = str(tmp_path / "model.safetensors")
    model = accelerate.load_checkpoint_and_dispatch(model, file, device_map={"": "cpu"})
    assert torch.equal(model.eval()(IDS)[0], expected(IDS)[0])


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def make(**options):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        return accelerate.Accelerator(cpu=True, **options)

    return make


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_with_an_accelerator(accelerator, precision, tmp_path):
    make = accelerator(mixed_precision=precision)
    model, expected = mamba().float().train(), mamba().float().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = make.prepare(model, optimizer)
    loss, exact = model.loss(IDS, TARGETS), expected.loss(IDS, TARGETS)
    make.backward(loss)
    exact.backward()
    tolerance = 1e-5 if precision == "no" else 5e-2
    assert relative_error(loss, exact) < tolerance
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert relative_error(parameter.grad, other.grad) < 4 * tolerance
    optimizer.step()
    make.save_model(model, str(tmp_path))
    assert (tmp_path / "model.safetensors").is_file()
    assert type(make.unwrap_model(model, keep_fp32_wrapper=False)) is Mamba2LM
