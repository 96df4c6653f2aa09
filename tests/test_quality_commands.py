"""What the quality benchmarks are told on their command lines: a fault is one line and a non-zero status."""

import dataclasses
import json

import pytest
from forked import Command

from benchmarks import harness
from benchmarks.quality import kernels_curve, length, regularisation, stories, texts, wikitext2
from mamba2_min.config import Mamba2Config
from mamba2_min.errors import UserError


@pytest.mark.parametrize("benchmark", ["length", "kernels_curve", "wikitext2", "stories", "regularisation"])
@pytest.mark.parametrize(
    "flags, says",
    [
        (["--set", "nonsense=1"], "unknown config key 'nonsense'"),
        (["--set", "d_model=0"], "d_model must be an integer from 1"),
        (["--set", "vocab_size=9"], "--set cannot name vocab_size, which the text gives"),
        (["--set", "d_model"], "'d_model' is not NAME=VALUE"),
        (["--device", "nowhere"], "nowhere"),
        ([], "no such file"),
    ],
)
def test_a_fault_is_one_line(benchmark, flags, says, tmp_path):
    data = ["--long" if benchmark == "length" else "--data", tmp_path / "nothing", "--out", tmp_path / "out"]
    where = ["--device", "cpu", "--results", tmp_path]
    done = Command("-m", f"benchmarks.quality.{benchmark}", *data, *where, *flags).wait()
    assert done.returncode == 2
    assert says.lower() in done.stderr.splitlines()[-1].lower() and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_is_set_stands_in_the_place_of_the_usual_values():
    assert harness.model_values({"d_model": 64, "n_layer": 2}, [("d_model", 32)]) == {"d_model": 32, "n_layer": 2}
    for usual in (length.MODEL, kernels_curve.MODEL, wikitext2.MODEL):
        assert harness.model_values(usual, []) == usual
        Mamba2Config(vocab_size=10, **usual)


def test_the_model_and_the_settings_can_be_set():
    changes = [("d_model", 32), ("lr", 0.5)]
    model, settings = texts.chosen(wikitext2.MODEL, wikitext2.TRAINING, changes, seed=7, max_minutes=3.0)
    assert model == wikitext2.MODEL | {"d_model": 32}
    assert settings == dataclasses.replace(wikitext2.TRAINING, lr=0.5, seed=7, max_minutes=3.0)
    with pytest.raises(UserError, match="context must be an integer from 1"):
        texts.chosen(wikitext2.MODEL, wikitext2.TRAINING, [("context", 0)])


def test_stories_write_a_row_for_each_recipe_and_seed_and_replace_an_older_one(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    for k in range(12):
        (data / f"{k}.txt").write_text(f"The {k} birds sat on a wall and sang. " * 20)
    for seeds in (["0", "1"], ["1"]):
        small = ["d_model=16", "n_layer=1", "headdim=16", "max_steps=3", "eval_every=2", "context=16", "warmup_steps=1"]
        where = ["--data", str(data), "--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
        told = ["--threads", "1", "--minutes", "1", "--seeds", *seeds, "--set", *small]
        monkeypatch.setattr("sys.argv", ["stories", *where, *told])
        assert stories.main() == 0
    runs = json.loads((tmp_path / stories.RESULTS).read_text())["runs"]
    assert [(run["recipe"], run["seed"]) for run in runs] == [("adamw", 0), ("adamw", 1), ("muon", 0), ("muon", 1)]
    assert all(run["steps"] == 3 and 0 < run["bits_per_byte"] < 9 for run in runs)
    assert runs[2]["training"]["optimizer"] == "muon" and runs[2]["model"]["dropout"] == 0.05


def test_wikitext2_keeps_what_was_measured_with_other_settings(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for part, birds in (("train", 12), ("valid", 3), ("test", 5)):
        text = "".join(f" the {k} birds sat on a wall and sang . \n" for k in range(birds))
        (data / f"{part}.txt").write_text(text)
    small = ["d_model=16", "n_layer=1", "headdim=16", "max_steps=4", "eval_every=2", "context=16", "batch_size=2"]
    where = ["--data", str(data), "--out", str(tmp_path / "runs"), "--results", str(tmp_path), "--device", "cpu"]
    where += ["--image", str(tmp_path / "it.png")]
    for changes in (["dropout=0"], ["dropout=0.1", "optimizer=muon"], ["dropout=0"]):
        monkeypatch.setattr("sys.argv", ["x", *where, "--set", *small, "graph=false", *changes])
        assert wikitext2.main() == 0
        assert "test perplexity" in capsys.readouterr().out
    runs = json.loads((tmp_path / "quality-wikitext2.json").read_text())["runs"]
    assert [run["model"]["dropout"] for run in runs] == [0.1, 0]
    assert runs[0]["training"]["optimizer"] == "muon" and runs[1]["training"]["recipe"] == "many-epochs"
    assert all(run["test"]["perplexity"] > 1 and run["test"]["tokens"] == 5 * 11 for run in runs)
    assert [[step for step, _ in run["validation_by_step"]] for run in runs] == [[2, 4], [2, 4]]
    assert (tmp_path / "it.png").stat().st_size > 5000
    assert wikitext2.described(runs[0]) == "0M, blocks 0.1, channels 0.5, muon"


def test_regularisation_measures_each_row_once_and_draws_a_picture(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    data.mkdir()
    article = (
        " = A bird =\n\n " + "the {} bird sat on a wall and sang . " * 12 + "\n = = Song = =\n " + "it sang . " * 9
    )
    for part, numbers in (("train", range(12)), ("valid", [20, 1]), ("test", [1, 40])):
        (data / f"{part}.txt").write_text("\n".join(article.format(*[k] * 12) for k in numbers) + "\n")
    small = ["d_model=16", "n_layer=1", "headdim=16", "max_steps=4", "eval_every=2", "context=16", "batch_size=2"]
    where = ["--data", str(data), "--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    told = [*where, "--image", str(tmp_path / "it.png"), "--device", "cpu", "--seeds", "0", "1", "--set", *small]
    monkeypatch.setattr("sys.argv", ["x", *told, "--only", "recipe", "noise", "zero"])
    assert regularisation.main() == 0
    written = json.loads((tmp_path / "quality-regularisation.json").read_text())
    names = ["the recipe", "state from zero in each window", "with noise 0.15"]
    assert [(run["name"], run["seed"]) for run in written["runs"]] == [
        (name, seed) for name in names for seed in (0, 1)
    ]
    assert all(run["test"] > 1 and len(run["validation_by_step"]) == 2 for run in written["runs"])
    assert (tmp_path / "it.png").stat().st_size > 5000
    kept = (tmp_path / "runs" / "data" / "train.txt").read_text()
    assert kept.count("= A bird =") == 3 and " 2 " in kept and " 3 " not in kept
    assert "<unk>" in (tmp_path / "runs" / "data" / "test.txt").read_text() and "40" not in kept
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["x", *told, "--only", "recipe"])
    assert regularisation.main() == 0 and "test perplexity" not in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["x", *told, "lr=0.002", "--only", "recipe"])
    assert regularisation.main() == 0 and capsys.readouterr().out.count("test perplexity") == 2
