"""Several processes train one model: the same files whatever their number, and nothing lost where one of them ends."""

import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from several_processes import FLAGS, Processes
from small_runs import ROOT, assert_same_run, make_trainer

from mamba2_min.checkpoints import checkpoint
from mamba2_min.training.distributed import Team, tree_sum
from mamba2_min.training.gradients import batch_gradients

# The tree


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("count", [8, 11, 16])
def test_each_micro_batch_is_computed_by_one_process(size, count):
    shares = [list(Team(rank, size).share(count)) for rank in range(size)]
    assert [k for share in shares for k in share] == list(range(count))
    assert all(shares)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("count", [4, 6, 8])
def test_the_branches_add_up_in_the_order_of_the_whole_tree(size, count):
    numbers = (
        torch.randn(count, 1000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(count)[:, None]
    )

    def leaf(k):
        return [numbers[k].clone()]

    (whole,) = tree_sum(leaf, 0, count)
    branches = []
    for rank in range(size):
        share = Team(rank, size).share(count)
        branches += tree_sum(leaf, share.start, share.stop)
    (joined,) = tree_sum(lambda rank: [branches[rank].clone()], 0, size)
    if count % size == 0:
        assert torch.equal(whole, joined)
    torch.testing.assert_close(whole, numbers.double().sum(0).float(), rtol=1e-4, atol=10.0 ** (count - 6))


def test_a_run_of_the_first_version_adds_up_what_all_processes_have(tmp_path, data):
    """Its own order of sums is for one process; with several, no gradient may stay where it was computed."""

    class Two(Team):
        added = 0

        def summed(self, tensors):
            self.added += len(tensors)
            return tensors

    trainer = make_trainer(tmp_path / "run", data, rules=1, micro_batch=1)
    team = Two(0, 2)
    batch_gradients(trainer, team, *next(trainer.windows))
    assert team.added == 1 + sum(p.grad is not None for p in trainer.model.parameters())


# The same run


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_whatever_their_number_the_files_are_the_same(tmp_path, data, alone, count):
    processes = Processes(count, data, tmp_path / "run")
    assert processes.wait() == [0] * count
    assert_same_run(alone, tmp_path / "run")
    said = [process.text() for process in processes.all]
    assert "all 12 steps done" in said[0] and not any(said[1:])  # one screen


@pytest.mark.parametrize(  # four: two groups of two
    "count, more",
    [(2, ()), pytest.param(2, ("--recompute",), marks=pytest.mark.slow), pytest.param(4, (), marks=pytest.mark.slow)],
)
def test_processes_that_share_each_text_train_the_same_model(tmp_path, data, count, more):
    flags = ("--context", "33", "--dropout", "0", "--variational-dropout", "0.2", "--embedding-dropout", "0.1", *more)
    assert Processes(1, data, tmp_path / "alone", *flags).wait() == [0]
    assert Processes(count, data, tmp_path / "run", *flags, "--context-parallel", "2").wait() == [0] * count
    a, b = (checkpoint.load_tensors(tmp_path / name / checkpoint.RESUME) for name in ("alone", "run"))
    for name, tensor in a["model"].items():
        torch.testing.assert_close(b["model"][name], tensor, rtol=1e-3, atol=1e-4)
    for part in ("conv", "ssm"):
        for one, other in zip(a["carried"][part], b["carried"][part], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("more", [("--context-parallel", "2"), ("--context-parallel", "0")])
def test_a_text_cannot_be_shared_by_one_process(tmp_path, data, more):
    processes = Processes(1, data, tmp_path / "run", *more)
    assert processes.wait(60) == [2]
    assert processes.all[0].text().startswith("error: --context-parallel")


def test_a_text_with_fewer_tokens_than_processes_cannot_be_shared(tmp_path, data):
    processes = Processes(2, data, tmp_path / "run", "--context-parallel", "2", "--context", "1")
    assert processes.wait(60) == [2, 2]
    assert (
        processes.all[0].text().endswith("error: 2 processes cannot share texts of 1 token: lower --context-parallel\n")
    )
    assert not (tmp_path / "run" / checkpoint.METRICS).exists()


def test_a_signal_to_one_of_them_saves_and_another_number_goes_on(tmp_path, data, alone):
    processes = Processes(2, data, tmp_path / "run")
    processes.after(4)
    os.kill(processes.all[1].pid, signal.SIGTERM)  # the one that has no screen
    assert processes.wait() == [143, 143]
    assert "go on with" in processes.all[0].text()
    assert Processes(1, data, tmp_path / "run", "--resume").wait() == [0]
    assert_same_run(alone, tmp_path / "run")


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_is_killed_ends_the_others_in_one_line(tmp_path, data, alone, victim):
    processes = Processes(2, data, tmp_path / "run")
    processes.after(4)
    os.kill(processes.all[victim].pid, signal.SIGKILL)
    begun = time.monotonic()
    status = processes.wait(30)
    assert status[victim] == 137 and status[1 - victim] in (1, 2) and time.monotonic() - begun < 30
    text = processes.all[0].text()
    if victim == 1:
        assert "error: another process of this training ended; what was saved before is intact" in text
    assert not any("Traceback" in process.text() for process in processes.all)
    assert Processes(2, data, tmp_path / "run", "--resume").wait() == [0, 0]
    assert_same_run(alone, tmp_path / "run")


@pytest.mark.slow
def test_killed_ten_times_at_any_moment_it_ends_with_the_same_weights(tmp_path, data):
    long = {"max_steps": 60}
    assert Processes(1, data, tmp_path / "alone", **long).wait() == [0]
    draw = random.Random(1)
    for _ in range(10):
        processes = Processes(2, data, tmp_path / "run", "--resume", **long)
        time.sleep(draw.uniform(0.5, 4))
        victim = draw.choice(processes.all)
        if victim.process.is_alive():
            os.kill(victim.pid, signal.SIGKILL)
        processes.wait(30)
    assert Processes(2, data, tmp_path / "run", "--resume", **long).wait() == [0, 0]
    assert_same_run(tmp_path / "alone", tmp_path / "run")


def test_a_full_disk_is_one_line_and_ends_all(tmp_path, data):
    processes = Processes(2, data, tmp_path / "run", limits={resource.RLIMIT_FSIZE: 12_000})
    assert 0 not in processes.wait(60)
    errors = [line for line in processes.all[0].text().splitlines() if line.startswith("error")]
    assert len(errors) == 1 and not any("Traceback" in process.text() for process in processes.all)


def test_more_processes_than_micro_batches_is_one_line(tmp_path, data):
    processes = Processes(2, data, tmp_path / "run", "--micro-batch", "8")
    assert 0 not in processes.wait(60)
    assert "2 processes share 1 micro-batch" in processes.all[0].text()
    assert "Traceback" not in processes.all[0].text()


def test_a_batch_is_shared_out_unless_told_otherwise(tmp_path, data):
    processes = Processes(2, data, tmp_path / "run", "--micro-batch", "0", max_steps=2)
    assert processes.wait() == [0, 0]
    assert "batch 8 in parts of 4" in processes.all[0].text()


@pytest.mark.slow
def test_by_torchrun(tmp_path, data, alone):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", ROOT / "train.py"]
    arguments = ["--data", data, "--out", tmp_path / "run", "--max-steps", "12", "--device", "cpu", "--threads", "1"]
    done = subprocess.run(
        [*command, *arguments, "--precision", "float32", *FLAGS], capture_output=True, text=True, timeout=200, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert_same_run(alone, tmp_path / "run")
