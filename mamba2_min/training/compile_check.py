"""Compiling a model, and comparing it with the uncompiled one: a compiler's bug must not cost a run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mamba2_min import devices
from mamba2_min.models.base import LanguageModel

LOSS_TOLERANCE, NORM_TOLERANCE = 0.02, 0.1  # relative; dropout draws other numbers in a compiled model


def compile_checked(model: LanguageModel, backward: Callable[[], Tensor], device: torch.device) -> str:
    """Compiles the model's blocks if they then compute the same. Returns "", or why the model stays uncompiled.

    `backward()` computes a batch's loss and adds its gradients. It runs twice, without and with the compiler, and the
    losses and the norms of the gradients are compared. Gradients are zero afterwards, and the random generators are in
    the state that they were in.
    """
    measured, reason = [], ""
    for compiled in (False, True):
        model.compile_blocks(compiled)
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                total = backward()
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            measured.append((float(total), float(norm)))
        except Exception as error:
            if devices.is_out_of_memory(error):
                reason = "memory ran out before it could be compared"
            elif compiled:
                reason = f"the compiler failed: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"
            else:
                raise
        model.zero_grad(set_to_none=True)
        devices.release_memory(device)
    if len(measured) == 2:
        (loss, size), (compiled_loss, compiled_size) = measured
        same_loss = abs(compiled_loss - loss) <= LOSS_TOLERANCE * abs(loss)
        same_norm = abs(compiled_size - size) <= NORM_TOLERANCE * size
        if not (same_loss and same_norm):  # also where one of them is NaN
            reason = (
                f"compiled, the loss is {compiled_loss:.4g} and the gradient norm {compiled_size:.4g}; "
                f"they should be {loss:.4g} and {size:.4g}"
            )
    if reason:
        model.compile_blocks(False)
    return reason
