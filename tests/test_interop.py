"""Folders of other programs: what they load of ours and we of theirs computes the same; what is wrong is one line."""

import copy
import json
import math
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from small_runs import SHAPE, make_trainer, write_documents
from torch.nn import functional as F

from mamba2_min import files
from mamba2_min.checkpoints import checkpoint, layouts
from mamba2_min.config import Mamba2Config
from mamba2_min.data.corpus import load_corpus
from mamba2_min.errors import UserError
from mamba2_min.evaluation.perplexity import evaluate
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.training.trainer import Trainer

os.environ["HF_HUB_OFFLINE"] = "1"

# Odd sizes, every switch that the Hugging Face layout has, groups of 1, some and all heads, padded and untied heads.
CONFIGS = {
    "plain": dict(vocab_size=61, d_model=32, d_state=16, headdim=16),
    "two groups": dict(vocab_size=61, d_model=32, d_state=16, headdim=16, ngroups=2),
    "a group a head": dict(vocab_size=61, d_model=32, d_state=8, headdim=16, ngroups=4),
    "untied": dict(vocab_size=48, d_model=24, d_state=12, headdim=8, tie_embeddings=False),
    "padded": dict(vocab_size=61, d_model=32, d_state=16, headdim=32, pad_vocab_size_multiple=16),
    "biases turned round": dict(vocab_size=40, d_model=32, d_state=16, headdim=16, proj_bias=True, conv_bias=False),
    "odd sizes, three groups": dict(
        vocab_size=37, d_model=27, expand=3, headdim=9, ngroups=3, d_state=5, d_conv=3, chunk_size=7, n_layer=3
    ),
    "one channel a head": dict(vocab_size=33, d_model=12, expand=1, headdim=1, d_state=3, d_conv=2, chunk_size=1),
    "large state, other eps": dict(
        vocab_size=50, d_model=16, headdim=32, d_state=128, d_conv=5, norm_eps=1e-2, chunk_size=256, n_layer=1
    ),
    "untied, padded, one group a head": dict(
        vocab_size=50,
        d_model=32,
        expand=2,
        headdim=32,
        ngroups=2,
        pad_vocab_size_multiple=8,
        tie_embeddings=False,
        proj_bias=True,
        residual_in_fp32=False,
    ),
}


def lively(seed: int = 0, **values) -> Mamba2LM:
    """A model with no parameter at a value that could hide a slip: D and the norms are not ones, biases not zeros."""
    config = Mamba2Config(**{"n_layer": 2, "norm_per_group": values.get("ngroups", 1) > 1, **values})
    model = Mamba2LM(config, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("embedding.weight", "lm_head.weight")):
                parameter.normal_(0, 0.1, generator=generator)
            elif name.endswith("proj.weight"):  # layers that outweigh the embedding, so that greedy words vary
                parameter.mul_(4)
            elif parameter.dim() == 1:
                parameter.add_(torch.rand(parameter.shape, generator=generator) - 0.5)
    return model


def ids_for(model: Mamba2LM, length: int = 37, rows: int = 2) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(7))


def logits(model: Mamba2LM, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids)[0]


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def reference(config: Mamba2Config, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """The network written out once more, (l,) ids -> (l, vocab_size): token by token, head by head, in float64."""
    c, w = config, {name: tensor.double() for name, tensor in weights.items()}
    groups = c.ngroups if c.norm_per_group else 1

    def rms(x, weight, parts=1):
        x = x.view(parts, -1)
        return (x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt()).flatten() * weight

    stream = [w["backbone.embedding.weight"][i] for i in ids.tolist()]
    for layer in range(c.n_layer):
        m = {k.split(".mixer.")[1]: v for k, v in w.items() if k.startswith(f"backbone.layers.{layer}.mixer.")}
        window = [torch.zeros(c.conv_dim, dtype=torch.float64)] * c.d_conv
        H = torch.zeros(c.nheads, c.headdim, c.d_state, dtype=torch.float64)
        for t, u in enumerate(stream):
            u = F.linear(rms(u, w[f"backbone.layers.{layer}.norm.weight"]), m["in_proj.weight"], m.get("in_proj.bias"))
            z, xBC, dt = u.split([c.d_inner, c.conv_dim, c.nheads])
            window = [*window[1:], xBC]
            xBC = sum(v * m["conv1d.weight"][:, 0, k] for k, v in enumerate(window)) + m.get("conv1d.bias", 0)
            x, B, C = F.silu(xBC).split([c.d_inner, c.ngroups * c.d_state, c.ngroups * c.d_state])
            dt = F.softplus(dt + m["dt_bias"])
            y = []
            for h in range(c.nheads):
                g = h // (c.nheads // c.ngroups)
                Bh, Ch = (v[g * c.d_state : (g + 1) * c.d_state] for v in (B, C))
                xh = x[h * c.headdim : (h + 1) * c.headdim]
                H[h] = H[h] * (-dt[h] * m["A_log"][h].exp()).exp() + dt[h] * torch.outer(xh, Bh)
                y.append(H[h] @ Ch + m["D"][h] * xh)
            y = torch.cat(y)
            if c.norm_before_gate:
                y = rms(y, m["norm.weight"], groups) * F.silu(z)
            else:
                y = rms(y * F.silu(z), m["norm.weight"], groups)
            stream[t] = stream[t] + F.linear(y, m["out_proj.weight"], m.get("out_proj.bias"))
    head = w["lm_head.weight"][: c.vocab_size]
    return torch.stack([head @ rms(v, w["backbone.norm_f.weight"]) for v in stream])


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("transformers", reason="transformers is not installed")
        module.logging.set_verbosity_error()
        module.logging.disable_progress_bar()
        from transformers.models.mamba2 import modeling_mamba2

        # What version 4 cannot do, and what it is skipped for.
        norm = modeling_mamba2.MambaRMSNormGated.__init__.__code__.co_varnames
        module.normalises_groups = "group_size" in norm
        module.saves_tied = bool(modeling_mamba2.Mamba2ForCausalLM._tied_weights_keys)
    return module


def theirs(transformers, folder: Path):
    return transformers.Mamba2ForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", CONFIGS)
class TestAgainstTransformers:
    """Ten configurations, random weights, both ways: the same logits, the same hundred words."""

    def test_ours_in_transformers(self, transformers, tmp_path, name):
        ours = lively(**CONFIGS[name])
        ids = ids_for(ours)
        expected = reference(ours.config, ours.state_dict(), ids[0])
        assert worst(logits(ours, ids)[0], expected) < 2e-5
        if ours.config.ngroups > 1 and not transformers.normalises_groups:
            pytest.skip(f"transformers {transformers.__version__} normalises all groups together; ours is exact")
        ours.save_pretrained(tmp_path, format="hf")
        other = theirs(transformers, tmp_path)
        with torch.no_grad():
            got = other(ids).logits[..., : ours.config.vocab_size]
        assert worst(logits(ours, ids), got) < 2e-4
        assert worst(got[0], expected) < 2e-4

        prompt = ids[0, :5]
        words = other.generate(prompt[None], max_new_tokens=100, do_sample=False)[0, 5:].tolist()
        assert list(ours.generate(prompt.tolist(), 100, temperature=0)) == words
        assert len(set(words)) > 3

    def test_theirs_here(self, transformers, tmp_path, name):
        if CONFIGS[name].get("ngroups", 1) > 1 and not transformers.normalises_groups:
            pytest.skip(f"transformers {transformers.__version__} normalises all groups together")
        if CONFIGS[name].get("tie_embeddings", True) and not transformers.saves_tied:
            pytest.skip(f"transformers {transformers.__version__} cannot save a tied Mamba-2")
        values = layouts.config_to("hf", lively(**CONFIGS[name]).config)
        del values["mamba2_min"]
        torch.manual_seed(0)
        other = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**values)).eval()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        other.save_pretrained(tmp_path, max_shard_size="4KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        ours = Mamba2LM.from_pretrained(tmp_path)
        ids = ids_for(ours)
        with torch.no_grad():
            assert worst(logits(ours, ids), other(ids).logits) < 2e-4


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("format", ["own", "hf", "official"])
def test_a_round_trip_is_bit_for_bit(tmp_path, format, name):
    if format == "hf":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    values = {**CONFIGS[name], "dropout": 0.25, "a_init": "uniform"}
    if format == "official":
        values.pop("norm_eps", None)
    model = lively(**values)
    model.save_pretrained(tmp_path, format=format)
    again = Mamba2LM.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)
    assert (again.lm_head.weight is again.backbone.embedding.weight) == model.config.tie_embeddings
    kept = again.config.to_dict()
    if format == "official":  # it has no words for the settings of a training
        kept |= {"dropout": 0.25, "a_init": "uniform"}
    assert kept == model.config.to_dict()
    assert not again.training

    model.save_pretrained(tmp_path, format=format)  # over itself
    assert logits(Mamba2LM.from_pretrained(tmp_path), ids_for(model)).equal(logits(model, ids_for(model)))


