"""A short training with and without kernels: one command trains, compares and draws."""

import json
import sys

import pytest
import torch

from benchmarks.quality import kernels_curve
from mamba2_min import ssd
from mamba2_min.errors import UserError
from mamba2_min.ops import gpu_kernels


def test_without_kernels_there_are_none():
    shape = ssd.Shape(1, 8, 1, 8, 1, 8, 8)
    before = gpu_kernels.has_triton(), ssd.chosen(torch.device("cpu"), torch.float32, shape)
    with kernels_curve.without_kernels():
        assert not gpu_kernels.has_triton()
        assert ssd.chosen(torch.device("cuda"), torch.bfloat16, shape) == "plain"
    assert (gpu_kernels.has_triton(), ssd.chosen(torch.device("cpu"), torch.float32, shape)) == before


def test_distances_are_those_of_the_second_halves():
    losses = {(0, True): [9, 9, 2, 2], (0, False): [5, 5, 2, 3], (1, True): [5, 5, 4, 4], (1, False): [5, 5, 4, 5]}
    runs = [{"seed": seed, "kernels": kernels, "losses": values} for (seed, kernels), values in losses.items()]
    assert kernels_curve.distances(runs) == {"with_and_without": 0.5, "seeds": 2.0}


@pytest.fixture
def command(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    words = ["a", "dog", "and", "a", "cat", "sat", "by", "the", "old", "red", "door", "of", "my"]
    for part, count in (("train", 300), ("valid", 30)):
        text = "\n\n".join(" ".join(words[(k * j) % 13] for j in range(1, 12)) for k in range(count))
        (data / f"{part}.txt").write_text(text)
    flags = f"--data {data} --out {tmp_path}/runs --results {tmp_path} --image {tmp_path}/p.png --device cpu --steps 20"
    shape = "--set d_model=8 n_layer=1 d_state=8 headdim=8 chunk_size=16"
    monkeypatch.setattr(sys, "argv", ["kernels_curve", *f"{flags} {shape}".split()])
    monkeypatch.setattr(
        kernels_curve, "TRAINING", kernels_curve.dataclasses.replace(kernels_curve.TRAINING, context=32, batch_size=2)
    )


def test_one_command_trains_compares_and_draws(command, tmp_path, capsys):
    assert kernels_curve.main() == 0
    written = json.loads((tmp_path / "quality-kernels_curve.json").read_text())
    assert [(run["seed"], run["kernels"]) for run in written["runs"]] == [(0, True), (0, False), (1, True), (1, False)]
    assert all(run["steps"] == [10, 20] and len(run["losses"]) == 2 for run in written["runs"])
    assert written["within_the_seeds_spread"]
    assert written["difference"]["with_and_without"] < 1e-3 < written["difference"]["seeds"]
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert "mean difference" in capsys.readouterr().out


def test_a_benchmark_that_was_stopped_goes_on(command, tmp_path, capsys, monkeypatch):
    ended, train = [], kernels_curve.train

    def stops(*args):
        if len(ended) == 3:
            raise KeyboardInterrupt
        ended.append(args[3:])
        return train(*args)

    monkeypatch.setattr(kernels_curve, "train", stops)
    with pytest.raises(KeyboardInterrupt):
        kernels_curve.main()
    monkeypatch.setattr(kernels_curve, "train", lambda *args: ended.append(args[3:]) or train(*args))
    assert kernels_curve.main() == 0
    assert ended == [(0, True), (0, False), (1, True), (1, False)]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--steps", "10"])  # another training
    assert kernels_curve.main() == 0 and len(ended) == 8


def test_one_seed_has_no_spread(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seeds", "3", "3"])
    with pytest.raises(UserError, match="needs two seeds"):
        kernels_curve.main()


def test_a_training_that_ends_early_is_no_curve(command, monkeypatch):
    monkeypatch.setattr(
        kernels_curve, "TRAINING", kernels_curve.dataclasses.replace(kernels_curve.TRAINING, max_minutes=1e-6)
    )
    with pytest.raises(UserError, match="ended by max_minutes"):
        kernels_curve.main()
