"""The convolution and the loss by calls of their modules, for modules that are not plain (bypass.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mamba2_min.ops.autograd import is_traced
from mamba2_min.ops.loss import check_targets, cross_entropy, reduced
from mamba2_min.ops.seq_idx import document_numbers

_SLICE_ELEMENTS = 1 << 22  # of the logits that exist at a time


def conv_silu_by_module(
    conv1d: nn.Module, u: Tensor, width: int, state: Tensor | None = None, seq_idx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`causal_conv_silu` of `width` taps by a call of `conv1d`: (b, c, width - 1 + l) -> (b, c, l).

    u (b, l, c), state (b, width - 1, c), seq_idx (b, l). Each document is laid out with as many zeros before it as a
    tap reaches back, so that one call serves all of them and none sees another one.
    Returns (b, l, c) and the last inputs. Raises ValueError where the module returns another shape.
    """
    (b, l, c), back = u.shape, width - 1
    state = u.new_zeros(b, back, c) if state is None else state.to(u.dtype)
    if seq_idx is None:
        inputs = torch.cat([state, u], dim=1)
        return F.silu(_convolved(conv1d, inputs, back).to(u.dtype)), inputs[:, inputs.shape[1] - back :].clone()
    document = document_numbers(seq_idx, b, l, u.device)
    place = torch.arange(l, device=u.device) + back * (document + 1)  # (b, l)
    # Zeros for as many documents as a row has; for as many as it may have, where nobody can look.
    most = l - 1 if is_traced() or document.is_meta or not b else int(document.max())
    zeros = u.new_zeros(b, l + back * most, c)
    inputs = torch.cat([state, zeros], dim=1).scatter(1, _of_channels(place, c), u)
    y = _convolved(conv1d, inputs, back).to(u.dtype).gather(1, _of_channels(place - back, c))
    last = place[:, -1:] - torch.arange(back - 1, -1, -1, device=u.device)  # (b, width - 1)
    return F.silu(y), inputs.gather(1, _of_channels(last, c))


def _of_channels(index: Tensor, c: int) -> Tensor:
    return index[..., None].expand(-1, -1, c)


def _convolved(conv1d: nn.Module, inputs: Tensor, back: int) -> Tensor:
    """(b, back + l, c) -> (b, l, c)"""
    b, length, c = inputs.shape
    y = conv1d(inputs.transpose(1, 2))
    if y.shape != (b, c, length - back):
        raise ValueError(f"conv1d must return {(b, c, length - back)} for {(b, c, length)}, not {tuple(y.shape)}")
    return y.transpose(1, 2)


def cross_entropy_by_module(
    head: nn.Module, hidden: Tensor, targets: Tensor, vocab_size: int, reduction: str = "mean"
) -> Tensor:
    """The cross-entropy in nats of `head(hidden)`, called on slices of positions, as `linear_cross_entropy` has it.

    hidden (b, l, d), targets (b, l) with -100 where a position does not count; logits from vocab_size on get
    no probability. No more than one slice's logits exist at a time: the backward pass calls `head` on them again.
    """
    check_targets(hidden, targets, vocab_size, reduction)
    if targets.dim() != 2:
        raise ValueError(f"targets must be (b, l), not {tuple(targets.shape)}")

    def total(h: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy(head(h)[..., :vocab_size], wanted)

    positions = max(1, _SLICE_ELEMENTS // max(1, len(targets) * vocab_size))
    parts = list(zip(hidden.split(positions, 1), targets.split(positions, 1), strict=True))
    again = len(parts) > 1 and torch.is_grad_enabled() and not is_traced()
    sums = [checkpoint(total, *part, use_reentrant=False) if again else total(*part) for part in parts]
    return reduced(torch.stack(sums).sum(), targets, reduction)
