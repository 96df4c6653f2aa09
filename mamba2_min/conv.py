"""The short causal convolution of a Mamba block: each channel sees its own last few values, then SiLU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba2_min.ssd import document_numbers


def causal_conv_silu(
    u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None = None, seq_idx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """silu(bias + sum_k weight[:, k] u_{t - (K - 1) + k}): a depthwise convolution of K taps that never looks ahead.

    u (b, l, c), weight (c, K), bias (c,) or None; state (b, K - 1, c), the inputs before the first, zeros if None;
    seq_idx (b, l): a document ends where it changes, and a tap that would reach into another one reads zero. The state
    belongs to the first document.
    Returns (b, l, c) in u's dtype, and the state after the last token. (Mamba-2 paper, arXiv:2405.21060, section 7.1.)
    """
    K = weight.shape[1]
    if state is None:
        state = u.new_zeros(u.shape[0], K - 1, u.shape[2])
    padded = torch.cat([state.to(u.dtype), u], dim=1)  # (b, K - 1 + l, c)
    new_state = padded[:, padded.shape[1] - (K - 1) :].clone()  # a view would keep all of `padded` alive
    if seq_idx is None and u.device.type == "cpu":
        # As a picture of height 1 whose channels lie last in memory, it needs no copy to convolve along the width.
        picture = padded[:, None].permute(0, 3, 1, 2)  # (b, c, 1, K - 1 + l)
        y = F.conv2d(picture, weight[:, None, None].to(u.dtype), _cast(bias, u.dtype), groups=u.shape[2])
        return F.silu(y.permute(0, 2, 3, 1)[:, 0]), new_state

    # Tap by tap: taps can be masked, and on a GPU a compiler makes one kernel of them.
    l = u.shape[1]
    y = 0 if bias is None else bias.to(u.dtype)
    if seq_idx is not None:
        document = document_numbers(seq_idx, *u.shape[:2], u.device)
        documents = F.pad(document, (K - 1, 0))
        same = (documents[:, documents.shape[1] - (K - 1) :] == document[:, -1:])[..., None]
        new_state = torch.where(same, new_state, 0)
    for k in range(K):
        tap = padded[:, k : k + l]
        if seq_idx is not None:
            tap = torch.where((documents[:, k : k + l] == document)[..., None], tap, 0)
        y = y + tap * weight[:, k].to(u.dtype)
    return F.silu(y), new_state


def causal_conv_silu_step(u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of `causal_conv_silu`: u (b, c), state (b, K - 1, c) -> y (b, c), the next state."""
    window = torch.cat([state, u[:, None]], dim=1)  # (b, K, c)
    y = (window * weight.t()).sum(1)
    return F.silu(y if bias is None else y + bias), window[:, 1:]


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)
