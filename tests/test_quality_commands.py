"""What the quality benchmarks are told on their command lines: a fault is one line and a non-zero status."""

import dataclasses

import pytest
from forked import Command

from benchmarks import harness
from benchmarks.quality import kernels_curve, length, wikitext2
from mamba2_min.config import Mamba2Config
from mamba2_min.errors import UserError


@pytest.mark.parametrize("benchmark", ["length", "kernels_curve", "wikitext2"])
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


def test_of_wikitext2_the_model_and_the_settings_can_be_set(monkeypatch):
    monkeypatch.setattr("sys.argv", ["wikitext2", "--data", "x", "--minutes", "3", "--set", "d_model=32", "lr=0.5"])
    model, settings = wikitext2.chosen(wikitext2.parse(), 7)
    assert model == wikitext2.MODEL | {"d_model": 32}
    assert settings == dataclasses.replace(wikitext2.TRAINING, lr=0.5, seed=7, max_minutes=3.0)
    monkeypatch.setattr("sys.argv", ["wikitext2", "--data", "x", "--set", "context=0"])
    with pytest.raises(UserError, match="context must be an integer from 1"):
        wikitext2.chosen(wikitext2.parse(), 7)