@pytest.mark.parametrize(("layout", "other"), [("own", "official"), ("own", "hf"), ("official", "own")])
def test_a_folder_keeps_its_layout(tmp_path, layout, other):
    model = lively(**CONFIGS["plain"])
    model.save_pretrained(tmp_path, format=layout)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert "another layout" in refusal(lambda: model.save_pretrained(tmp_path, format=other))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_padded_vocabulary_keeps_its_size_until_someone_resizes_it(transformers, tmp_path):
    model = lively(**CONFIGS["padded"])
    model.save_pretrained(tmp_path, format="hf")
    other = theirs(transformers, tmp_path)
    assert other.config.vocab_size == 64
    other.resize_token_embeddings(70)
    other.save_pretrained(tmp_path / "resized")
    resized = Mamba2LM.from_pretrained(tmp_path / "resized")
    assert (resized.config.vocab_size, resized.config.padded_vocab_size) == (70, 70)


OFFICIAL = {  # as state-spaces publishes them
    "d_model": 32,
    "d_intermediate": 0,
    "n_layer": 2,
    "vocab_size": 61,
    "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}


def write_official(folder: Path, **ssm) -> Mamba2LM:
    """A folder in the official layout, written from the format and not by `save_pretrained`; returns what it holds."""
    values = {**OFFICIAL, "ssm_cfg": {"layer": "Mamba2", **ssm}}
    model = lively(
        vocab_size=61,
        d_model=32,
        pad_vocab_size_multiple=16,
        d_state=ssm.get("d_state", 128),
        headdim=ssm.get("headdim", 64),
        ngroups=ssm.get("ngroups", 1),
        chunk_size=256,
        norm_before_gate=ssm.get("norm_before_gate", False),
    )
    (folder / "config.json").write_text(json.dumps(values))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("ngroups", [1, 2, 4])
def test_the_official_layout(tmp_path, ngroups, norm_before_gate):
    model = write_official(tmp_path, d_state=8, headdim=16, ngroups=ngroups, norm_before_gate=norm_before_gate)
    read = Mamba2LM.from_pretrained(tmp_path)
    assert read.config == model.config
    assert read.config.norm_per_group == (ngroups > 1)
    ids = ids_for(model)
    expected = reference(read.config, torch.load(tmp_path / "pytorch_model.bin"), ids[0])
    assert worst(logits(read, ids)[0], expected) < 2e-5


def test_the_official_defaults(tmp_path):
    model = write_official(tmp_path)
    read = Mamba2LM.from_pretrained(tmp_path).config
    assert read == model.config
    assert (read.d_state, read.headdim, read.chunk_size, read.padded_vocab_size) == (128, 64, 256, 64)


def test_what_official_is_written_has_both_of_a_tied_pair_and_no_key_of_ours(tmp_path):
    model = lively(**CONFIGS["padded"])
    model.save_pretrained(tmp_path, format="official")
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert weights.keys() == model.state_dict().keys()
    assert weights["lm_head.weight"].data_ptr() == weights["backbone.embedding.weight"].data_ptr()
    values = json.loads((tmp_path / "config.json").read_text())
    assert values.keys() == OFFICIAL.keys()
    assert (values["vocab_size"], values["pad_vocab_size_multiple"]) == (61, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", ["own", "hf", "official"])
def test_half_precision_weights_become_float32(tmp_path, format, dtype):
    if format == "hf":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    model = lively(**CONFIGS["plain"]).to(dtype)
    model.save_pretrained(tmp_path, format=format)
    again = Mamba2LM.from_pretrained(tmp_path)
    for key, tensor in model.state_dict().items():
        assert again.state_dict()[key].dtype == torch.float32
        assert torch.equal(again.state_dict()[key], tensor.float())


@pytest.mark.parametrize("format", ["own", "official"])
def test_a_checkpoint_of_a_gpu_loads_without_one(tmp_path, monkeypatch, format):
    model = lively(**CONFIGS["plain"])
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        model.save_pretrained(tmp_path, format=format)
    path = tmp_path / layouts.WEIGHT_FILES[format][0]
    assert b"cuda:0" in path.read_bytes()
    assert logits(Mamba2LM.from_pretrained(tmp_path), ids_for(model)).equal(logits(model, ids_for(model)))


def test_the_hugging_face_layout_in_pickles_and_shards(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    model = lively(**CONFIGS["untied"])
    model.save_pretrained(tmp_path, format="hf")
    (tmp_path / "model.safetensors").unlink()
    weights = layouts.weights_to("hf", model.config, dict(model.state_dict()))
    torch.save(weights, tmp_path / "pytorch_model.bin")
    expected = logits(model, ids_for(model))
    assert logits(Mamba2LM.from_pretrained(tmp_path), ids_for(model)).equal(expected)

    (tmp_path / "pytorch_model.bin").unlink()
    names = list(weights)
    shards = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, part in shards.items():
        torch.save({name: weights[name].clone() for name in part}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert logits(Mamba2LM.from_pretrained(tmp_path), ids_for(model)).equal(expected)


def test_the_official_name_of_the_embedding_in_a_hugging_face_folder(tmp_path):
    save_file = pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file
    model = lively(**CONFIGS["plain"])
    model.save_pretrained(tmp_path, format="hf")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # a tied head too, as some publish
    save_file(weights, tmp_path / "model.safetensors")
    assert logits(Mamba2LM.from_pretrained(tmp_path), ids_for(model)).equal(logits(model, ids_for(model)))


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_told_without_building(name):
    model = lively(**CONFIGS[name])
    told = dict(layouts.parameter_shapes(model.config))
    assert told == {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


UNSAYABLE = [
    ("hf", dict(norm_before_gate=True), "gates before the norm"),
    ("hf", dict(ngroups=2, norm_per_group=False), "normalises each group on its own"),
    ("official", dict(ngroups=2, norm_per_group=False), "normalises each group on its own"),
    ("official", dict(norm_eps=1e-6), "1e-05 alone"),
]


@pytest.mark.parametrize(("format", "values", "says"), UNSAYABLE)
def test_what_a_layout_cannot_say_is_refused_before_anything_is_written(tmp_path, format, values, says):
    model = lively(**{**CONFIGS["plain"], **values})
    folder = tmp_path / "new"
    assert says in refusal(lambda: model.save_pretrained(folder, format=format))
    assert not folder.exists()
    with pytest.raises(ValueError, match="own, official, hf"):
        model.save_pretrained(folder, format="onnx")


def refusal(call) -> str:
    """The one line of the UserError that `call` must raise."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert text and "\n" not in text and len(text) < 700
    return text


HF_CONFIGS = [
    ({"model_type": "llama"}, "model_type is 'llama'"),
    ({"model_type": ["mamba2"]}, 'only "mamba2"'),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"rms_norm": False}, "rms_norm must be true"),
    ({"time_step_limit": [0.0, 0.1]}, "does not clamp dt"),
    ({"time_step_limit": [0.01, math.inf]}, "does not clamp dt"),
    ({"time_step_limit": "none"}, "does not clamp dt"),
    ({"num_heads": 5}, "num_heads * head_dim must equal expand * hidden_size = 2 * 32 = 64, and num_heads 5"),
    ({"num_heads": 10**12}, "num_heads 1000000000000"),
    ({"num_heads": 10**12, "head_dim": 1, "hidden_size": 10**12 // 2}, "d_model must be an integer"),
    ({"num_hidden_layers": 10**7}, "lacks the tensor backbone.layers.2.norm.weight"),
    ({"num_hidden_layers": 10**12}, "n_layer must be an integer"),
    ({"num_hidden_layers": 1}, "unexpected tensor 'backbone.layers.1."),
    ({"vocab_size": 2**23}, "backbone.embedding.weight is (61, 32), and the config asks for (8388608, 32)"),
    ({"vocab_size": "61"}, "vocab_size must be an integer"),
    ({"state_size": 10**9}, "d_state must be an integer"),
    ({"state_size": None}, "d_state must be an integer"),
    ({"head_dim": 0}, "headdim must be an integer"),
    ({"expand": 2.5}, "expand must be an integer"),
    ({"n_groups": 3}, "ngroups must divide the number of heads"),
    ({"n_groups": 2}, "in_proj.weight is"),
    ({"layer_norm_epsilon": 10**400}, "norm_eps must be a number"),
    ({"layer_norm_epsilon": math.nan}, "norm_eps must be a number"),
    ({"tie_word_embeddings": False}, "lacks the tensor lm_head.weight"),
    ({"use_conv_bias": False}, "unexpected tensor"),
    ({"use_bias": True}, "lacks the tensor backbone.layers.0.mixer.in_proj.bias"),
    ({"mamba2_min": {"vocab_size": [1]}}, "vocab_size must be an integer"),
]


class TestConfigsThatAreWrong:
    @pytest.fixture(autouse=True)
    def _nothing_is_built(self, monkeypatch):
        def build(self, config, seed=None):
            raise AssertionError("a model was built from a config that disagrees with the weights")

        self.model = lively(**CONFIGS["plain"])
        monkeypatch.setattr(Mamba2LM, "__init__", build)

    @pytest.mark.parametrize(("change", "says"), HF_CONFIGS)
    def test_hugging_face(self, tmp_path, change, says):
        pytest.importorskip("safetensors", reason="safetensors is not installed")
        self.model.save_pretrained(tmp_path, format="hf")
        self._change(tmp_path, lambda values: values.update(change))
        assert says in refusal(lambda: Mamba2LM.from_pretrained(tmp_path))

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"attn_layer_idx": [1]}, "attention"),
            ({"d_intermediate": 64}, "MLPs"),
            ({"rms_norm": False}, "RMSNorm alone"),
            ({"ssm_cfg": {}}, "'Mamba1'"),
            ({"ssm_cfg": {"layer": "Mamba1"}}, "'Mamba1'"),
            ({"ssm_cfg": "Mamba2"}, "ssm_cfg must be an object"),
            ({"ssm_cfg": None}, "ssm_cfg must be an object"),
            ({"n_layers": 2}, "unknown config key 'n_layers'; did you mean 'n_layer'?"),
            ({"n_layer": 3}, "lacks the tensor"),
        ],
    )
    def test_official(self, tmp_path, change, says):
        self.model.save_pretrained(tmp_path, format="official")
        self._change(tmp_path, lambda values: values.update(change))
        assert says in refusal(lambda: Mamba2LM.from_pretrained(tmp_path))

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"D_has_hdim": True}, "D_has_hdim"),
            ({"d_ssm": 32}, "d_ssm 32"),
            ({"rmsnorm": False}, "RMSNorm alone"),
            ({"dt_limit": [0.001, 0.1]}, "does not clamp dt"),
            ({"nheads": 2}, "unknown config key 'nheads'"),
            ({"ngroups": 10**12}, "ngroups must be an integer"),
        ],
    )
    def test_official_layers(self, tmp_path, change, says):
        self.model.save_pretrained(tmp_path, format="official")
        self._change(tmp_path, lambda values: values["ssm_cfg"].update(change))
        assert says in refusal(lambda: Mamba2LM.from_pretrained(tmp_path))

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"n_layer": 10**6}, "lacks the tensor"),
            ({"n_heads": 8}, "unknown config key 'n_heads'"),
            ({"d_model": 2**24, "expand": 2**24, "headdim": 2**24}, "the config asks for"),
            ({"tie_embeddings": False}, "lacks the tensor lm_head.weight"),
        ],
    )
    def test_own(self, tmp_path, change, says):
        self.model.save_pretrained(tmp_path)
        self._change(tmp_path, lambda values: values.update(change))
        assert says in refusal(lambda: Mamba2LM.from_pretrained(tmp_path))

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("[]", "not a JSON object"),
            ("null", "not a JSON object"),
            ("{", "not valid JSON"),
            ("[" * 100_000, "not valid JSON"),
            ("", "not valid JSON"),
            ("{}", "no vocab_size"),
            ('{"vocab_size": 9}', "the config asks for"),
        ],
    )
    def test_not_a_config(self, tmp_path, text, says):
        self.model.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(text)
        assert says in refusal(lambda: Mamba2LM.from_pretrained(tmp_path))

    def test_every_key_with_every_kind_of_value(self, tmp_path):
        """Nothing but a UserError, or a config that the weights agree with, whatever stands in a key's place."""
        pytest.importorskip("safetensors", reason="safetensors is not installed")
        for layout in ("own", "official", "hf"):
            folder = tmp_path / layout
            self.model.save_pretrained(folder, format=layout)
            path = folder / "config.json"
            values = json.loads(path.read_text())
            places = [(values, key) for key in values] + [(values.get("ssm_cfg"), k) for k in values.get("ssm_cfg", {})]
            for holder, key in places:
                for wrong in (None, True, -1, 0, 1.5, 10**30, "x" * 2000, [], [[1]], {}, {"a\nb": {}}):
                    kept, holder[key] = holder[key], copy.deepcopy(wrong)
                    path.write_text(json.dumps(values))
                    holder[key] = kept
                    try:
                        checkpoint.load_model(folder)
                    except UserError as error:
                        assert "\n" not in str(error) and len(str(error)) < 700

    def _change(self, folder: Path, change) -> None:
        values = json.loads((folder / "config.json").read_text())
        change(values)
        (folder / "config.json").write_text(json.dumps(values))


class Planted:
    """Unpickling this would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


class TestFilesThatAreWrong:
    @pytest.fixture(params=["own", "official", "hf"])
    def saved(self, request, tmp_path):
        """A folder, its weights' file, and the weights under the names that the layout has."""
        if request.param == "hf":
            pytest.importorskip("safetensors", reason="safetensors is not installed")
        model = lively(**CONFIGS["plain"])
        model.save_pretrained(tmp_path, format=request.param)
        weights = layouts.weights_to(request.param, model.config, {k: v.clone() for k, v in model.state_dict().items()})
        return tmp_path, tmp_path / layouts.WEIGHT_FILES[request.param][0], weights

    def refused(self, folder: Path) -> str:
        return refusal(lambda: Mamba2LM.from_pretrained(folder))

    def write(self, path: Path, weights: dict[str, torch.Tensor]) -> None:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(weights, path)
        else:
            torch.save(weights, path)

    def test_truncated(self, saved):
        folder, path, _ = saved
        whole = path.read_bytes()
        for size in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            assert str(path) in self.refused(folder)

    def test_not_weights(self, saved):
        folder, path, _ = saved
        for garbage in (b"\x00" * 64, b"\xff" * 64, b"PK\x03\x04 no archive", b"{}", os.urandom(512), b"\x80\x02."):
            path.write_bytes(garbage)
            self.refused(folder)

    @pytest.mark.parametrize("way", ["torch", "pickle", "as safetensors"])
    def test_code_is_not_run(self, saved, tmp_path, way):
        folder, path, weights = saved
        trap = tmp_path / "executed"
        content = {**weights, "backbone.norm_f.weight": Planted(trap)}
        if way == "torch":
            torch.save(content, path)
        else:
            path.write_bytes(pickle.dumps(content if way == "pickle" else Planted(trap)))
        self.refused(folder)
        assert not trap.exists()

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda w: w.pop("backbone.layers.1.mixer.D"), "lacks the tensor backbone.layers.1.mixer.D"),
            (lambda w: w.update({"backbone.layers.0.mlp.w\n": torch.ones(1)}), "unexpected tensor"),
            (lambda w: w.update({"backbone.layers.0.mixer.D": torch.ones(4, 16)}), "mixer.D is (4, 16)"),
            (lambda w: w.update({"backbone.norm_f.weight": torch.full((32,), math.nan)}), "NaN"),
            (lambda w: w.update({"backbone.norm_f.weight": torch.full((32,), math.inf)}), "infinity"),
            (lambda w: w.update({"backbone.norm_f.weight": torch.ones(32, dtype=torch.int8)}), "torch.int8"),
            (lambda w: w.update({"lm_head.weight": torch.ones(61, 32)}), "lm_head.weight is not backbone.embedding"),
            (lambda w: w.clear(), "lacks the tensor"),
        ],
    )
    def test_weights_at_odds_with_the_config(self, saved, change, says):
        folder, path, weights = saved
        change(weights)
        self.write(path, weights)
        assert says in self.refused(folder)

    @pytest.mark.parametrize("content", [[], None, 5, {"a": 1}, {1: torch.ones(1)}, {"state_dict": {}}])
    def test_not_a_dict_of_tensors(self, tmp_path, content):
        lively(**CONFIGS["plain"]).save_pretrained(tmp_path)
        torch.save(content, tmp_path / "model.pt")
        self.refused(tmp_path)

    def test_tensors_that_are_not_there(self, tmp_path, monkeypatch):
        """A few kilobytes that claim to be a model of 4 TB, as the config does."""
        config = Mamba2Config(vocab_size=2**20, d_model=2**20, n_layer=1, headdim=64)
        monkeypatch.setattr(Mamba2LM, "__init__", lambda *_: pytest.fail("built"))
        files.save_json(tmp_path / "config.json", config.to_dict())
        for one in (torch.zeros(1), torch.zeros(1, device="meta")):
            weights = {name: one.expand(shape) for name, shape in layouts.parameter_shapes(config)}
            torch.save(weights, tmp_path / "model.pt")
            assert (tmp_path / "model.pt").stat().st_size < 100_000
            self.refused(tmp_path)
        nowhere, nothing = torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0)
        sparse = {
            n: torch.sparse_coo_tensor(nowhere.expand(len(s), 0), nothing, s, check_invariants=True)
            for n, s in layouts.parameter_shapes(config)
        }
        torch.save(sparse, tmp_path / "model.pt")
        assert "sparse" in self.refused(tmp_path)

    def test_many_tensors_on_one_storage(self, tmp_path):
        model = lively(**{**CONFIGS["plain"], "n_layer": 1})
        layer = {n: t for n, t in model.state_dict().items() if ".layers.0." in n}
        weights = dict(model.state_dict())
        for i in range(1, 50):
            weights |= {n.replace(".0.", f".{i}.", 1): t for n, t in layer.items()}
        files.save_json(tmp_path / "config.json", {**model.config.to_dict(), "n_layer": 50})
        torch.save(weights, tmp_path / "model.pt")
        assert "bytes and hold" in self.refused(tmp_path)

    def test_nothing_there(self, saved):
        folder, path, _ = saved
        path.unlink()
        assert f"holds no {path.name}" in self.refused(folder)
        path.mkdir()
        assert f"holds no {path.name}" in self.refused(folder)
        (folder / "config.json").unlink()
        assert "holds no config.json" in self.refused(folder)
        assert "is not a folder" in self.refused(folder / "absent")


class TestShards:
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        save_file = pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file
        self.folder = tmp_path / "model"
        self.model = lively(**CONFIGS["plain"])
        self.model.save_pretrained(self.folder, format="hf")
        (self.folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
        weights = layouts.weights_to("hf", self.model.config, dict(self.model.state_dict()))
        names = list(weights)
        self.map = {}
        for file, part in (("model-1.safetensors", names[:5]), ("model-2.safetensors", names[5:])):
            save_file({name: weights[name] for name in part}, self.folder / file)
            self.map |= {name: file for name in part}
        self.index({"weight_map": self.map})

    def index(self, value) -> None:
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(value))

    def test_whole(self):
        read = Mamba2LM.from_pretrained(self.folder)
        assert logits(read, ids_for(read)).equal(logits(self.model, ids_for(read)))

    @pytest.mark.parametrize(
        "name",
        [
            "../outside.safetensors",
            "..",
            ".",
            "",
            "/etc/passwd",
            "sub/model-1.safetensors",
            "model.pt",
            "..\\outside.safetensors",
            "C:\\outside.safetensors",
            "C:outside.safetensors",
            "a\0.safetensors",
            "a\nb.safetensors",
        ],
    )
    def test_names_that_lead_elsewhere(self, name):
        for path in (name, f"{self.folder.parent}/{name}"):
            self.index({"weight_map": {**self.map, "backbone.norm_f.weight": path}})
            assert "not a file of this folder" in refusal(lambda: Mamba2LM.from_pretrained(self.folder))

    @pytest.mark.parametrize("value", [[], None, {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}])
    def test_not_an_index(self, value):
        self.index(value)
        assert "no weight_map" in refusal(lambda: Mamba2LM.from_pretrained(self.folder))

    def test_missing_or_doubled(self):
        second = self.folder / "model-2.safetensors"
        second.rename(self.folder / "model-3.safetensors")
        assert "model-2.safetensors" in refusal(lambda: Mamba2LM.from_pretrained(self.folder))
        self.index({"weight_map": {name: "model-1.safetensors" for name in self.map}})
        assert "lacks the tensor" in refusal(lambda: Mamba2LM.from_pretrained(self.folder))
        (self.folder / "model-2.safetensors").write_bytes((self.folder / "model-1.safetensors").read_bytes())
        self.index({"weight_map": self.map})
        assert "another shard holds too" in refusal(lambda: Mamba2LM.from_pretrained(self.folder))


def test_without_safetensors(tmp_path, monkeypatch):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    model = lively(**CONFIGS["plain"])
    model.save_pretrained(tmp_path, format="hf")
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    assert 'pip install "mamba2-min[hf]"' in refusal(lambda: Mamba2LM.from_pretrained(tmp_path))
    assert 'pip install "mamba2-min[hf]"' in refusal(lambda: model.save_pretrained(tmp_path / "new", format="hf"))
    assert not list((tmp_path / "new").iterdir())


# What is written passes the reader's rules


FORMATS = ["own", "official", "hf"]


def saved_and_read(model: Mamba2LM, folder: Path, format: str = "own") -> Mamba2LM:
    """What is read back of a model that was saved; both compute the same."""
    if format == "hf":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    model.save_pretrained(folder, format=format)
    read = Mamba2LM.from_pretrained(folder)
    assert logits(read, ids_for(model)).equal(logits(model.eval(), ids_for(model)))
    return read


def untied_by_assignment(differ: bool) -> Mamba2LM:
    """A model whose config ties the head, and whose head load_state_dict(assign=True) has made another tensor."""
    model = lively(**CONFIGS["plain"])
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    assert model.lm_head.weight is not model.backbone.embedding.weight
    if differ:
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
    return model


@pytest.mark.parametrize("differ", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_a_head_that_was_untied_by_assignment(tmp_path, format, differ):
    read = saved_and_read(untied_by_assignment(differ), tmp_path, format)
    assert read.config.tie_embeddings is not differ
    assert (read.lm_head.weight is read.backbone.embedding.weight) is not differ


def tie_by_hand(model):
    model.lm_head.weight = model.backbone.embedding.weight


def share_a_weight(model):
    first, second = model.backbone.layers
    second.mixer.in_proj.weight = first.mixer.in_proj.weight
    second.norm = first.norm


def make_views(model):
    """All the vectors of a layer lie in one storage, as fused optimizers arrange them; and one of them backwards."""
    mixer = model.backbone.layers[0].mixer
    flat = torch.cat([mixer.dt_bias, mixer.A_log, mixer.D]).detach()
    for name, part in zip(("dt_bias", "A_log", "D"), flat.split(len(mixer.D)), strict=True):
        setattr(mixer, name, torch.nn.Parameter(part))
    mixer.out_proj.weight = torch.nn.Parameter(mixer.out_proj.weight.detach().t().contiguous().t())


@pytest.mark.parametrize("change", [tie_by_hand, share_a_weight, make_views])
@pytest.mark.parametrize("format", FORMATS)
def test_weights_that_share_memory_are_cloned(tmp_path, format, change):
    model = lively(**CONFIGS["untied"])
    change(model)
    read = saved_and_read(model, tmp_path, format)
    assert read.config == model.config
    assert len({p.data_ptr() for p in read.parameters()}) == len(list(read.parameters()))
    path = tmp_path / layouts.WEIGHT_FILES[format][0]
    size = sum(p.nbytes for p in read.parameters())
    assert size < path.stat().st_size < size + 20_000


def spoil(name, value):
    def change(model):
        with torch.no_grad():
            model.get_parameter(name).flatten()[0] = value

    return change


def on_meta(model):
    model.backbone.norm_f.weight = torch.nn.Parameter(model.backbone.norm_f.weight.to("meta"))


def adapted(model):
    inner = model.backbone.layers[0].mixer.in_proj
    model.backbone.layers[0].mixer.in_proj = torch.nn.Sequential(inner)


def parametrized(model):
    torch.nn.utils.parametrizations.weight_norm(model.backbone.layers[0].mixer.out_proj)


def another_shape(model):
    model.backbone.norm_f.weight = torch.nn.Parameter(torch.ones(7))


CHANGES = [
    (spoil("backbone.norm_f.weight", math.nan), "backbone.norm_f.weight holds NaN"),
    (spoil("backbone.embedding.weight", math.inf), "backbone.embedding.weight holds NaN or infinity"),
    (on_meta, "on meta"),
    (adapted, "lacks the tensor backbone.layers.0.mixer.in_proj.weight"),
    (parametrized, "lacks the tensor backbone.layers.0.mixer.out_proj.weight"),
    (another_shape, "norm_f.weight is (7,)"),
    (lambda model: model.register_buffer("extra", torch.ones(1)), "unexpected tensor 'extra'"),
    (lambda model: model.to(torch.complex64), "complex64"),
]


@pytest.mark.parametrize(("change", "says"), CHANGES, ids=[says for _, says in CHANGES])
@pytest.mark.parametrize("format", FORMATS)
def test_what_could_not_be_read_is_not_written(tmp_path, format, change, says):
    model = lively(**CONFIGS["plain"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of complex modules
        change(model)
    assert says in refusal(lambda: model.save_pretrained(tmp_path / "new", format=format))
    assert not (tmp_path / "new").exists()


# Wrappers


class Wrapper(torch.nn.Module):
    """As an accelerator, a trainer or a checkpointing tool would wrap a model, under an attribute of some name."""

    def __init__(self, inner, name):
        super().__init__()
        setattr(self, name, inner)


def compiled(model):
    return torch.compile(model)


def compiled_layer(model):
    model.backbone.layers[1] = torch.compile(model.backbone.layers[1])
    return model


WRAPPED = {
    "torch.compile": compiled,
    "DataParallel": lambda model: torch.nn.DataParallel(model),
    "compiled and parallel": lambda model: torch.nn.DataParallel(torch.compile(model)),
    "a trainer's model": lambda model: Wrapper(model, "model"),
    "a compiled layer": compiled_layer,
    "sharded": lambda model: Wrapper(Wrapper(model, "_fsdp_wrapped_module"), "module"),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("format", FORMATS)
def test_the_names_of_a_wrapped_model_are_read(tmp_path, format, name):
    if format == "hf":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    model = lively(**CONFIGS["untied"])
    expected = logits(model, ids_for(model))
    model.save_pretrained(tmp_path, format=format)
    weights = WRAPPED[name](model).state_dict()
    assert weights.keys() != dict(lively(**CONFIGS["untied"]).state_dict()).keys()
    self = TestFilesThatAreWrong()
    self.write(tmp_path / layouts.WEIGHT_FILES[format][0], {key: tensor.clone() for key, tensor in weights.items()})
    assert logits(Mamba2LM.from_pretrained(tmp_path), ids_for(model)).equal(expected)


def test_names_without_backbone_and_of_another_program_are_read(tmp_path):
    model = lively(**CONFIGS["untied"])
    model.save_pretrained(tmp_path)
    for change in ("", "model.", "embeddings"):
        weights = {name.removeprefix("backbone."): tensor for name, tensor in model.state_dict().items()}
        if change == "embeddings":
            weights["embeddings.weight"] = weights.pop("embedding.weight")
        else:
            weights = {change + name: tensor for name, tensor in weights.items()}
        torch.save(weights, tmp_path / "model.pt")
        assert logits(Mamba2LM.from_pretrained(tmp_path), ids_for(model)).equal(logits(model, ids_for(model)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: {**w, "module.lm_head.weight": w["lm_head.weight"]}, "are two names of one tensor"),
        (lambda w: {**w, "backbone.embeddings.weight": w["backbone.embedding.weight"]}, "two names of one tensor"),
        (lambda w: {"state_dict": w}, "one level down, under 'state_dict'"),
        (lambda w: {"model": w, "step": 3}, "one level down, under 'model'"),
        (
            lambda w: {"base_model.model." + k.replace("in_proj.", "in_proj.base_layer."): t for k, t in w.items()},
            "a part of an adapter; merge the adapter",
        ),
        (
            lambda w: {**w, "backbone.layers.0.mixer.in_proj.lora_A.default.weight": torch.ones(8, 32)},
            "a part of an adapter; merge the adapter",
        ),
    ],
)
def test_names_that_cannot_be_read_are_named(tmp_path, change, says):
    model = lively(**CONFIGS["untied"])
    model.save_pretrained(tmp_path)
    torch.save(change(dict(model.state_dict())), tmp_path / "model.pt")
    assert says in refusal(lambda: Mamba2LM.from_pretrained(tmp_path))


class TestTrainer:
    """What is trained can be saved, or is refused before the first step."""

    @pytest.fixture(autouse=True)
    def _data(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Trainer, "_draw", lambda self: None)
        self.data, self.out = write_documents(tmp_path / "data"), tmp_path / "run"

    def model(self, **values) -> Mamba2LM:
        size = len(load_corpus(self.data, min_count=1).tokenizer)
        return Mamba2LM(Mamba2Config(vocab_size=size, **SHAPE, **values), seed=0)

    def trained(self, model) -> None:
        """Trains, and finds the best loss again in memory, on disk, and after going on."""
        before = {p: p.detach().clone() for p in model.parameters()}
        trainer = make_trainer(self.out, self.data, model=model, max_steps=6, eval_every=3)
        best = trainer.train().best
        assert any(not torch.equal(old, p) for p, old in before.items())  # the caller's own parameters were trained
        corpus = trainer.corpus
        for one in (trainer.model, Mamba2LM.from_pretrained(self.out)):
            score = evaluate(one, corpus.validation, corpus.validation_bytes, corpus.tokenizer.eos_id)
            assert score.loss == pytest.approx(best.loss, rel=1e-6)
        weights = checkpoint.load_tensors(self.out / "last.pt")["model"]
        assert all(not name.startswith(("_orig_mod", "module")) for name in weights)
        again = make_trainer(self.out, self.data, model=trainer.model, max_steps=8, eval_every=3, resume=True)
        assert again.step == 6 and again.train().step == 8

    def refused(self, model, says) -> None:
        text = refusal(lambda: make_trainer(self.out, self.data, model=model, max_steps=6))
        assert says in text and "the model cannot be trained" in text
        assert not self.out.exists()

    @pytest.mark.parametrize("name", ["torch.compile", "DataParallel", "compiled and parallel"])
    def test_a_wrapped_model(self, name):
        self.trained(WRAPPED[name](self.model()))

    def test_a_head_that_was_untied_is_tied_again(self):
        model = self.model()
        model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
        self.trained(model)
        assert model.lm_head.weight is model.backbone.embedding.weight

    def test_a_head_that_is_another_tensor(self):
        model = self.model()
        model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
        with torch.no_grad():
            model.lm_head.weight.add_(0.1)
        self.refused(model, "its config ties the head to the embedding, and they differ")

    @pytest.mark.parametrize("change", [tie_by_hand, make_views])
    def test_weights_that_share_memory(self, change):
        model = self.model(tie_embeddings=False)
        change(model)
        self.trained(model)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (on_meta, "on meta"),
            (adapted, "lacks the tensor"),
            (parametrized, "lacks the tensor"),
            (another_shape, "norm_f.weight is (7,)"),
            (lambda model: torch.nn.Linear(2, 2), "it is a Linear"),
            (lambda model: Wrapper(model, "inner"), "it is a Wrapper"),
        ],
    )
    def test_what_could_not_be_saved_is_not_trained(self, change, says):
        model = self.model()
        self.refused(change(model) or model, says)

    def test_an_adapter_of_peft(self):
        peft = pytest.importorskip("peft", reason="peft is not installed")
        model = self.model()
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["in_proj"], r=2), model)
        self.refused(model, "a part of an adapter; merge the adapter")

    def test_a_transformer(self):
        from mamba2_min.models.transformer import TransformerConfig, TransformerLM

        size = len(load_corpus(self.data, min_count=1).tokenizer)
        model = TransformerLM(TransformerConfig(vocab_size=size, d_model=16, n_layer=1, headdim=8), seed=0)
        make_trainer(self.out, self.data, model=torch.compile(model), max_steps=2).train()
        read = TransformerLM.from_pretrained(self.out)
        ids = torch.tensor([[1, 2, 3]])
        assert read(ids)[0].equal(model.eval()(ids)[0])


