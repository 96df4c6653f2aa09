"""Cross-entropy of a language model: its definition, and the same without ever holding the (tokens, vocabulary) logits.

`linear_cross_entropy` is the head's projection and the loss in one function that works through the tokens in slices.
Each slice's logits become its loss and its share of the gradients, and are gone before the next slice begins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba2_min.ops import gpu_kernels
from mamba2_min.ops.autograd import handwritten_backward, is_rounded, is_traced, widen

IGNORE = -100  # a target that does not count

# Elements of one slice's logits: enough for the matrix products to be efficient, little enough for a CPU's cache.
_SLICE_ELEMENTS = 1 << 22
_SLICE_ELEMENTS_ROUNDED = 1 << 23  # where a CPU rounds operands to bf16: the weight too, again for each slice
_SLICE_ELEMENTS_GPU = 1 << 27

# The logarithm of a probability that float32 still holds with all its digits; a smaller one is computed on its own.
_NEARLY_LOST = -60.0

_ADDMM_WIDENS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The definition: the sum of -log softmax(logits)[target] over the targets that count, in nats, a scalar.

    logits (..., v), targets (...) int64, IGNORE (-100) where a position does not count: nothing that is there, not
    even NaN, reaches the sum or a gradient. Computed in float32 or wider.
    """
    logits = widen(logits).masked_fill((targets == IGNORE)[..., None], 0)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int | None = None,
    reduction: str = "mean",
    compiled: bool = False,
) -> Tensor:
    """`cross_entropy` of the logits hidden weight^T, with no more than one slice of them at a time.

    hidden (..., d), weight (v, d), targets (...) int64; rows of `weight` from vocab_size on are padding and get no
    probability. reduction "mean" is over the targets that count (0 where none does), "sum" their sum; the result is
    float32 or wider. Under autocast the products run in its dtype. `compiled` has the softmax of a GPU compiled.
    Raises ValueError for targets outside the vocabulary. (On a GPU a look would wait for the device: there it is the
    GPU's own assertion, or an infinite loss.)
    """
    size = vocab_size or weight.shape[0]
    check_targets(hidden, targets, size, reduction)
    if is_traced():
        return reduced(cross_entropy(F.linear(hidden, weight[:size]), targets), targets, reduction)
    # What a target weighs. It scales rows of `hidden`, never the logits.
    weights = reduced((targets != IGNORE).to(torch.promote_types(hidden.dtype, torch.float32)), targets, reduction)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    flat = hidden.reshape(-1, hidden.shape[-1])
    return _LinearCrossEntropy.apply(flat, weight, targets.reshape(-1), weights.reshape(-1), size, dtype, compiled)


