"""Perplexity by position: the losses are those of one forward pass, and the buckets are means of them."""

import json
from pathlib import Path

import forked
import pytest
import torch
from torch.nn import functional as F

from mamba2_min import Mamba2Config, Mamba2LM, TransformerConfig, TransformerLM, UserError, WordTokenizer
from mamba2_min.evaluation import position

ROOT = Path(__file__).parent.parent
IDS = torch.randint(1, 61, (700,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


@pytest.fixture(scope="module")
def model():
    return Mamba2LM(Mamba2Config(61, d_model=16, n_layer=2, d_state=6, headdim=8, chunk_size=16), seed=0).eval()


def wanted(model, ids):
    inputs = torch.cat([torch.tensor([0]), ids[:-1].long()])
    with torch.no_grad():
        return F.cross_entropy(model(inputs[None])[0][0], ids.long(), reduction="none")


@pytest.mark.parametrize("window", [64, 700, 2048])
def test_losses_are_those_of_one_pass(model, monkeypatch, window):
    monkeypatch.setattr(position, "WINDOW", window)
    torch.testing.assert_close(position.losses_by_position(model, IDS, 0), wanted(model, IDS), rtol=1e-4, atol=1e-4)


def test_a_reset_begins_each_stretch_again(model):
    found = position.losses_by_position(model, IDS, 0, reset=256)
    for start in (0, 256, 512):
        part = IDS[start : start + 256]
        torch.testing.assert_close(found[start : start + 256], wanted(model, part), rtol=1e-4, atol=1e-4)


def test_a_transformer_goes_through_the_same(model):
    other = TransformerLM(TransformerConfig(61, d_model=64, n_layer=1), seed=0).eval()
    torch.testing.assert_close(position.losses_by_position(other, IDS, 0), wanted(other, IDS), rtol=1e-3, atol=1e-3)


def test_buckets_double_and_cover_everything():
    losses = torch.arange(100.0)
    found = position.buckets(losses)
    assert [(b.first, b.last) for b in found[:5]] == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16)]
    assert found[-1].last == 100 and sum(b.tokens for b in found) == 100
    assert sum(b.loss * b.tokens for b in found) == pytest.approx(float(losses.sum()))
    for b in found[2:]:
        part = losses[b.first - 1 : b.last]
        assert b.error == pytest.approx(float(part.std() / len(part) ** 0.5))


def test_no_text(model):
    with pytest.raises(UserError, match="no tokens"):
        position.losses_by_position(model, IDS[:0], 0)


@pytest.mark.parametrize("odd", [[], "x", None, 1, {"context": 10**400}, {"context": True}, {"context": "64"}], ids=str)
def test_settings_of_another_form_say_nothing(tmp_path, odd):
    (tmp_path / "settings.json").write_text(json.dumps({"training": odd}))
    assert position._trained_context(tmp_path) is None
    (tmp_path / "settings.json").write_text(json.dumps({"training": {"context": 64}}))
    assert position._trained_context(tmp_path) == 64


def command(*arguments, cwd):
    return forked.command("-m", "mamba2_min.evaluation.position", *arguments, cwd=cwd)


def test_the_command(tmp_path):
    text = "The cat sat on the mat. The dog sat on the cat. " * 40
    tokenizer = WordTokenizer.train([text], min_count=1)
    config = Mamba2Config(len(tokenizer), d_model=16, n_layer=1, d_state=4, headdim=8)
    Mamba2LM(config, seed=0).save_pretrained(tmp_path / "run")
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    (tmp_path / "book.txt").write_text(text)
    done = command("--model", "run", "--data", "book.txt", "--reset", 64, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "position.json").read_text())
    assert found["tokens"] == len(tokenizer.encode(text.strip())) and len(found["curves"]) == 2
    carried, cleared = found["curves"].values()
    for a, b, gain in zip(carried, cleared, found["gain"], strict=True):
        assert gain["loss"] == pytest.approx(b["loss"] - a["loss"], abs=1e-5)
    assert (tmp_path / "out" / "position.png").stat().st_size > 5000 and "state carried" in done.stdout
    for arguments, message in (
        (["--model", "run", "--data", "none.txt"], "none.txt"),
        (["--model", "run", "--data", "book.txt", "--reset", "0"], "--reset must be at least 1"),
    ):
        done = command(*arguments, cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