# Keys of configs

INFINITE = [
    [0, math.inf],
    [0.0, math.inf],
    [0.0, {"__float__": "Infinity"}],
    ["0", "inf"],
    ["0.0", "Infinity"],
    [0.0, "infinity"],
    [0, None],
    [None, None],
    [-1.0, math.inf],
    [-math.inf, math.inf],
    None,
]
FINITE = [
    [0.0, 0.1],
    [1e-3, math.inf],
    [0.0, 1e30],
    [math.nan, math.inf],
    [0, "none"],
    [0, True],
    [False, math.inf],
    [0],
    [0, 1, math.inf],
    [],
    {},
    "none",
    0,
    True,
    [0, {"__float__": "1.0"}],
    [0, 10**400],
]


FLA = {  # as flash-linear-attention saves it, from version 0.4 on
    **{"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"], "vocab_size": 61, "hidden_size": 32},
    **{"state_size": 16, "num_hidden_layers": 2, "conv_kernel": 4, "expand": 2, "n_groups": 1, "head_dim": 16},
    **{"num_heads": 4, "norm_eps": 1e-5, "use_bias": False, "use_conv_bias": True, "conv_init": None},
    **{"A_init_range": [1, 16], "D_has_hdim": False, "hidden_act": "silu", "initializer_range": 0.02},
    **{"residual_in_fp32": True, "dt_min": 0.001, "dt_max": 0.1, "dt_init_floor": 1e-4, "rmsnorm": True},
    **{"dt_limit": [0.0, math.inf], "rescale_prenorm_residual": True, "use_cache": True, "chunk_size": 256},
    **{"norm_before_gate": False, "fuse_norm": True, "fuse_cross_entropy": True, "use_l2warp": False},
    **{"fuse_linear_cross_entropy": False, "tie_word_embeddings": False, "transformers_version": "4.57.0"},
}