def reduced(total: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """A sum over targets as it is, or for "mean" divided by how many of them count."""
    return total if reduction == "sum" else total / (targets != IGNORE).sum().clamp_min(1)


def check_targets(hidden: Tensor, targets: Tensor, vocab_size: int, reduction: str) -> None:
    """Raises ValueError where these are not what `linear_cross_entropy` asks for."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", not {reduction!r}')
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(f"targets must be {tuple(hidden.shape[:-1])}, as hidden is, not {tuple(targets.shape)}")
    if targets.device.type != "cpu" or is_traced():
        return
    if ((targets != IGNORE) & ((targets < 0) | (targets >= vocab_size))).any():
        raise ValueError(f"targets must lie in [0, {vocab_size}), the vocabulary, or be {IGNORE}")


def slice_elements(device: torch.device) -> int:
    """How many logits are held at a time on a device, at the present precision of matrix products."""
    if device.type != "cpu":
        return _SLICE_ELEMENTS_GPU
    return _SLICE_ELEMENTS_ROUNDED if is_rounded() else _SLICE_ELEMENTS


class _LinearCrossEntropy(torch.autograd.Function):
    """The weighted sum of losses; the gradients are computed in the forward pass, while the softmax is at hand."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, vocab_size, dtype, compiled):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        # A GPU multiplies matrices of round sizes at several times the speed of others.
        padded = len(weight) + (-len(weight) % 64 if weight.is_cuda else 0)
        w = F.pad(weight.to(dtype), (0, 0, 0, padded - len(weight))) if padded > len(weight) else weight.to(dtype)
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = torch.zeros_like(w, dtype=torch.promote_types(dtype, torch.float32)) if need_weight else None
        total = torch.zeros((), dtype=weights.dtype, device=hidden.device)
        most = max(1, slice_elements(hidden.device) // len(w))
        rows = -(-len(hidden) // -(-len(hidden) // most)) if len(hidden) else 1  # slices of one size
        # One buffer for all slices' logits, their softmax and their gradient: new memory costs a CPU as much as the
        # arithmetic.
        buffer = torch.empty(rows, len(w), dtype=dtype, device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            index, weigh = targets[part, None], weights[part, None]
            ignored = index == IGNORE
            h = hidden[part].to(dtype).masked_fill(ignored, 0)  # 0 times NaN would be NaN
            index = index.masked_fill(ignored, 0)
            logits = torch.mm(h, w.t(), out=buffer[: len(h)])
            if logits.device.type == "cpu":
                loss, dlogits = _on_cpu(logits.to(total.dtype), h, w, index, weigh, vocab_size)
            elif gpu_kernels.takes(logits):
                from mamba2_min.ops.loss_kernels import softmax_gradient

                loss, dlogits = (softmax_gradient(logits, index, vocab_size) * weigh).sum(), logits
            else:
                loss, dlogits = (_compiled_on_gpu if compiled else _on_gpu)(logits, index, weigh, vocab_size)
            total -= loss
            dlogits = dlogits.to(dtype)
            if dhidden is not None:
                dhidden[part] = (dlogits @ w) * weigh
            if dweight is not None:
                h = (h * weigh).to(dtype)
                if dtype == dweight.dtype:
                    dweight.addmm_(dlogits.t(), h)
                elif hidden.is_cuda and _ADDMM_WIDENS:
                    torch.addmm(dweight, dlogits.t(), h, out_dtype=dweight.dtype, out=dweight)
                else:
                    dweight += dlogits.t() @ h
        ctx.save_for_backward(dhidden, None if dweight is None else dweight[: len(weight)].to(weight.dtype))
        return total

    @staticmethod
    @handwritten_backward
    def backward(ctx, dtotal):
        gradients = ctx.saved_tensors
        if not (dtotal.device.type == "cpu" and dtotal == 1):  # as it is where the loss is what backward() is called on
            gradients = [None if t is None else t * dtotal.to(t.dtype) for t in gradients]
        elif torch._C._autograd._get_current_graph_task_keep_graph():  # otherwise handed on: nobody else holds them
            gradients = [None if t is None else t.clone() for t in gradients]
        return *gradients, None, None, None, None, None


def _on_cpu(
    logits: Tensor, h: Tensor, w: Tensor, index: Tensor, weigh: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the log-probabilities at `index` (rows, 1), and softmax less one there, in logits' place."""
    logits[:, vocab_size:] = -torch.inf  # padding is in the products to make their sizes round, and nowhere else
    p = torch.softmax(logits, dim=-1, out=logits)  # half of the time of log_softmax and exp
    logp = p.gather(1, index).log()
    lost = logp[:, 0] < _NEARLY_LOST
    if lost.any():
        again = (h[lost] @ w[:vocab_size].t()).to(logp.dtype)
        logp[lost] = F.log_softmax(again, dim=-1).gather(1, index[lost])
    return (logp * weigh).sum(), p.scatter_add_(1, index, torch.full_like(weigh, -1))


def _on_gpu(logits: Tensor, index: Tensor, weigh: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The same for a compiler, in two passes over the logits; the softmax is float32, the result in logits' dtype."""
    token = torch.arange(logits.shape[1], device=logits.device)
    wide = logits.to(weigh.dtype).masked_fill(token >= vocab_size, -torch.inf)
    total = wide.logsumexp(dim=-1, keepdim=True)
    p = (wide - total).exp()
    return ((wide.gather(1, index) - total) * weigh).sum(), (p - (token == index).to(p.dtype)).to(logits.dtype)


def _compiled_on_gpu(*args: Any) -> tuple[Tensor, Tensor]:
    return _compiled()(*args)


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_on_gpu, dynamic=False)
