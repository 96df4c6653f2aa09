"""The Transformer that Mamba-2 is compared with: its attention against a plain one, its cache, its size."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from mamba2_min.config import Mamba2Config
from mamba2_min.data.corpus import load_corpus
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError
from mamba2_min.inference.completer import Completer
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.models.transformer import KVCache, TransformerConfig, TransformerLM, rotary_angles, rotate
from mamba2_min.ops.sampling import Sampler
from mamba2_min.settings import Settings
from mamba2_min.training.trainer import Trainer

CONFIG = TransformerConfig(vocab_size=31, d_model=24, n_layer=2, headdim=8, d_ff=20)


def make_model(config: TransformerConfig = CONFIG, seed: int = 0) -> TransformerLM:
    """A float64 model whose norms are not the identity, so that a norm in the wrong place shows."""
    model = TransformerLM(config, seed).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5, generator=generator)
    return model


def make_ids(b: int, l: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(31, (b, l), generator=torch.Generator().manual_seed(seed))


def plain_logits(model: TransformerLM, ids: torch.Tensor) -> torch.Tensor:
    """The model written out for one sequence (l,), token by token and head by head, without any shortcut."""
    c, backbone = model.config, model.backbone

    def norm(x, module):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * module.weight

    def turn(x, position):  # complex numbers: channel i is the real part, i + headdim / 2 the imaginary one
        half = c.headdim // 2
        speeds = torch.tensor([c.rope_base ** (-2 * i / c.headdim) for i in range(half)], dtype=torch.float64)
        turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(speeds), position * speeds)
        return torch.cat([turned.real, turned.imag])

    x = backbone.embedding.weight[ids]
    for layer in backbone.layers:
        qkv = norm(x, layer.norm) @ layer.mixer.qkv_proj.weight.T
        out = torch.zeros_like(x)
        for h in range(c.n_head):
            q, k, v = (qkv[:, s * c.d_model + h * c.headdim :][:, : c.headdim] for s in range(3))
            q, k = (torch.stack([turn(row, t) for t, row in enumerate(rows)]) for rows in (q, k))
            for t in range(len(ids)):
                weights = (k[: t + 1] @ q[t] / math.sqrt(c.headdim)).softmax(0)
                out[t, h * c.headdim : (h + 1) * c.headdim] = weights @ v[: t + 1]
        x = x + out @ layer.mixer.out_proj.weight.T
        gate, up = (norm(x, layer.norm2) @ layer.mlp.gate_up_proj.weight.T).split(c.d_ff, dim=-1)
        x = x + (gate * torch.sigmoid(gate) * up) @ layer.mlp.out_proj.weight.T
    return norm(x, backbone.norm_f) @ model.lm_head.weight.T


@pytest.mark.parametrize("l", [1, 2, 13])
def test_equals_attention_written_out(l):
    model, ids = make_model(), make_ids(2, l)
    with torch.no_grad():
        logits, _ = model(ids)
        for row in range(2):
            torch.testing.assert_close(logits[row], plain_logits(model, ids[row]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cuts", [[1], [5], [12], [1, 1, 1, 4, 6], [3, 10]])
def test_cache_continues_as_if_never_cut(cuts):
    model, ids = make_model(), make_ids(2, 13)
    cuts = [*cuts, 13 - sum(cuts)]
    with torch.no_grad():
        whole, _ = model(ids)
        state, parts = None, []
        for part in ids.split([c for c in cuts if c], dim=1):
            logits, state = model(part, state)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-10, atol=1e-10)
    assert state.length == 13


def test_steps_equal_the_whole_also_where_the_cache_grows(monkeypatch):
    monkeypatch.setattr("mamba2_min.models.transformer._BLOCK", 2)
    model, ids = make_model(), make_ids(3, 17)
    with torch.no_grad():
        whole, _ = model(ids)
        state = model.initial_state(3)
        for t in range(17):
            logits, state = model.step(ids[:, t], state)
            torch.testing.assert_close(logits, whole[:, t], rtol=1e-10, atol=1e-10)


def test_steps_and_slices_can_take_turns():
    model, ids = make_model(), make_ids(1, 12)
    with torch.no_grad():
        whole, _ = model(ids)
        _, state = model.prefill(ids[:, :4])
        _, state = model.step(ids[:, 4], state)
        logits, state = model(ids[:, 5:11], state)
        torch.testing.assert_close(logits, whole[:, 5:11], rtol=1e-10, atol=1e-10)
        logits, state = model.step(ids[:, 11], state)
    torch.testing.assert_close(logits, whole[:, 11], rtol=1e-10, atol=1e-10)


def test_a_state_can_be_continued_twice():
    model, ids = make_model(), make_ids(2, 9)
    with torch.no_grad():
        _, state = model(ids[:, :5])
        kept = state.clone()
        first, _ = model(ids[:, 5:], state)
        model(make_ids(2, 4, seed=1), state)
        for t in range(4):
            model.step(ids[:, t], state)
        again, _ = model(ids[:, 5:], kept)
    assert torch.equal(first, again)


def test_prefill_in_slices_gives_the_last_logits(monkeypatch):
    monkeypatch.setattr("mamba2_min.models.base._PREFILL_SLICE", 3)
    model, ids = make_model(), make_ids(2, 11)
    with torch.no_grad():
        whole, _ = model(ids)
        logits, state = model.prefill(ids)
    torch.testing.assert_close(logits, whole[:, -1], rtol=1e-10, atol=1e-10)
    assert state.length == 11


def test_no_token_sees_a_later_one():
    model, ids = make_model(), make_ids(1, 10)
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 31
    with torch.no_grad():
        before, after = model(ids)[0], model(changed)[0]
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_packed_documents_do_not_see_each_other():
    model, ids = make_model(), make_ids(2, 12)
    # The rows' documents begin at different places, and a number that comes back is a new document.
    seq_idx = torch.tensor([[0] * 3 + [1] * 4 + [0] * 5, [7] * 8 + [8] * 4])
    with torch.no_grad():
        packed, state = model(ids, seq_idx=seq_idx)
        for row, bounds in enumerate([(0, 3, 7, 12), (0, 8, 12)]):
            for start, end in itertools.pairwise(bounds):
                alone, _ = model(ids[row : row + 1, start:end])
                torch.testing.assert_close(packed[row : row + 1, start:end], alone, rtol=1e-10, atol=1e-10)
        following = make_ids(2, 5, seed=3)
        logits, stepped = model(following[:, :2], state)
        expected = [model(torch.cat([ids[r : r + 1, s:], following[r : r + 1]], 1))[0] for r, s in ((0, 7), (1, 8))]
        for row in range(2):
            torch.testing.assert_close(logits[row], expected[row][0, -5:-3], rtol=1e-10, atol=1e-10)
        for t in (2, 3, 4):
            logits, stepped = model.step(following[:, t], stepped)
            for row in range(2):
                torch.testing.assert_close(logits[row], expected[row][0, t - 5], rtol=1e-10, atol=1e-10)


def test_state_belongs_to_the_first_document():
    model, ids = make_model(), make_ids(1, 10)
    seq_idx = torch.tensor([[4] * 3 + [5] * 3])
    with torch.no_grad():
        _, state = model(ids[:, :4])
        logits, _ = model(ids[:, 4:], state, seq_idx)
        goes_on, _ = model(ids[:, :7])
        new, _ = model(ids[:, 7:])
    torch.testing.assert_close(logits, torch.cat([goes_on[:, 4:], new], dim=1), rtol=1e-10, atol=1e-10)


def test_documents_get_no_gradient_from_each_other():
    model, ids = make_model(), make_ids(1, 8)
    embedded = []
    model.backbone.embedding.register_forward_hook(lambda module, args, out: embedded.append(out) or out.retain_grad())
    logits, _ = model(ids, seq_idx=torch.tensor([[0] * 5 + [1] * 3]))
    logits[:, 5:].square().sum().backward()
    assert torch.equal(embedded[0].grad[:, :5], torch.zeros(1, 5, 24, dtype=torch.float64))
    assert (embedded[0].grad[:, 5:] != 0).all()


def test_rotary_positions_are_relative():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 16, generator=generator, dtype=torch.float64)

    def score(i: int, j: int) -> float:
        cos, sin = rotary_angles(torch.tensor([i, j], dtype=torch.float64), 16, 10_000.0)
        return float(rotate(q, cos[0, 0, 0], sin[0, 0, 0]) @ rotate(k, cos[1, 0, 0], sin[1, 0, 0]))

    for shift in (1, 100, 100_000):
        assert score(7 + shift, 3 + shift) == pytest.approx(score(7, 3), rel=1e-9)
    assert score(8, 3) != pytest.approx(score(7, 3), rel=1e-3)


def test_loss_is_the_cross_entropy_of_the_logits():
    model, ids = make_model(), make_ids(2, 9)
    targets = make_ids(2, 9, seed=1)
    targets[0, :4] = -100
    expected = F.cross_entropy(model(ids)[0].flatten(0, 1), targets.flatten())
    loss = model.loss(ids, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for got, wanted in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-9)


def test_starts_as_uncertain_as_chance():
    model = TransformerLM(TransformerConfig(vocab_size=499, d_model=64), seed=0)
    ids = torch.randint(499, (2, 50))
    assert model.loss(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(math.log(499), rel=0.05)


def test_seed_draws_the_parameters():
    a, b, c = (TransformerLM(CONFIG, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["backbone.embedding.weight"], c["backbone.embedding.weight"])


@pytest.mark.parametrize(
    ("mamba", "tolerance"),
    [
        (Mamba2Config(vocab_size=13_148), 0.003),
        (Mamba2Config(vocab_size=50_288, d_model=768, n_layer=24, d_state=128), 0.002),
        (Mamba2Config(vocab_size=8192, d_model=128, n_layer=3), 0.01),
        (Mamba2Config(vocab_size=64, d_model=64, n_layer=2, tie_embeddings=False), 0.02),
    ],
)
@pytest.mark.parametrize("same_depth", [False, True])
def test_matching_has_the_mamba2s_parameters(mamba, tolerance, same_depth):
    config = TransformerConfig.matching(mamba, mamba.n_layer if same_depth else None)
    assert config.num_parameters() == pytest.approx(mamba.num_parameters(), rel=tolerance)
    assert config.d_model == mamba.d_model
    assert config.n_layer == (mamba.n_layer if same_depth else (mamba.n_layer + 1) // 2)


def test_parameters_are_counted_without_building():
    for config in (CONFIG, TransformerConfig(31, 16, 1, 4, 8, tie_embeddings=False, pad_vocab_size_multiple=16)):
        assert sum(p.numel() for p in TransformerLM(config).parameters()) == config.num_parameters()


def test_matching_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="odd"):
        TransformerConfig.matching(Mamba2Config(vocab_size=10, d_model=33, headdim=11))
    with pytest.raises(ValueError, match="attention alone"):
        TransformerConfig.matching(Mamba2Config(vocab_size=10, d_model=64, n_layer=2), n_layer=9)


@pytest.mark.parametrize("bad", [{"headdim": 7}, {"headdim": 3}, {"d_ff": 0}, {"n_layer": True}, {"dropout": 1.0}])
def test_bad_values_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TransformerConfig(**{"vocab_size": 31, "d_model": 24, "headdim": 8, **bad})


def test_padded_vocabulary_is_never_produced():
    model = TransformerLM(TransformerConfig(31, 16, 1, 8, 8, pad_vocab_size_multiple=16), seed=0)
    assert model(make_ids(1, 3))[0].shape == (1, 3, 31)
    assert model.prefill(make_ids(1, 3))[0].shape == (1, 31)
    with pytest.raises(ValueError, match="vocabulary"):
        model(torch.tensor([[31]]))


def test_generation_is_the_likeliest_token_again_and_again():
    model = make_model()
    ids = [3, 1, 4]
    generated = list(model.generate(ids, 6, temperature=0))
    for token in generated:
        with torch.no_grad():
            assert token == int(model(torch.tensor([ids]))[0][0, -1].argmax())
        ids.append(token)


def test_cache_holds_every_token_and_little_more():
    model = make_model()
    _, state = model.prefill(make_ids(1, 1000))
    a_token = 2 * CONFIG.n_layer * CONFIG.d_model * 8
    assert state.nbytes == 1000 * a_token
    model.step(torch.tensor([1]), state)
    assert 1001 * a_token <= state.nbytes <= 1500 * a_token


def test_cache_can_leave_its_history_behind():
    model = make_model()
    _, state = model(make_ids(1, 4), seq_idx=torch.tensor([[0, 0, 1, 1]]))
    assert state.keys[0].requires_grad
    detached = state.detach()
    assert not detached.keys[0].requires_grad and not detached.values[1].requires_grad
    assert detached.length == 4 and torch.equal(detached.begin, torch.tensor([2]))


def test_gradients_flow_through_the_cache():
    model, ids = make_model(), make_ids(1, 8)
    weights = list(model.parameters())
    whole = torch.autograd.grad(model(ids)[0][:, 4:].square().sum(), weights)
    _, state = model(ids[:, :4])
    parts = torch.autograd.grad(model(ids[:, 4:], state)[0].square().sum(), weights)
    for got, wanted in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_autocast_stays_near_float32():
    model, ids = TransformerLM(CONFIG, seed=0).eval(), make_ids(2, 12)
    with torch.no_grad():
        exact, _ = model(ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, state = model(ids[:, :8])
            near, _ = model(ids[:, 8:], state)
    assert (near.float() - exact[:, 8:]).abs().max() < 0.02 * exact.abs().max()


def test_saved_and_loaded_is_the_same(tmp_path):
    model, ids = TransformerLM(CONFIG, seed=0), make_ids(1, 5)
    model.save_pretrained(tmp_path)
    loaded = TransformerLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids)[0], model.eval()(ids)[0])


def test_a_mamba2_and_a_transformer_are_not_taken_for_each_other(tmp_path):
    TransformerLM(CONFIG).save_pretrained(tmp_path / "transformer")
    Mamba2LM(Mamba2Config(vocab_size=31, d_model=16, headdim=8)).save_pretrained(tmp_path / "mamba")
    with pytest.raises(UserError, match="architecture"):
        Mamba2LM.from_pretrained(tmp_path / "transformer")
    with pytest.raises(UserError, match="not the config of a Transformer"):
        TransformerLM.from_pretrained(tmp_path / "mamba")


@pytest.mark.parametrize("name", ["forward", "hidden", "loss", "initial_state", "step", "prefill", "generate"])
def test_is_called_as_a_mamba2_is(name):
    """Whatever drives a Mamba2LM can drive this."""
    ours, mambas = (inspect.signature(getattr(model, name)).parameters for model in (TransformerLM, Mamba2LM))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in mambas.values()]


def test_state_is_used_as_a_mamba2s_is():
    mambas = Mamba2LM(Mamba2Config(vocab_size=31, d_model=16, headdim=8, n_layer=1)).initial_state()
    for name in ("nbytes", "clone", "detach"):
        assert hasattr(mambas, name) and hasattr(KVCache([], []), name)


def test_the_trainer_trains_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)
    (tmp_path / "data").mkdir()
    for k in range(6):
        (tmp_path / "data" / f"{k}.md").write_text(f"Owl {k} sat in a tree and looked at the moon. " * 4)
    corpus = load_corpus(tmp_path / "data")
    model = TransformerLM(TransformerConfig(len(corpus.tokenizer), 16, 1, 8, 16), seed=0)
    settings = Settings(context=16, batch_size=4, max_steps=20, eval_every=10)
    result = Trainer(model, corpus, settings, tmp_path / "run").train()
    assert result.step == 20 and math.isfinite(result.best.loss)
    assert torch.equal(TransformerLM.from_pretrained(tmp_path / "run").lm_head.weight, model.lm_head.weight)


def test_the_completer_completes_with_it():
    tokenizer = WordTokenizer.train(["the owl sat in a tree"])
    completer = Completer(TransformerLM(TransformerConfig(len(tokenizer), 16, 1, 8, 16), seed=0), tokenizer)
    whole = "".join(completer.complete("the owl", 8, Sampler(seed=0)))
    parts = "".join(completer.complete("the owl", 3, Sampler(seed=0))) + "".join(completer.continue_(5))
    assert parts == whole and completer.stats.tokens == 8
