"""Several processes that train one model: torchrun --nproc-per-node N train.py ...

Every process holds the whole model and reads the same batch. Its micro-batches are shared out, and the gradients of all
processes are added up; then each takes the same step. The sum is a tree over the micro-batches, of which a process
computes a branch:

                 sum                      with one process: ((g0 + g1) + (g2 + g3))
               /     \\                    with two: (g0 + g1) in one, (g2 + g3) in the other
          rank 0     rank 1               with four: one each
          /    \\     /    \\
        g0     g1   g2     g3

So 1, 2, 4, ... processes add the same numbers in the same order, and end with the same weights: bit for bit on CPUs, up
to rounding on GPUs, where NCCL chooses the order. One process, the leader, writes the files and the screen; whatever
depends on a clock, a signal or a GPU's rounding is decided by the leader, or agreed upon.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

from mamba2_min.data.findings import counted
from mamba2_min.errors import UserError
from mamba2_min.ssd.stretches import spread_over

_GONE = "another process of this training ended; what was saved before is intact"
_ALIGNED = 64  # numbers: of tensors that are sent as one, each begins at a multiple; a GPU reads that faster
_PATIENCE = timedelta(minutes=10)  # how long a process waits for the others, who may be validating or saving


class Gone(UserError):
    """Another process of the training ended. It, or the launcher, says why."""


class Team:
    """The processes of a training. The default one is a process alone.

    With `stretches` above 1, so many neighbours by rank share each micro-batch: each takes a stretch of its tokens.
    With `sharded` each keeps a part of the model alone (sharding.py), and all run every block together.
    """

    def __init__(self, rank: int = 0, size: int = 1, stretches: int = 1, sharded: bool = False):
        if size % stretches:
            raise UserError(f"{size} processes cannot share texts among {stretches}: it must divide their number")
        self.rank, self.size, self.stretches, self.sharded = rank, size, stretches, sharded
        self.group = None
        if stretches > 1:  # every process makes every group
            groups = [dist.new_group(list(range(k, k + stretches))) for k in range(0, size, stretches)]
            self.group = groups[rank // stretches]

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` micro-batches this process computes: a branch of the tree."""
        branch, ranks = range(count), range(self.size // self.stretches)
        while len(ranks) > 1:
            left, at = len(ranks) // 2, len(branch) * (len(ranks) // 2) // len(ranks)
            if self.rank // self.stretches in ranks[:left]:
                branch, ranks = branch[:at], ranks[:left]
            else:
                branch, ranks = branch[at:], ranks[left:]
        return branch

    @property
    def divides(self) -> int:
        """Among how many processes, or groups that share texts, the micro-batches are shared out."""
        return self.size // self.stretches

    def stretch(self, length: int) -> slice:
        """Which of a text's tokens this process takes. Raises UserError where there are fewer than processes."""
        if length < self.stretches:
            raise UserError(
                f"{self.stretches} processes cannot share texts of {counted(length, 'token')}: lower --context-parallel"
            )
        k = self.rank % self.stretches
        return slice(length * k // self.stretches, length * (k + 1) // self.stretches)

    def spread(self) -> contextlib.AbstractContextManager[None]:
        """Within, each text is spread over the processes that share it."""
        return spread_over(self.group) if self.group else contextlib.nullcontext()

    def total(self, tensors: Sequence[Tensor]) -> None:
        """Adds the tensors of all processes up, in place. They have one dtype."""
        if self.size > 1 and tensors:
            torch._foreach_copy_(list(tensors), self.summed(tensors))

    def summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of all processes' tensors, of one dtype: parts of one new tensor. Alone, the tensors themselves."""
        if self.size == 1 or not tensors:
            return list(tensors)
        sizes = [-(-t.numel() // _ALIGNED) * _ALIGNED for t in tensors]
        flat = tensors[0].new_empty(sum(sizes))
        parts = [part[: t.numel()].view(t.shape) for part, t in zip(flat.split(sizes), tensors, strict=True)]
        torch._foreach_copy_(parts, list(tensors))  # on a GPU one launch for many
        if flat.is_cuda:
            self._with_others(lambda: dist.all_reduce(flat))
            return parts
        every = [torch.empty_like(flat) for _ in range(self.size)]
        self._with_others(lambda: dist.all_gather(every, flat))
        flat.copy_(tree_sum(lambda rank: [every[rank]], 0, self.size)[0])
        return parts

    def agree(self, *values: float) -> list[list[float]]:
        """The values of every process, by rank. Every process gets the same."""
        if self.size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)  # on the CPU: nobody waits for a GPU
        every = [torch.empty_like(mine) for _ in range(self.size)]
        self._with_others(lambda: dist.all_gather(every, mine))
        return [each.tolist() for each in every]

    def wait(self) -> None:
        """Returns when every process is here."""
        self.agree(0.0)

    def _with_others(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:  # a connection that was closed, or silence for too long
            raise Gone(_GONE) from error


def tree_sum(leaf: Callable[[int], list[Tensor]], start: int, stop: int) -> list[Tensor]:
    """leaf(start) + ... + leaf(stop - 1), tensor by tensor, each half on its own. The leaves' tensors are added to."""
    if stop - start == 1:
        return leaf(start)
    middle = (start + stop) // 2
    left = tree_sum(leaf, start, middle)
    for mine, other in zip(left, tree_sum(leaf, middle, stop), strict=True):
        mine += other
    return left


_team = Team()


def team() -> Team:
    """The processes that this one trains with."""
    return _team


def launched() -> bool:
    """Whether torchrun, or another launcher that sets its variables, started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def joined(device: torch.device, stretches: int = 1, sharded: bool = False) -> Iterator[Team]:
    """Within, this process trains with those that a launcher started beside it, if one did.

    Where a process leaves with an error, the others do not wait for it: the launcher ends them. Raises UserError where
    the processes cannot meet.
    """
    global _team
    if not launched():
        if stretches > 1:
            raise UserError(f"--context-parallel {stretches} needs processes: torchrun --nproc-per-node {stretches}")
        if sharded:
            raise UserError("--shard needs several processes: torchrun --nproc-per-node 2")
        yield _team
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes cannot meet: {str(error).splitlines()[0][:200]}") from error
    _team = Team(dist.get_rank(), dist.get_world_size(), stretches, sharded)
    try:
        yield _team
        _team.wait()
        dist.destroy_process_group()
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or re.search("gloo|NCCL", str(error)):  # within a block, or a long text
            raise Gone(_GONE) from error
        raise
    finally:
        _team = Team()


def is_leader() -> bool:
    """Whether this process is alone, or the first of those that a launcher started: it has the files and the screen."""
    return os.environ.get("RANK", "0") == "0" or not launched()


def local_threads(cores: int) -> int:
    """The threads of each process, where those of one machine share its cores."""
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) if launched() else cores


def local_device(device: torch.device) -> torch.device:
    """This process's own device: of several GPUs, the one of its number on its machine."""
    if device.type == "cuda" and launched():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device
