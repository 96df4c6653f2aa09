"""How much memory a training needs, and what to lower if that is too much."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mamba2_min import devices, files
from mamba2_min.checkpoints import checkpoint
from mamba2_min.config import Mamba2Config
from mamba2_min.devices import size
from mamba2_min.errors import UserError
from mamba2_min.ops.loss import slice_elements
from mamba2_min.settings import Settings
from mamba2_min.training.distributed import Team

if TYPE_CHECKING:
    from mamba2_min.training.trainer import Trainer


def training_memory(
    config: Mamba2Config,
    batch_size: int,
    context: int,
    device: torch.device | str = "cpu",
    recompute: bool = False,
    precision: str = "float32",
    averaged: bool = False,
    optimizer: str = "adamw",
) -> int:
    """An estimate of the bytes that a training adds to the process: too high, by at most three fifths.

    Weights, gradients and AdamW's two moments are four float32 copies of the parameters; while the head's gradient is
    computed there is one more of the embedding. Until the backward pass a token keeps, in each layer, the residual
    stream and the inputs and outputs of projections, convolution, scan and norms; with `recompute`, of one layer only.
    Weights that are `averaged` are one copy more. Of the layers' matrices Muon keeps one moment, and its step takes as
    much as three and a half copies: what the backward pass took is free by then, but in blocks of other sizes.
    With `precision` "bf16" a GPU keeps all but the residual stream in half of the bytes.
    """
    device = torch.device(device)
    tokens = batch_size * context
    on_cpu = device.type == "cpu"
    head = config.padded_vocab_size * config.d_model
    per_layer = (
        3 * config.d_model
        + 2 * config.d_in_proj
        + 2 * config.conv_dim
        + 4 * config.d_inner
        + 2 * config.d_inner * config.d_state // config.chunk_size  # one state and its gradient per chunk
    )
    width = 2 if precision == "bf16" and not on_cpu else 4
    per_token = width * per_layer * (1 if recompute else config.n_layer) + 4 * config.d_model * (config.n_layer + 4)
    with devices.matmul_precision(device, precision):
        logits = min(slice_elements(device), tokens * config.vocab_size) * (1 if on_cpu else 3)
    libraries = 216 << 20 if on_cpu else 0  # what the optimizer and the plot import, Triton with them
    copies = (4 + averaged) * config.num_parameters()
    if optimizer == "muon":
        copies += 5 * config.n_layer * (config.d_in_proj + config.d_inner) * config.d_model // 2  # 3.5, less a moment
    return 4 * (copies + head + logits) + tokens * per_token + libraries


def fit_to_memory(config: Mamba2Config, settings: Settings, device: torch.device, team: Team | None = None) -> Settings:
    """The settings with a micro-batch for each process and, where they ask for "auto", one that fits: the batch,
    halved until there is room.

    The choice is saved with the run. A resumed run that chose again might sum its gradients in another order.
    """
    if settings.micro_batch or not settings.adapt_micro_batch:
        return shared_out(settings, team.divides if team else 1)
    micro, free = -(-settings.batch_size // (team.divides if team else 1)), devices.free_memory(device)
    while micro > 1 and free is not None and _needed(config, settings, device, micro, settings.context, team) > free:
        micro = -(-micro // 2)
    return dataclasses.replace(settings, micro_batch=micro)


def shared_out(settings: Settings, processes: int) -> Settings:
    """The settings; where several processes share a batch and no micro-batch is named, with one for each of them."""
    micro = 0 if processes == 1 else -(-settings.batch_size // processes)
    return dataclasses.replace(settings, micro_batch=settings.micro_batch or micro)


def check_memory(
    config: Mamba2Config, settings: Settings, device: torch.device, ignore: bool = False, team: Team | None = None
) -> tuple[str, str]:
    """The memory that a step needs and the free memory, as text ("" where the system does not tell).

    If it needs too much, raises a UserError that says what to lower, and to what, unless `ignore`.
    """
    micro, context = settings.micro_batch or settings.batch_size, settings.context
    needed, free = _needed(config, settings, device, micro, context, team), devices.free_memory(device)
    if free is None or needed <= free or ignore:
        return size(needed), "" if free is None else size(free)
    problem = f"training needs about {size(needed)}, and {size(free)} is free"

    def fits(batch: int, length: int) -> bool:
        return _needed(config, settings, device, batch, length, team) <= free

    if not fits(1, 1):
        raise UserError(f"{problem}: the model alone is too large; lower --d-model, --n-layer or --vocab-size")
    flag = "--micro-batch" if settings.micro_batch else "--batch-size"
    # The largest of each that fits beside the other, or 0.
    batch = bisect.bisect_left(range(micro), True, key=lambda b: not fits(b + 1, context))
    length = bisect.bisect_left(range(context), True, key=lambda n: not fits(micro, n + 1))
    options = [f"{flag} from {micro} to {batch}"] if batch else []
    options += [f"--context from {context} to {length}"] if length else []
    lower = " or ".join(options) or f"both {flag} and --context"
    auto = "" if settings.adapt_micro_batch else "; --batch-size auto computes the same batch in parts"
    raise UserError(f"{problem}: lower {lower}{auto} (--ignore-memory starts anyway)")


@contextlib.contextmanager
def explained(trainer: Trainer) -> Iterator[None]:
    """A context in which running out of memory becomes a UserError that says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error):
            raise
        micro, context = trainer.micro_batch, trainer.windows.context
        if micro > 1:
            lower = f"pass --micro-batch {-(-micro // 2)} (the same training in smaller parts) or --batch-size auto"
        else:
            lower = f"lower --context (now {context}), --d-model or --n-layer"
        saved = "; what was saved before is intact" if files.exists(trainer.out / checkpoint.RESUME) else ""
        where = f"in step {trainer.step + 1}, with {micro} windows of {context} at a time"
        raise UserError(f"out of memory {where}: {lower}{saved}") from error


def backward(trainer: Trainer, *batch: Tensor) -> Tensor:
    """The gradients and the mean loss of a batch. Where memory runs out, again with half the micro-batch, if
    allowed."""
    while True:
        try:
            return trainer.gradients(*batch)
        except (RuntimeError, MemoryError) as error:
            allowed = trainer.settings.adapt_micro_batch and trainer.micro_batch > 1 and trainer.team.size == 1
            if not (devices.is_out_of_memory(error) and allowed):
                raise
        # Outside of the except block, because the error refers to the tensors that did not fit.
        trainer.optimizer.zero_grad(set_to_none=True)
        if trainer.carried:
            trainer.carried.forget()
        devices.release_memory(trainer.device)
        trainer.halve_micro_batch()


def _needed(
    config: Mamba2Config, settings: Settings, device: torch.device, batch: int, context: int, team: Team | None
) -> int:
    """Bytes for this process's part of the texts and, where the model is sharded, of the weights."""
    precision, averaged = devices.pick_precision(settings.precision, device), settings.ema_decay > 0
    own = -(-context // team.stretches) if team else context
    needed = training_memory(config, batch, own, device, settings.recompute, precision, averaged, settings.optimizer)
    elsewhere = 1 - 1 / team.size if team and team.sharded else 0
    return needed - int(4 * (4 + averaged) * config.num_parameters() * elsewhere)
