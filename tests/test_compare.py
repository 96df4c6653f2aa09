"""Comparing runs: each figure against one that is computed by hand, and the axes of the charts."""

import json
import math
import sys

import pytest
import torch

from mamba2_min import Mamba2Config, Mamba2LM, TransformerConfig, TransformerLM, WordTokenizer
from mamba2_min.data.documents import Document
from mamba2_min.errors import run_script
from mamba2_min.evaluation import compare, compare_plots, repetition
from mamba2_min.evaluation.axes import AXES, Axis, axes_for, noise

WORDS = "owl fox hen cat dog cow bee ant sea sun oak elm ink pot jar box hat cup bed map key tin fog ice rye wax"
NAMED = WORDS.split()
TEXTS = [" ".join(f"the {NAMED[k * i % 26]} saw the {NAMED[(i + k) % 26]} ." for i in range(12)) for k in range(30)]
DOCUMENTS = [Document(text, f"x#{k}") for k, text in enumerate(TEXTS[:3])]


@pytest.fixture(scope="module")
def tokenizer():
    return WordTokenizer.train([" " + text for text in TEXTS], min_count=1)


@pytest.fixture(scope="module")
def model(tokenizer):
    return Mamba2LM(Mamba2Config(len(tokenizer), d_model=16, n_layer=1, d_state=4, headdim=8), seed=0).eval()


@torch.no_grad()
def test_bits_per_byte_are_those_of_one_pass_per_document(model, tokenizer):
    found = compare.bits_per_byte(model, tokenizer, DOCUMENTS)
    nats, n_bytes, stream = 0.0, 0, [tokenizer.eos_id]
    for d in DOCUMENTS:
        ids = torch.tensor([tokenizer.eos_id, *tokenizer.encode(d.text), tokenizer.eos_id])
        logs = model(ids[None, :-1])[0][0].log_softmax(-1)
        nats -= float(logs.gather(1, ids[1:, None]).sum())
        n_bytes += len(d.text.encode()) + 1
        stream += ids[1:].tolist()
    assert found["reset"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-4)
    whole = torch.tensor(stream)
    logs = model(whole[None, :-1])[0][0].log_softmax(-1)
    carried = -float(logs.gather(1, whole[1:, None]).sum()) / math.log(2) / n_bytes
    assert found["carried"] == pytest.approx(carried, rel=1e-4)
    assert found["carried"] != pytest.approx(found["reset"], rel=1e-6)


def test_byte_entropy():
    assert compare.byte_entropy([Document("abababab", "x#1")]) == pytest.approx(1)
    assert compare.byte_entropy([Document("aabc", "x#1")]) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("a b c b c b d", 5),
        ("a b c d", 0),
        ("a a a a", 4),
        ("x a b c d a b c d a b y", 10),
        ("no no", 2),
        ("", 0),
        ("a b a c a d", 0),
    ],
)
def test_the_longest_loop(text, loop):
    assert repetition.longest_loop(text.split()) == loop


def test_distinct_phrases():
    assert repetition.distinct(["a", "b", "c", "a", "b", "c"], 3) == 3 / 4
    assert repetition.distinct(["a", "b"], 3) == 1.0


class Ends:
    """A model that writes three words and ends."""

    def __init__(self, tokenizer):
        self.words, self.seeds = tokenizer, []

    def generate(self, ids, max_tokens, temperature, seed, stop_ids):
        assert ids[0] == self.words.eos_id == stop_ids[0]
        if temperature == 0:
            return iter(self.words.encode(" the owl saw" * max_tokens)[:max_tokens])
        self.seeds.append(seed)
        return iter(self.words.encode(" the owl saw")[:max_tokens])


def test_what_texts_are_like(tokenizer):
    writer = Ends(tokenizer)
    found = compare.writing(writer, tokenizer, ["the cat", "the sea"], 9, 0.7)
    assert found["closure"] == 1.0 and found["distinct"] == 1.0 and writer.seeds == [0, 1]
    assert found["loop"] == 9 and found["loop_free"] == 0.0
    assert compare.writing(writer, tokenizer, ["the cat"], 3, 0.7)["closure"] == 0.0


def test_a_model_that_knows_nothing_plays_at_chance(model, tokenizer):
    (words,) = compare.game_words([tokenizer])
    assert {tokenizer.decode([i]).strip() for i in words} == {*WORDS.split(), "the", "saw"}
    found = compare.play(model, words, batch=300)
    assert found["induction"] == pytest.approx(1 / 15, abs=0.06)
    assert found["association"] == pytest.approx(1 / 8, abs=0.06)
    assert found == compare.play(model, words, batch=300)


class Oracle:
    """Answers both games by looking, with a logit for each token."""

    ids_device = torch.device("cpu")

    def __call__(self, ids):
        logits = torch.zeros(*ids.shape, 1000)
        for row, tokens in enumerate(ids.tolist()):
            for t, token in enumerate(tokens):
                before = [k for k in range(t) if tokens[k] == token]
                if before:
                    logits[row, t, tokens[before[0] + 1]] = 1
        return logits, None


