"""LoRA: the equation, its gradients, its files, and the same numbers as peft on transformers' Mamba-2."""

import copy

import pytest
import torch
from instruments import relative_error
from torch import nn

from mamba2_min.checkpoints.safetensors import load_safetensors, save_safetensors
from mamba2_min.config import Mamba2Config
from mamba2_min.errors import UserError
from mamba2_min.files import load_json, save_json
from mamba2_min.finetune.adapter import CONFIG, WEIGHTS, base_digest, load_adapter, save_adapter
from mamba2_min.finetune.initial_state import TunedStateLM
from mamba2_min.finetune.lora import LoRAConfig, LoRALinear, adapters, add_lora, merge_lora, trainable
from mamba2_min.finetune.token_rows import put_rows, rows_of, train_rows
from mamba2_min.models.base import decay_groups
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.models.transformer import TransformerConfig, TransformerLM

V = 61
IDS = torch.randint(V, (2, 19), generator=torch.Generator().manual_seed(0))


def build(dtype=torch.float64, **changes):
    sizes = {"d_model": 16, "n_layer": 2, "d_state": 6, "headdim": 8, "chunk_size": 8, "vocab_size": V}
    return Mamba2LM(Mamba2Config(**{**sizes, **changes}), seed=0).to(dtype)


def stirred(model):
    """The same model with adapters that are not zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, module in adapters(model):
            noise = torch.randn(module.lora_B.weight.shape, generator=generator)
            module.lora_B.weight.copy_(0.3 * noise.to(module.lora_B.weight.dtype))
    return model


def with_lora(model, **changes):
    add_lora(model, LoRAConfig(**{"r": 3, "alpha": 5.0, "dropout": 0.0, **changes}), seed=1)
    return model


def test_the_equation():
    linear = nn.Linear(7, 5).double()
    adapted = LoRALinear(linear, LoRAConfig(r=2, alpha=6.0, dropout=0.0))
    nn.init.normal_(adapted.lora_B.weight)
    x = torch.randn(3, 7, dtype=torch.float64)
    A, B = adapted.lora_A.weight, adapted.lora_B.weight
    wanted = x @ linear.weight.T + linear.bias + 3.0 * (x @ A.T) @ B.T
    assert relative_error(adapted(x), wanted) < 1e-12
    assert relative_error(adapted.delta(), 3.0 * B @ A) < 1e-12


def test_a_new_adapter_changes_nothing_and_shares_the_weights():
    model = build()
    expected, _ = model(IDS)
    weight = model.backbone.layers[0].mixer.in_proj.weight
    names = add_lora(model, LoRAConfig(r=3), seed=1)
    assert torch.equal(model(IDS)[0], expected)
    assert model.backbone.layers[0].mixer.in_proj.weight is weight
    assert names == [f"backbone.layers.{i}.mixer.{p}" for i in range(2) for p in ("in_proj", "out_proj")]


@pytest.mark.parametrize("recompute", [False, True])
def test_only_adapters_are_trained_and_each_has_a_gradient_from_the_second_step_on(recompute):
    model = with_lora(build()).train()
    model.recompute = recompute
    before = {name: p.clone() for name, p in model.named_parameters()}
    c = model.config
    assert trainable(model)[0] == 2 * 3 * (c.d_model + c.d_in_proj + c.d_inner + c.d_model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step in range(2):
        optimizer.zero_grad()
        model.loss(IDS[:, :-1], IDS[:, 1:]).backward()
        for name, module in adapters(model):
            assert module.lora_B.weight.grad.abs().max() > 0, name
            assert (module.lora_A.weight.grad.abs().max() > 0) == (step > 0), name
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".lora_" in name}


def test_its_gradients_are_those_of_the_merged_weight():
    """d/dA = s B^T dW and d/dB = s dW A^T, dW being the gradient of the weight itself."""
    model = stirred(with_lora(build()))
    merged = merge_lora(copy.deepcopy(model)).requires_grad_(True)
    model.loss(IDS[:, :-1], IDS[:, 1:]).backward()
    merged.loss(IDS[:, :-1], IDS[:, 1:]).backward()
    for name, module in adapters(model):
        dW = merged.get_submodule(name).weight.grad
        A, B = module.lora_A.weight, module.lora_B.weight
        assert relative_error(A.grad, module.scale * B.T @ dW) < 1e-9
        assert relative_error(B.grad, module.scale * dW @ A.T) < 1e-9


@pytest.mark.parametrize("changes", [{}, {"ngroups": 2}, {"proj_bias": True}, {"tie_embeddings": False}])
def test_merging_changes_no_logits(changes):
    model = stirred(with_lora(build(**changes)))
    expected, _ = model(IDS)
    names = [name for name, _ in model.named_parameters() if ".lora_" not in name]
    merge_lora(model)
    assert relative_error(model(IDS)[0], expected) < 1e-12
    assert not list(adapters(model)) and [name for name, _ in model.named_parameters()] == names


def test_steps_read_the_adapter():
    model = stirred(with_lora(build())).eval()
    with torch.no_grad():
        expected, _ = model(IDS)
        state = model.initial_state(2)
        logits = torch.stack([model.step(IDS[:, t], state)[0] for t in range(IDS.shape[1])], 1)
    assert relative_error(logits, expected) < 1e-10


def test_dropout_acts_on_the_adapter_alone():
    model = stirred(with_lora(build(), dropout=0.5))
    exact, again = model.eval()(IDS)[0], model(IDS)[0]
    assert torch.equal(exact, again)
    model.train()
    assert not torch.equal(model(IDS)[0], exact)
    merge_lora(model)
    assert relative_error(model(IDS)[0], exact) < 1e-12  # nothing else drops


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("in_proj", "q_proj"), "no projection is called 'q_proj'; the model has in_proj, lm_head, out_proj"),
        (("lm_head",), "tied to the embedding"),
        ((), "at least one projection"),
        (("proj",), "no projection is called 'proj'"),
    ],
)
def test_targets_that_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        with_lora(build(), targets=targets)


def test_other_targets():
    model = with_lora(build(tie_embeddings=False), targets=("lm_head", "backbone.layers.1.mixer.in_proj"))
    assert [name for name, _ in adapters(model)] == ["backbone.layers.1.mixer.in_proj", "lm_head"]
    transformer = TransformerLM(TransformerConfig(V, d_model=64, n_layer=1), seed=0)
    with pytest.raises(ValueError, match="no projection is called 'in_proj'"):
        with_lora(transformer)


@pytest.mark.parametrize(
    "values", [{"r": 0}, {"r": 2.5}, {"r": True}, {"alpha": 0}, {"alpha": float("nan")}, {"dropout": 1}]
)
def test_bad_values(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        LoRAConfig(**values)


def test_a_second_adapter_is_refused():
    with pytest.raises(ValueError, match="has adapters already"):
        with_lora(with_lora(build()))


class TestFiles:
    def test_a_round_trip(self, tmp_path):
        base = build(torch.float32)
        digest = base_digest(base)
        model = stirred(with_lora(copy.deepcopy(base)))
        save_adapter(tmp_path, model, "runs/base", LoRAConfig(r=3, alpha=5.0), digest)
        assert base_digest(model) == digest
        again = load_adapter(tmp_path, copy.deepcopy(base))
        assert torch.equal(again(IDS)[0], model(IDS)[0])
        assert not any(p.requires_grad for p in again.parameters())

    def test_another_base_is_refused(self, tmp_path):
        model = stirred(with_lora(build(torch.float32)))
        save_adapter(tmp_path, model, "runs/base", LoRAConfig(r=3, alpha=5.0), base_digest(model))
        other = build(torch.float32, a_init="uniform")
        with pytest.raises(UserError, match="adapter of another base model: of runs/base"):
            load_adapter(tmp_path, other)

    def broken(self, tmp_path, change):
        model = stirred(with_lora(build(torch.float32)))
        save_adapter(tmp_path, model, "runs/base", LoRAConfig(r=3, alpha=5.0), base_digest(model))
        tensors, metadata = load_safetensors(tmp_path / WEIGHTS)
        config = load_json(tmp_path / CONFIG)
        change(config, tensors)
        save_json(tmp_path / CONFIG, config)
        save_safetensors(tmp_path / WEIGHTS, tensors, metadata)
        with pytest.raises(UserError) as caught:
            load_adapter(tmp_path, build(torch.float32))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    @pytest.mark.parametrize("key", ["use_dora", "bias", "modules_to_save", "rank_pattern"])
    def test_what_would_change_the_numbers_is_refused(self, tmp_path, key):
        assert key in self.broken(tmp_path, lambda config, tensors: config.update({key: "all"}))

    @pytest.mark.parametrize(
        "change",
        [
            lambda c, t: t.popitem(),
            lambda c, t: t.update(extra=torch.zeros(1)),
            lambda c, t: t.update({next(iter(t)): torch.zeros(2, 2)}),
            lambda c, t: t.update({next(iter(t)): next(iter(t.values())) * float("nan")}),
            lambda c, t: c.update(r="3"),
            lambda c, t: c.update(r=10**9),
            lambda c, t: c.update(target_modules="all-linear"),
            lambda c, t: c.update(target_modules=["conv1d"]),
            lambda c, t: c.update(target_modules=[3]),
            lambda c, t: c.update(peft_type="IA3"),
            lambda c, t: c.update(lora_alpha=None),
            lambda c, t: c.update(lora_alpha=10**400),
            lambda c, t: c.update(r=10**400, use_rslora=True),
        ],
    )
    def test_damage_is_one_line(self, tmp_path, change):
        assert self.broken(tmp_path, change)

    def test_no_adapter_there(self, tmp_path):
        with pytest.raises(UserError, match="no adapter was saved there"):
            load_adapter(tmp_path, build(torch.float32))


class TestTokenRows:
    """Rows of the table of words that learn beside the adapters."""

    tokens = (0, 3, 41)

    def build(self, dtype=torch.float64):
        model = with_lora(build(dtype))
        train_rows(model, reversed(self.tokens))
        return model

    def test_these_rows_and_the_adapters_learn_and_nothing_else_moves(self):
        model = self.build()
        before = {name: p.clone() for name, p in model.named_parameters()}
        assert trainable(model)[0] == trainable(with_lora(build()))[0] + 3 * 16
        optimizer = torch.optim.AdamW(decay_groups(model, 0.5), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model.loss(IDS[:, :-1], IDS[:, 1:]).backward()
            optimizer.step()
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        table = "backbone.embedding.weight"
        assert changed == {name for name in before if ".lora_" in name} | {table}
        moved = (model.backbone.embedding.weight != before[table]).any(1).nonzero().flatten().tolist()
        assert tuple(moved) == self.tokens
        assert model.lm_head.weight is model.backbone.embedding.weight

    def test_its_gradient_is_that_of_the_whole_table_in_these_rows(self):
        model, free = self.build(), with_lora(build())
        free.backbone.embedding.weight.requires_grad_(True)
        for one in (model, free):
            one.loss(IDS[:, :-1], IDS[:, 1:]).backward()
        ours, wanted = (one.backbone.embedding.weight.grad for one in (model, free))
        rows = list(self.tokens)
        assert torch.equal(ours[rows], wanted[rows]) and ours.count_nonzero() == ours[rows].count_nonzero()

    def test_a_round_trip_and_merging(self, tmp_path):
        model = stirred(self.build(torch.float32))
        digest = base_digest(build(torch.float32))
        put_rows(model, rows_of(model) + 0.3)
        save_adapter(tmp_path, model, "runs/base", LoRAConfig(r=3, alpha=5.0), digest)
        again = load_adapter(tmp_path, build(torch.float32))
        assert torch.equal(again(IDS)[0], model(IDS)[0]) and rows_of(again).shape == (3, 16)
        expected, _ = again(IDS)
        assert relative_error(merge_lora(again)(IDS)[0], expected) < 1e-5

    @pytest.mark.parametrize(
        ("tokens", "message"), [((), "no token was named"), ((5, V + 20), "the table has"), ((-1,), "the table has")]
    )
    def test_tokens_that_are_refused(self, tokens, message):
        with pytest.raises(ValueError, match=message):
            train_rows(build(), tokens)

    def test_a_head_of_its_own_is_refused(self):
        with pytest.raises(ValueError, match="this head is its own"):
            train_rows(build(tie_embeddings=False), [1])

    @pytest.mark.parametrize(
        "value", [[3, 1], [1, 1], [1.0], [True], [V + 100], "all", {"embeddings": [1], "lm_head": [1]}, {"head": [1]}]
    )
    def test_damage_is_one_line(self, tmp_path, value):
        save_adapter(tmp_path, self.build(torch.float32), "b", LoRAConfig(r=3), base_digest(build(torch.float32)))
        save_json(tmp_path / CONFIG, load_json(tmp_path / CONFIG) | {"trainable_token_indices": value})
        with pytest.raises(UserError) as caught:
            load_adapter(tmp_path, build(torch.float32))
        assert "\n" not in str(caught.value)


class TestInitialState:
    def test_it_is_what_the_texts_begin_with(self):
        model = TunedStateLM.of(build())
        expected, _ = build()(IDS)
        assert relative_error(model(IDS)[0], expected) < 1e-12  # zeros at first
        with torch.no_grad():
            for state in model.first_state:
                state.normal_()
        state = build().initial_state(2)
        state.ssm[:] = [first.detach().expand(2, -1, -1, -1).clone() for first in model.first_state]
        expected, _ = build()(IDS, state)
        assert relative_error(model(IDS)[0], expected) < 1e-12
        with torch.no_grad():
            state = model.initial_state(2)
            logits = torch.stack([model.step(IDS[:, t], state)[0] for t in range(IDS.shape[1])], 1)
        assert relative_error(logits, expected) < 1e-10

    def test_it_alone_is_trained_and_its_gradient_is_right(self):
        model = TunedStateLM.of(build())
        model.loss(IDS[:, :-1], IDS[:, 1:]).backward()
        assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("first_state"))
        first, way = model.first_state[0], torch.zeros_like(model.first_state[0])
        way[1, 2, 3] = 1e-5
        with torch.no_grad():
            first += way
            up = model.loss(IDS[:, :-1], IDS[:, 1:])
            first -= 2 * way
            down = model.loss(IDS[:, :-1], IDS[:, 1:])
        assert abs((up - down) / 2e-5 - first.grad[1, 2, 3]) < 1e-8

    def test_a_round_trip(self, tmp_path):
        model = TunedStateLM.of(build(torch.float32))
        with torch.no_grad():
            for state in model.first_state:
                state.normal_()
        save_adapter(tmp_path, model, "runs/base", None, base_digest(model))
        again = load_adapter(tmp_path, build(torch.float32))
        assert torch.equal(again(IDS)[0], model(IDS)[0])


class TestPeft:
    """An in_proj adapter of ours loads in peft on transformers' Mamba-2 with equal logits, and one of peft here."""

    @pytest.fixture
    def base(self, tmp_path):
        pytest.importorskip("peft", reason="the extra [dev] is not installed")
        transformers = pytest.importorskip("transformers")
        model = build(torch.float32, chunk_size=16)
        model.save_pretrained(tmp_path / "base", format="hf")
        return model, transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "base").eval()

    @pytest.mark.parametrize("tokens", [(), (0, 3, 41)])
    def test_ours_there(self, tmp_path, base, tokens):
        from peft import PeftModel

        model, theirs = base
        digest = base_digest(model)
        lora = LoRAConfig(r=3, alpha=5.0, dropout=0.0, targets=("in_proj",))
        add_lora(model, lora)
        if tokens:
            train_rows(model, tokens)
            put_rows(model, rows_of(model) + 0.3)
        save_adapter(tmp_path / "adapter", stirred(model), tmp_path / "base", lora, digest)
        wrapped = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
        with torch.no_grad():
            ours, plain = model(IDS)[0], wrapped(IDS).logits[..., :V]
        assert relative_error(plain, ours) < 1e-5

    @pytest.mark.parametrize(("rslora", "tokens"), [(False, None), (True, None), (False, [0, 3, 41])])
    def test_theirs_here(self, tmp_path, base, rslora, tokens):
        from peft import LoraConfig, get_peft_model

        model, theirs = base
        config = LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["in_proj"],
            use_rslora=rslora,
            init_lora_weights=False,
            trainable_token_indices=tokens and {"embeddings": tokens},
        )
        wrapped = get_peft_model(theirs, config).eval()
        for name, p in wrapped.named_parameters():
            if "trainable_tokens_delta" in name:
                p.data += 0.3
        wrapped.save_pretrained(tmp_path / "adapter")
        with torch.no_grad():
            wanted = wrapped(IDS).logits[..., :V]
            assert relative_error(load_adapter(tmp_path / "adapter", model)(IDS)[0], wanted) < 1e-5
