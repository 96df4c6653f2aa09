"""A model that is divided among processes trains as a whole one does, and leaves the files of one."""

import os
import signal

import forked
import pytest
import torch
from several_processes import Processes
from small_runs import assert_same_run
from torch import distributed as dist
from torch import nn

from mamba2_min.checkpoints import checkpoint
from mamba2_min.config import Mamba2Config
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.training import distributed, sharding
from mamba2_min.training.distributed import Gone
from mamba2_min.training.metrics import read_metrics


def assert_near_run(one, other, tolerance=1e-5):
    """Two runs' folders hold the same files, and numbers that are equal up to rounding."""
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}
    for a, b in zip(*(read_metrics(folder / "metrics.jsonl") for folder in (one, other)), strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert value == b[name] if isinstance(value, str) else value == pytest.approx(b[name], rel=tolerance), name
    a, b = (checkpoint.load_tensors(folder / checkpoint.RESUME) for folder in (one, other))
    assert (a["best_step"], a["windows"], a["micro_batch"]) == (b["best_step"], b["windows"], b["micro_batch"])
    for part in ("model", "average"):
        assert a[part].keys() == b[part].keys()
        for name, tensor in a[part].items():
            torch.testing.assert_close(b[part][name], tensor, rtol=1e-3, atol=1e-4)
    for i, state in a["optimizer"]["state"].items():
        assert torch.equal(state["step"], b["optimizer"]["state"][i]["step"])
    best = [Mamba2LM.from_pretrained(folder) for folder in (one, other)]  # an ordinary run
    for p, q in zip(*(model.parameters() for model in best), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("count, more", [(2, ()), pytest.param(4, ("--recompute",), marks=pytest.mark.slow)])
def test_the_files_are_those_of_one_process(tmp_path, data, alone, count, more):
    processes = Processes(count, data, tmp_path / "run", "--shard", *more)
    assert processes.wait() == [0] * count, processes.all[0].text()
    assert_near_run(alone, tmp_path / "run")


@pytest.mark.parametrize("then", [(1, ()), (2, ("--shard",)), pytest.param((4, ("--shard",)), marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, data, alone, then):
    processes = Processes(2, data, tmp_path / "run", "--shard")
    processes.after(4)
    os.kill(processes.all[1].pid, signal.SIGTERM)
    assert processes.wait() == [143, 143]
    count, more = then
    assert Processes(count, data, tmp_path / "run", "--resume", *more).wait() == [0] * count
    assert_near_run(alone, tmp_path / "run")


class Lost(RuntimeError):
    pass


@pytest.mark.parametrize(
    "error, becomes",
    [
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), Gone),
        (dist.DistBackendError("NCCL error in: ..., remote process exited or there was a network error"), Gone),
        (Lost("something else"), Lost),
    ],
)
def test_a_connection_that_closes_within_a_block_is_one_line(monkeypatch, error, becomes):
    monkeypatch.setattr(distributed, "launched", lambda: True)
    for name, value in (("init_process_group", None), ("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(dist, name, lambda *args, value=value, **more: value)
    with pytest.raises(becomes), distributed.joined(torch.device("cpu")):
        raise error


@pytest.mark.slow
def test_it_is_killed_and_goes_on_from_the_last_save(tmp_path, data):
    assert Processes(2, data, tmp_path / "whole", "--shard").wait() == [0, 0]
    processes = Processes(2, data, tmp_path / "run", "--shard")
    processes.after(8)
    os.kill(processes.all[0].pid, signal.SIGKILL)
    assert processes.wait(60)[0] == 137
    assert not any("Traceback" in process.text() for process in processes.all)
    assert Processes(2, data, tmp_path / "run", "--shard", "--resume").wait() == [0, 0]
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    "count, more, says",
    [
        (1, (), "--shard needs several processes"),
        (2, ("--compile",), "--shard cannot be combined with --compile"),
        (2, ("--batch-size", "6"), "with --shard 3 micro-batches cannot be shared among 2 processes"),
    ],
)
def test_what_it_cannot_do_is_one_line(tmp_path, data, count, more, says):
    processes = Processes(count, data, tmp_path / "run", "--shard", *more)
    assert 0 not in processes.wait(60)
    text = processes.all[0].text()
    assert sum(line.startswith(f"error: {says}") for line in text.splitlines()) == 1 and "Traceback" not in text


def example():
    config = Mamba2Config(vocab_size=31, d_model=16, n_layer=2, d_state=4, headdim=4, chunk_size=8)
    model = Mamba2LM(config, seed=1).train()
    ids = torch.randint(31, (2, 24), generator=torch.Generator().manual_seed(0))
    return model, ids


def norm_of(model):
    return nn.utils.get_total_norm([p.grad for p in model.parameters()])


def work(rank, path, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model, ids = example()
    model.loss(ids, ids).backward()
    expected, norm = [p.grad for p in model.parameters()], norm_of(model)
    total = sum(p.numel() for p in model.parameters())

    model, _ = example()
    sharding.shard(model, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model.loss(ids[rank : rank + 1], ids[rank : rank + 1]).backward()
    assert model.lm_head.weight is model.backbone.embedding.weight
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(sharding.whole(p.grad, True), gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norm_of(model).full_tensor(), norm, rtol=1e-5, atol=0)
    optimizer.step()
    moments = [s["exp_avg"] for s in optimizer.state.values()]
    held = [sum(sharding.own_part(t).numel() for t in part) for part in (list(model.parameters()), moments)]
    queue.put((held, total))
    dist.destroy_process_group()


def test_each_process_holds_its_part_and_the_gradients_are_those_of_the_whole(tmp_path):
    queue = forked.context.Queue()
    started = [forked.fork(work, (rank, tmp_path / "meeting", queue)) for rank in range(2)]
    for process in started:
        assert forked.status_of(process, 100) == 0
    found = [queue.get() for _ in started]
    for part in (0, 1):
        assert sum(held[part] for held, _ in found) == found[0][1]
        assert all(0.4 < held[part] / total < 0.6 for held, total in found)