def test_who_looks_it_up_wins_the_games(tokenizer):
    (words,) = compare.game_words([tokenizer])
    assert compare.play(Oracle(), words, batch=40) == {"induction": 1.0, "association": 1.0}


# --- axes ---


def test_published_figures_are_scaled_from_chance():
    """Mamba-130M and Pythia-160M (arXiv:2312.00752, table 3)."""
    hellaswag = Axis("h", "HellaSwag", 25.0).scaled([35.3, 30.2])
    assert hellaswag == [1.0, pytest.approx(5.2 / 10.3)]
    assert Axis("a", "ARC-easy", 25.0).scaled([48.0, 43.7])[1] == pytest.approx(18.7 / 23)
    assert Axis("l", "LAMBADA", 0.0).scaled([44.3, 33.0])[1] == pytest.approx(33 / 44.3)
    bits = Axis("b", "bits per byte", 8.0, more_is_better=False).scaled([0.882, 0.947])
    assert bits == [1.0, pytest.approx((8 - 0.947) / (8 - 0.882))]


def test_odd_values_on_an_axis():
    recall = Axis("r", "recall", 0.25)
    assert recall.scaled([0.5, 0.2, None, math.nan]) == [1.0, 0.0, 0.0, 0.0]
    assert recall.scaled([0.2, 0.1]) == [0.0, 0.0]  # nobody is better than chance
    assert recall.scaled([None]) == [0.0]
    lucky = Axis("r", "recall", 0.25, noise=noise(0.25, 300))
    assert lucky.scaled([0.3, 0.2]) == [0.0, 0.0] and lucky.scaled([0.75, 0.3, 0.5]) == [1.0, 0.0, 0.5]
    guesses = torch.rand(2000, 300, generator=torch.Generator().manual_seed(0)) < 0.25
    assert ((guesses.double().mean(1) - 0.25).abs() > noise(0.25, 300)).double().mean() < 0.01
    memory = Axis("m", "MB", None, more_is_better=False)
    assert memory.scaled([4.0, 2.0]) == [0.5, 1.0]
    assert axes_for(4.4)[0].chance == 4.4 and AXES[0].chance is None


# --- the command ---


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            run_script(compare.main)
        return stopped.value.code, *capsys.readouterr()

    return call


def test_the_command_compares_both_architectures(command, tokenizer, model, tmp_path):
    other = TransformerLM(TransformerConfig(len(tokenizer), d_model=16, n_layer=1, headdim=8, d_ff=16), seed=0)
    for run in (model, other):
        folder = tmp_path / type(run).__name__
        run.save_pretrained(folder)
        tokenizer.save(folder / "tokenizer.json")
    (tmp_path / "data").mkdir()
    for k, text in enumerate(TEXTS):
        (tmp_path / "data" / f"{k}.md").write_text(text)
    asked = ["Mamba2LM", "TransformerLM", "--data", "data", "--texts", 1, "--max-tokens", 8, "--out", "out"]
    status, out, err = command(*asked)
    assert status == 0 and "bits per byte, state carried" in out, err
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert set(found["runs"]) == {"Mamba2LM", "TransformerLM"}
    for values in found["runs"].values():
        assert all(math.isfinite(values[axis.key]) for axis in AXES)
    for picture in ("radar.png", "bars.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 10_000
    for arguments, message in (
        (["Mamba2LM", "--limit", 0], "--limit must be at least 1"),
        (["Mamba2LM", "x/Mamba2LM"], "the same name"),
        (["nowhere", "--data", "data"], "nowhere"),
        (["Mamba2LM", "--data", "none"], "none"),
        (["Mamba2LM", "--temperature", 0], "--temperature"),
    ):
        status, _, err = command(*arguments)
        assert status == 2 and message in err and err.count("\n") == 1


def test_a_run_may_be_called_anything(tmp_path, recwarn):
    """A dollar sign begins no formula, and a letter that the font lacks is no warning."""
    found = {name: {"x": 1.0} for name in (r"$\frac$", "a$b_{$", r"\$", "a\x1b[31m", "\u202e", "x" * 300)}
    compare_plots.radar(found, [Axis(key, "x", 0.0) for key in "xyz"], tmp_path / "radar.png")
    compare_plots.bars(found, [Axis("x", "x", 0.0)], tmp_path / "bars.png")
    assert not recwarn.list and (tmp_path / "radar.png").stat().st_size > 5000 < (tmp_path / "bars.png").stat().st_size


def test_shares_go_run_by_run():
    found = {"a": {"x": 1.0, "y": 3.0}, "b": {"x": 2.0}}
    axes = (Axis("x", "x", 0.0), Axis("y", "y", 1.0))
    assert compare_plots.shares(found, axes) == {"a": [0.5, 1.0], "b": [1.0, 0.0]}
