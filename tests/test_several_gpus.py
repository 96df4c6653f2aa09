"""Processes that torchrun starts, one a GPU, train as one process does. On a machine with two GPUs:

python -m pytest -m gpu tests/test_several_gpus.py
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import ROOT, write_documents

from mamba2_min.training.metrics import read_metrics

TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda", marks=[pytest.mark.gpu, TWO, pytest.mark.timeout(600)]),
]
STEPS = {"cpu": 20, "cuda": 100}
SHAPE = "--d-model 128 --n-layer 2 --d-state 32 --headdim 32 --dropout 0 --min-count 1"
FLAGS = (
    "--context 96 --batch-size 8 --micro-batch 4 --eval-every 10 --save-every 5 --log-every 1 --patience 0 --lr 1e-3"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("data"), count=40, words=400)


def start(device, data, out, count, *more):
    command = [sys.executable, ROOT / "train.py"]
    if count > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command[1:1] = launcher
    command += ["--data", data, "--out", out, "--device", device, "--threads", "1", "--max-steps", STEPS[device]]
    said = open(f"{out}.txt", "a")  # noqa: SIM115
    arguments = [*command, "--precision", "float32", *SHAPE.split(), *FLAGS.split()]
    arguments += ["--no-carry-state", *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, arguments)), stdout=said, stderr=said, env=environment, cwd=ROOT)


def trained(device, data, out, count, *more):
    """The losses, by step and split, of a whole run."""
    status = start(device, data, out, count, *more).wait(500)
    assert status == 0, Path(f"{out}.txt").read_text()
    return losses(out)


def losses(out):
    return {(r["step"], r["split"]): r["loss"] for r in read_metrics(out / "metrics.jsonl")}


def assert_near(one, other, tolerance=2e-3):
    assert one.keys() == other.keys()
    assert max(abs(one[key] - other[key]) / one[key] for key in one) < tolerance


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
    folder, known = tmp_path_factory.mktemp("alone"), {}

    def of(device):
        if device not in known:
            known[device] = trained(device, data, folder / device, 1)
            first, last = known[device][1, "train"], known[device][STEPS[device], "train"]
            assert last < 0.9 * first
        return known[device]

    return of


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--compile",),
        ("--graph",),
        ("--shard",),
        ("--shard", "--recompute"),
        ("--context-parallel", "2"),
        ("--context-parallel", "2", "--recompute"),
    ],
    ids=" ".join,
)
def test_two_processes_reach_the_losses_of_one(tmp_path, data, alone, device, more):
    assert_near(alone(device), trained(device, data, tmp_path / "run", 2, *more))


@pytest.mark.gpu
@TWO
@pytest.mark.timeout(600)
@pytest.mark.parametrize("more", [(), ("--recompute",)], ids=" ".join)
def test_a_text_over_two_gpus_in_bf16(tmp_path, data, more):
    """By our kernels, which take bf16."""
    one = trained("cuda", data, tmp_path / "one", 1, "--precision", "bf16", *more)
    two = trained("cuda", data, tmp_path / "two", 2, "--precision", "bf16", "--context-parallel", "2", *more)
    assert_near(one, two, 1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_one_of_two_is_killed_and_the_run_goes_on(tmp_path, data, alone, device):
    out = tmp_path / "run"
    launcher = start(device, data, out, 2)
    while not out.is_dir() or max([0, *(step for step, _ in losses(out))]) < STEPS[device] // 4:
        assert launcher.poll() is None, Path(f"{out}.txt").read_text()
        time.sleep(0.05)
    workers = children(launcher.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    assert launcher.wait(60) != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert_near(alone(device), trained(device, data, out, 2, "--resume"))


def children(parent):
    """The process ids of a process's children, in the order of their start (Linux)."""
    return sorted(map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()))
