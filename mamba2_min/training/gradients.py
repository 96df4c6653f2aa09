"""The gradient of a batch's mean loss: micro-batch by micro-batch, shared out among the processes of a training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mamba2_min.data.epochs import seed_of
from mamba2_min.errors import UserError
from mamba2_min.ops.autograd import widest
from mamba2_min.ops.loss import IGNORE
from mamba2_min.training.carried import handed_on
from mamba2_min.training.distributed import Team, tree_sum

if TYPE_CHECKING:
    from mamba2_min.models.mamba2 import State
    from mamba2_min.training.trainer import Trainer


def parts_of(rows: int, micro_batch: int) -> list[slice]:
    """The micro-batches of a batch of so many rows; the last may be smaller."""
    return [slice(start, start + micro_batch) for start in range(0, rows, micro_batch)]


def own_rows(trainer: Trainer) -> slice:
    """The rows of a batch that this process computes."""
    parts = parts_of(trainer.settings.batch_size, trainer.micro_batch)
    mine = trainer.team.share(len(parts))
    return slice(parts[mine.start].start, parts[mine.stop - 1].stop)


def batch_gradients(trainer: Trainer, team: Team, *batch: Tensor, add: Callable[..., Tensor] | None = None) -> Tensor:
    """Leaves a batch's gradients in the parameters, whose own must be None, and returns its mean loss, a scalar.

    batch: input_ids, targets and, where there are, seq_idx and fresh (`Task.batches`). The mean is over the targets of
    the whole batch, however they are spread. Several micro-batches are added up as a tree (distributed.py), and each
    draws its dropout from the step and its number alone: so it does not matter which process computes it.
    `add` stands in for `_add`, as a CUDA graph does (step_graph.py).
    """
    add = add or _add
    parts, counted = parts_of(len(batch[0]), trainer.micro_batch), max(1, int((batch[1] != IGNORE).sum()))
    most = len(parts_of(trainer.settings.batch_size, trainer.micro_batch))  # in fine-tuning some batches are smaller
    if team.size == 1 and (trainer.settings.rules == 1 or most == 1):
        losses = (add(trainer, team, counted, part, *batch) for part in parts)
        return sum(losses, torch.zeros((), device=trainer.device))
    if team.sharded:
        return _sharded_gradients(trainer, team, counted, parts, *batch)
    mine = team.share(len(parts))
    if most < team.divides:
        raise UserError(f"{team.size} processes share {most} micro-batch(es): lower --micro-batch")
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    if not mine:
        for p in parameters:  # the others have gradients of all: what a model does not read is frozen (Classifier)
            p.grad = torch.zeros_like(p)
        loss = torch.zeros((), dtype=widest(trainer.device), device=trainer.device)
        team.total([loss])
        team.total([p.grad for p in parameters if p.grad is not None])
        return loss

    def leaf(k: int) -> list[Tensor]:
        with _drawing(trainer, k):
            loss = add(trainer, team, counted, parts[k], *batch)
        gradients = [p.grad for p in parameters if p.grad is not None]
        for p in parameters:
            reached[p] = p.grad is not None
            p.grad = None
        return [loss, *gradients]

    reached: dict[Tensor, bool] = {}
    loss, *gradients = tree_sum(leaf, mine.start, mine.stop)
    (loss,) = team.summed([loss])
    for p, gradient in zip((p for p in parameters if reached[p]), team.summed(gradients), strict=True):
        p.grad = gradient
    return loss


def _sharded_gradients(trainer: Trainer, team: Team, counted: int, parts: list[slice], *batch: Tensor) -> Tensor:
    """`batch_gradients` of a sharded model: the backward pass of each micro-batch adds up the gradients of all
    processes, and leaves each its own rows. So all compute as many micro-batches."""
    if len(parts) % team.divides:
        raise UserError(
            f"with --shard {len(parts)} micro-batches cannot be shared among {team.divides} processes: "
            "--micro-batch must divide them evenly"
        )
    loss = torch.zeros((), dtype=widest(trainer.device), device=trainer.device)
    for k in team.share(len(parts)):
        with _drawing(trainer, k):
            # FSDP takes the mean over the processes where the sum is wanted: each counts as often as there are some.
            loss += _add(trainer, team, counted / team.size, parts[k], *batch) / team.size
    team.total([loss])
    return loss


def share_of(targets: Tensor, counted: float) -> float:
    """The weight of these targets' mean loss in that of a batch, which has `counted` targets."""
    return int((targets != IGNORE).sum()) / counted


def loss_and_state(
    trainer: Trainer, part: slice, input_ids: Tensor, targets: Tensor, seq_idx: Tensor | None, fresh: Tensor | None
) -> tuple[Tensor, State | None]:
    """The mean loss of the rows `part` of a batch, and the state that the next batch goes on from, if one is carried.

    input_ids, targets, seq_idx: those rows, on the trainer's device; fresh: of all rows (`Task.batches`).
    """
    input_ids, packed = trainer.noise(input_ids), {} if seq_idx is None else {"seq_idx": seq_idx}
    with trainer.autocast:
        if not trainer.carried or fresh is None:
            return trainer.model.loss(input_ids, targets, **packed), None
        before = trainer.carried.before(part, fresh)
        loss, state = trainer.model.loss_and_state(input_ids, targets, before, **packed)
        return loss, handed_on(state)


def _add(
    trainer: Trainer,
    team: Team,
    counted: float,
    part: slice,
    input_ids: Tensor,
    targets: Tensor,
    seq_idx: Tensor | None = None,
    fresh: Tensor | None = None,
) -> Tensor:
    """Adds the gradients of one micro-batch, or of this process's stretch of it; returns its share of the mean loss.

    counted: the targets of the whole batch.
    """
    device, here = trainer.device, (part, team.stretch(input_ids.shape[1]))
    ids, wanted = input_ids[here].to(device), targets[here].to(device)
    documents = None if seq_idx is None else seq_idx[here].to(device)
    with team.spread():  # the backward pass too: --recompute computes blocks again there
        loss, state = loss_and_state(trainer, part, ids, wanted, documents, fresh)
        if trainer.carried and state:
            trainer.carried.after(part, state)
        loss = loss * share_of(targets[here], counted)
        loss.backward()
    return loss.detach().to(widest(device))


@contextlib.contextmanager
def _drawing(trainer: Trainer, k: int) -> Iterator[None]:
    """Within, random numbers are those of micro-batch k of this step; afterwards, as if none had been drawn."""
    with torch.random.fork_rng([trainer.device] if trainer.device.type == "cuda" else []):
        torch.manual_seed(seed_of(trainer.settings.seed, trainer.step, k))
        yield