class TestKeys:
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        pytest.importorskip("safetensors", reason="safetensors is not installed")
        self.folder = tmp_path

    def save(self, layout, **values) -> Mamba2LM:
        """Saves a model, and changes its config.json by `values`; those that are `...` are taken out."""
        self.model = lively(**CONFIGS["plain"])
        self.model.save_pretrained(self.folder, format=layout)
        config = json.loads((self.folder / "config.json").read_text())
        config.update(values)
        (self.folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
        return self.model

    def reads_the_same(self, layout, **values) -> None:
        self.save(layout, **values)
        read = Mamba2LM.from_pretrained(self.folder)
        assert logits(read, ids_for(read)).equal(logits(self.model, ids_for(read)))

    def is_refused(self, layout, *named, **values) -> None:
        self.save(layout, **values)
        text = refusal(lambda: Mamba2LM.from_pretrained(self.folder))
        assert all(name in text for name in named), text

    @pytest.mark.parametrize("limit", INFINITE, ids=repr)
    @pytest.mark.parametrize("key", ["time_step_limit", "dt_limit"])
    def test_no_limit(self, key, limit):
        self.reads_the_same("hf", **{key: limit})

    @pytest.mark.parametrize("limit", FINITE, ids=lambda value: repr(value)[:30])
    @pytest.mark.parametrize("key", ["time_step_limit", "dt_limit"])
    def test_a_limit(self, key, limit):
        self.is_refused("hf", "time_step_limit", "does not clamp dt", **{key: limit})

    @pytest.mark.parametrize("limit", INFINITE, ids=repr)
    def test_no_limit_in_the_official_layout(self, limit):
        self.reads_the_same("official")
        config = json.loads((self.folder / "config.json").read_text())
        config["ssm_cfg"]["dt_limit"] = limit
        (self.folder / "config.json").write_text(json.dumps(config))
        assert Mamba2LM.from_pretrained(self.folder).config == self.model.config.from_dict(
            {**self.model.config.to_dict(), "norm_per_group": False}
        )

    @pytest.mark.parametrize("layout", FORMATS)
    @pytest.mark.parametrize(
        "values",
        [
            {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "transformers_version": "4.57.1"},
            {"model_type": "mamba2"},
            {
                "torch_dtype": "bfloat16",
                "dtype": "float16",
                "_name_or_path": "a/b",
                "use_cache": True,
                "eos_token_id": 0,
            },
            {"auto_map": {"AutoConfig": "x.Y"}, "max_position_embeddings": 2048, "unsloth_version": "2025.1"},
            {"_anything_private": 1, "id2label": {"0": "a"}, "nothing_is_said": None},
        ],
    )
    def test_harmless_keys_change_nothing(self, layout, values):
        self.reads_the_same(layout, **values)

    @pytest.mark.parametrize("layout", FORMATS)
    @pytest.mark.parametrize(
        "values",
        [{"logit_scale": 0.5}, {"residual_multiplier": 0.22}, {"final_logit_softcapping": 30.0}, {"odd": False}],
    )
    def test_unknown_keys_are_named(self, layout, values):
        self.is_refused(layout, f"unknown config key {next(iter(values))!r}", **values)

    @pytest.mark.parametrize(
        ("layout", "values"),
        [
            ("hf", {"attn_layer_idx": [1]}),
            ("hf", {"attn": {"layers": [1]}}),
            ("hf", {"d_intermediate": 64}),
            ("hf", {"hidden_act": "relu"}),
            ("hf", {"rmsnorm": False}),
            ("hf", {"D_has_hdim": True}),
            ("hf", {"quantization_config": {"bits": 4}}),
            ("hf", {"is_encoder_decoder": True}),
            ("hf", {"pruned_heads": {"0": [1]}}),
            ("official", {"quantization_config": {"bits": 4}}),
            ("official", {"d_intermediate": 64}),
        ],
    )
    def test_keys_that_ask_for_another_function_are_named(self, layout, values):
        self.is_refused(layout, next(iter(values)), "this model", **values)

    def test_every_key_of_transformers_is_known(self, transformers):
        config = transformers.Mamba2Config(num_heads=4, head_dim=16, hidden_size=32, n_groups=1)
        for values in (config.to_dict(), json.loads(config.to_json_string(use_diff=False))):
            assert layouts.config_from("hf", json.loads(json.dumps(values))).nheads == 4

    def fla(self, change, **values) -> tuple[Mamba2LM, dict]:
        """Our model of a config of flash-linear-attention's, and its weights: written from the format."""
        save_file = pytest.importorskip("safetensors.torch").save_file
        model = lively(vocab_size=61, d_model=32, d_state=16, headdim=16, tie_embeddings=False, **values)
        weights = {k.replace("embedding.", "embeddings."): t.clone() for k, t in model.state_dict().items()}
        save_file(weights, self.folder / "model.safetensors")
        (self.folder / "config.json").write_text(json.dumps({**FLA, **change}))
        return Mamba2LM.from_pretrained(self.folder), dict(model.state_dict())

    @pytest.mark.parametrize(
        ("change", "values"),
        [
            ({}, {}),
            ({"norm_eps": 0.01}, {"norm_eps": 0.01}),
            ({"norm_before_gate": True}, {"norm_before_gate": True}),
            ({"norm_eps": 0.01, "layer_norm_epsilon": 1e-5}, {"norm_eps": 0.01}),
            ({"n_groups": 2}, {"ngroups": 2}),
        ],
    )
    def test_flash_linear_attention(self, change, values):
        model, weights = self.fla(change, **values)
        for name, value in values.items():
            assert getattr(model.config, name) == value
        ids = ids_for(model, 20)
        assert worst(logits(model, ids)[0], reference(model.config, weights, ids[0])) < 2e-5

    def test_flash_linear_attention_of_before(self):
        old = {"dt_min": ..., "dt_max": ..., "dt_init_floor": ..., "dt_limit": ..., "rmsnorm": ...}
        new = {"time_step_min": 1e-3, "time_step_max": 0.2, "time_step_limit": [0.0, math.inf], "rms_norm": True}
        values = {k: v for k, v in {**FLA, **old, **new, "norm_eps": 0.01}.items() if v is not ...}
        config = layouts.config_from("hf", values)
        assert (config.norm_eps, config.dt_max, config.ngroups) == (0.01, 0.2, 1)

    def test_flash_linear_attention_s_defaults(self):
        config = layouts.config_from("hf", {"model_type": "mamba2", "fuse_norm": True})
        assert (config.vocab_size, config.d_model, config.n_layer, config.ngroups) == (32000, 2048, 48, 1)
        config = layouts.config_from("hf", {"model_type": "mamba2"})
        assert (config.vocab_size, config.d_model, config.n_layer, config.ngroups) == (32768, 4096, 64, 8)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"norm_eps": 0.01}, ["layer_norm_epsilon is 1e-05 and norm_eps is 0.01"]),
            ({"dt_limit": [0.0, 0.1]}, ["time_step_limit", "does not clamp"]),
            ({"dt_max": 0.5}, ["time_step_max is 0.1 and dt_max is 0.5"]),
        ],
    )
    def test_two_names_of_one_setting(self, change, named):
        self.is_refused("hf", *named, **change)
        if "norm_eps" in change:
            self.save("hf", layer_norm_epsilon=..., **change)
            assert Mamba2LM.from_pretrained(self.folder).config.norm_eps == 0.01

    def test_the_gate_of_old_configs_of_transformers(self):
        self.reads_the_same("hf", norm_before_gate=True, rms_norm=True)

    @pytest.mark.parametrize("values", [{"norm_before_gate": True}, {"norm_eps": 0.01}, {"hidden_size": 64}])
    def test_another_programs_key_in_an_official_config(self, values):
        self.is_refused("official", f"unknown config key {next(iter(values))!r}", **values)

    def test_a_config_without_a_model_type(self):
        self.is_refused("hf", "model_type is None", model_type=...)
