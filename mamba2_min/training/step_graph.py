"""Forward and backward pass of a batch as one CUDA graph: recorded once, then launched as one.

A step of a small model is thousands of kernels of some microseconds each, and launching them one by one from Python
takes longer than they do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mamba2_min import devices
from mamba2_min.models.mamba2 import State
from mamba2_min.ops.autograd import widest
from mamba2_min.training.distributed import Team
from mamba2_min.training.gradients import batch_gradients, loss_and_state, parts_of, share_of

if TYPE_CHECKING:
    from mamba2_min.training.trainer import Trainer

_WARM_UP = 3  # passes before the recording: kernels are compiled, libraries choose theirs
_IN_A_ROW = 8  # batches of another shape, after which that shape is worth the recording


class StepGraph:
    """What `backward(*batch)` does on a GPU, for batches of one shape: it adds gradients and returns the loss.

    The recorded pass finds the parameters where they were, whatever their values are; `fits` tells whether they still
    are there. Python does not run again: what it does besides launching kernels is not repeated. Random numbers are
    drawn anew at each launch.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        backward: Callable[..., Tensor],
        batch: Sequence[Tensor],
        reads: Sequence[Tensor] = (),
    ):
        """batch: tensors on the GPU; reads: what `backward` finds there besides batch and parameters. Gradients must be
        None, and are None afterwards."""
        self._all = list(parameters)  # frozen ones too: the graph reads them where they are now
        self._parameters = [p for p in parameters if p.requires_grad]
        self._places = _places([*self._all, *reads])
        self._batch = [t.clone() for t in batch]
        device = self._batch[0].device
        with torch.cuda.device(device), torch.random.fork_rng([device]):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UP):
                    backward(*self._batch)
                    self._forget()
            torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may go on meanwhile: NCCL's watchdog asks the GPU how far it is.
        with torch.cuda.device(device), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._loss = backward(*self._batch)
        self._gradients = [p.grad for p in self._parameters]
        self._forget()

    def fits(self, batch: Sequence[Tensor], reads: Sequence[Tensor] = ()) -> bool:
        """Whether this batch has the shapes of the recorded one, and the rest is where it was."""
        return self.has_shapes_of(batch) and _places([*self._all, *reads]) == self._places

    def has_shapes_of(self, batch: Sequence[Tensor]) -> bool:
        return [(t.shape, t.dtype) for t in batch] == [(t.shape, t.dtype) for t in self._batch]

    def __call__(self, batch: Sequence[Tensor]) -> Tensor:
        """The loss of a batch on any device; the gradients are the parameters' `grad` until the next call."""
        for kept, given in zip(self._batch, batch, strict=True):
            kept.copy_(given, non_blocking=True)
        self._graph.replay()
        for p, gradient in zip(self._parameters, self._gradients, strict=True):
            p.grad = gradient
        return self._loss.clone()

    def _forget(self) -> None:
        for p in self._parameters:
            p.grad = None


def _places(tensors: Sequence[Tensor]) -> list[tuple[int, torch.dtype]]:
    return [(t.data_ptr(), t.dtype) for t in tensors]


class GraphedGradients:
    """`batch_gradients` of a trainer, by a graph of the first micro-batch's shape where a process has one in a step.

    Fine-tuning has batches of several shapes: one that does not fit the graph is computed without it, and a new graph
    is recorded when _IN_A_ROW batches had its shape.
    The sum over several processes comes after the graph. Where a state is carried, the graph reads it from where it is
    kept and leaves the next one in tensors of its own.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._graph: StepGraph | None = None
        self._wanted = trainer.settings.graph and trainer.device.type == "cuda"
        self._part = slice(0)  # the rows that the graph is for
        self._state_after: State | None = None
        self._odd: tuple[list[torch.Size], int] = ([], 0)  # the last shapes without a graph, how often in a row

    def __call__(self, *batch: Tensor) -> Tensor:
        """The gradients and the mean loss of a batch, by a graph where one can give them."""
        trainer, team, carried = self._trainer, self._trainer.team, self._trainer.carried
        parts = parts_of(len(batch[0]), trainer.micro_batch)
        mine = team.share(len(parts))
        if not self._wanted or len(mine) != 1 or team.stretches > 1:
            return batch_gradients(trainer, team, *batch)
        if carried and carried.state is None:  # the first step says which dtypes a carried state has
            return batch_gradients(trainer, team, *batch)
        part = parts[mine[0]]
        inputs = _inputs(1, part, *batch)
        if self._graph is not None and self._is_odd(part, inputs):
            return batch_gradients(trainer, team, *batch)
        if self._graph is None or self._part != part or not self._graph.fits(inputs, self._reads()):
            self._graph = self._state_after = None  # before the next is recorded: there may be no memory for both
            self._part = part
            why_not = self._record(inputs)
            trainer.report("graph", {"step": trainer.step + 1, "why_not": why_not})
            if why_not:
                self._wanted = False
                return batch_gradients(trainer, team, *batch)
        return batch_gradients(trainer, team, *batch, add=self._add)

    def _add(self, trainer: Trainer, team: Team, counted: int, part: slice, *batch: Tensor) -> Tensor:
        """Leaves the gradients of a micro-batch in the parameters, and returns its share of the mean loss."""
        assert self._graph is not None
        loss = self._graph(_inputs(counted, part, *batch)).to(widest(trainer.device))
        if trainer.carried and self._state_after:
            trainer.carried.after(part, self._state_after)
        return loss

    def _reads(self) -> list[Tensor]:
        state = self._trainer.carried and self._trainer.carried.state
        return [*state.conv, *state.ssm] if state else []

    def _is_odd(self, part: slice, inputs: Sequence[Tensor]) -> bool:
        """Whether a batch has another shape than the graph's, and came too seldom for a graph of its own."""
        assert self._graph is not None
        if self._part == part and self._graph.has_shapes_of(inputs):
            self._odd = ([], 0)
            return False
        shapes = [t.shape for t in inputs]
        self._odd = (shapes, self._odd[1] + 1 if self._odd[0] == shapes else 1)
        return self._odd[1] < _IN_A_ROW

    def _record(self, batch: Sequence[Tensor]) -> str:
        """An empty string, or the reason why there is no graph. Raises where memory runs out."""
        trainer = self._trainer
        try:
            on_device = [t.to(trainer.device) for t in batch]
            parameters = list(trainer.model.parameters())
            self._graph = StepGraph(parameters, self._backward, on_device, self._reads())
            return ""
        except Exception as error:
            trainer.optimizer.zero_grad(set_to_none=True)
            if devices.is_out_of_memory(error):
                raise
            return (str(error).splitlines() or [type(error).__name__])[0][:200]

    def _backward(
        self,
        share: Tensor,
        input_ids: Tensor,
        targets: Tensor,
        seq_idx: Tensor | None = None,
        fresh: Tensor | None = None,
    ) -> Tensor:
        """Nothing here waits for the device, or asks it for a value."""
        loss, self._state_after = loss_and_state(self._trainer, self._part, input_ids, targets, seq_idx, fresh)
        loss = loss * share
        loss.backward()
        return loss.detach()


def _inputs(counted: int, part: slice, input_ids: Tensor, targets: Tensor, *more: Tensor) -> list[Tensor]:
    """What a graph reads of a batch: the weight of a part in the mean loss, its rows, and which rows are fresh."""
    share = torch.tensor(share_of(targets[part], counted))
    return [share, input_ids[part], targets[part], *(t[part] for t in more[:1]), *more[1:]]
