"""Documents packed in one row: `seq_idx` (b, l) names the document of each token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def document_numbers(seq_idx: Tensor | None, b: int, l: int, device: torch.device) -> Tensor:
    """Numbers the documents of each row 0, 1, 2, ... from left to right, by where seq_idx changes: (b, l) int64.

    An initial state belongs to document 0. Without seq_idx there is one document.
    """
    if seq_idx is None:
        return torch.zeros(b, l, dtype=torch.int64, device=device)
    return F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(1), (1, 0))
