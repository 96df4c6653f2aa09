"""One sequence over several processes equals the whole: values and gradients, in float64."""

import multiprocessing
import os
import subprocess
import sys
import tempfile

import pytest
import torch
from torch import distributed as dist
from torch.nn import functional as F

from mamba2_min.config import Mamba2Config
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.ops.gpu_kernels import has_triton
from mamba2_min.ssd.stretches import inputs_before, is_spread, spread_over

SHAPE = {"vocab_size": 30, "d_model": 16, "n_layer": 2, "d_state": 4, "headdim": 4, "ngroups": 2, "chunk_size": 4}
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["test_stretches"])

# Lengths of the stretches; whether documents are packed; whether a state goes before.
CASES = {
    2: [((9, 12), False, False), ((9, 12), True, True), ((1, 20), True, True), ((2, 1), False, True)],
    3: [((7, 1, 9), True, False), ((1, 1, 1), True, True), ((5, 6, 10), False, True)],
    4: [((3, 8, 1, 6), True, True), ((2, 2, 2, 2), False, False)],
}


def example(lengths, packed, begun):
    torch.manual_seed(sum(lengths) + 100 * len(lengths) + packed)
    model = Mamba2LM(Mamba2Config(**SHAPE), seed=1).double()
    total = sum(lengths)
    ids, targets = torch.randint(0, 30, (2, total)), torch.randint(0, 30, (2, total))
    seq_idx = (torch.rand(2, total) < 0.3).cumsum(1) if packed else None
    state = None
    if begun:
        with torch.no_grad():
            state = model(torch.randint(0, 30, (2, 5)))[1]
        for tensors in (state.conv, state.ssm):
            tensors[:] = [t.requires_grad_() for t in tensors]
    return model, ids, targets, seq_idx, state


def results(model, state, logits, targets, new):
    """The loss that depends on logits and the state at the end, backwards."""
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return loss, sum((t**2).sum() for t in (*new.conv, *new.ssm))


def gradients(model, state):
    tensors = [*model.parameters(), *((*state.conv, *state.ssm) if state else ())]
    return [t.grad for t in tensors]


def work(rank, size, path, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    worst = {}
    for case in CASES[size]:
        lengths = case[0]
        model, ids, targets, seq_idx, state = example(*case)
        logits, new = model(ids, state, seq_idx)
        loss, end = results(model, state, logits, targets, new)
        (loss + end).backward()
        expected = gradients(model, state)
        whole = logits.detach()

        model, ids, targets, seq_idx, state = example(*case)
        start = sum(lengths[:rank])
        part = slice(start, start + lengths[rank])
        with spread_over(dist.group.WORLD):
            mine, last = model(ids[:, part], state, None if seq_idx is None else seq_idx[:, part])
            loss, end = results(model, state, mine, targets[:, part], last)
            (loss + end / size).backward()  # the state at the end is in every process
        error = [(mine.detach() - whole[:, part]).abs().max()]
        error += [(a - b).abs().max() for a, b in zip((*last.conv, *last.ssm), (*new.conv, *new.ssm), strict=True)]
        for mine, theirs in zip(gradients(model, state), expected, strict=True):
            dist.all_reduce(mine)
            error.append((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9))
        worst[case] = float(torch.stack(error).max())  # NaN where one is
    u = torch.zeros(1, 1, 1, requires_grad=True)
    with spread_over(dist.group.WORLD), pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(inputs_before(u, 1, None, None)[1].sum(), u, create_graph=True)
    queue.put((rank, worst))
    dist.destroy_process_group()


@pytest.mark.parametrize("size", CASES)
def test_a_sequence_over_several_processes_is_the_whole(size):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.path.dirname(__file__) + os.pathsep + os.getcwd())
        queue = _processes.Queue()
        arguments = (size, os.path.join(folder, "meeting"), queue)
        started = [_processes.Process(target=work, args=(rank, *arguments)) for rank in range(size)]
        for process in started:
            process.start()
        found = dict(queue.get(timeout=100) for _ in started)
        for process in started:
            process.join(30)
            assert process.exitcode == 0
    for rank in range(size):
        assert len(found[rank]) == len(CASES[size])
        for case, error in found[rank].items():
            assert error < 1e-10, (rank, case, error)


@pytest.mark.skipif(not has_triton(), reason='needs Triton: pip install "mamba2-min[dev]" on Linux')
def test_by_the_kernels_of_a_gpu(tmp_path):
    """In Triton's interpreter, in float32: a mixer as one function, and blocks that run again."""
    script, meeting = os.path.join(os.path.dirname(__file__), "stretches_interpreter.py"), str(tmp_path / "meeting")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", script, str(rank), meeting],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in started:
            said, errors = process.communicate(timeout=280)
            assert process.returncode == 0, errors[-2000:]
            found = list(map(float, said.split()))
            assert len(found) == 3 and all(error < 1e-4 for error in found), found
    finally:
        for process in started:  # one that waits for the other
            process.kill()


def test_alone_nothing_is_spread():
    assert not is_spread()
