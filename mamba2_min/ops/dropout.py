"""Two dropouts for small corpora: of words, and of channels. Both hold over time, as those of AWD-LSTM do
(arXiv:1708.02182, sections 4.2 and 4.3). A model that drops other numbers at each token can average them away."""

from __future__ import annotations

import torch
from torch import Tensor


def embedding_dropout(x: Tensor, ids: Tensor, vocab_size: int, p: float) -> Tensor:
    """Drops words: each word of the vocabulary with probability p, wherever it stands in the batch.

    x (b, l, d): what the embedding gave for `ids` (b, l). A word that is kept is scaled by 1 / (1 - p).
    """
    if not p:
        return x
    kept = torch.rand(vocab_size, device=x.device) >= p
    return x * (kept[ids] / (1 - p)).to(x.dtype)[..., None]


def variational_dropout(x: Tensor, p: float) -> Tensor:
    """Drops channels: each channel of each row with probability p, at all of its tokens (arXiv:1512.05287).

    x (b, l, d). A channel that is kept is scaled by 1 / (1 - p).
    """
    if not p:
        return x
    kept = torch.rand(x.shape[0], 1, x.shape[2], device=x.device) >= p
    return x * (kept / (1 - p)).to(x.dtype)
