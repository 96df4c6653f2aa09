"""Unigram noise: training reads some of its input tokens as other ones (arXiv:1703.02573, section 3.2).

A model that reads a small corpus many times learns its sentences by heart: the tokens before a target tell which
sentence it is. With noise no two readings are alike. The noise comes from the corpus's own distribution of tokens, so
that what is read stays text of ordinary words, and a prediction has to rest on many tokens instead of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mamba2_min.ops.autograd import widest


class UnigramNoise:
    """Replaces each input token with probability `p` by one that is drawn as often as it occurs in `tokens`.

    The end token stands: it says where a document begins. Targets are untouched.
    """

    def __init__(self, tokens: Tensor, p: float, end_id: int, device: torch.device):
        """tokens (l,): the training text, which may be empty where p is 0."""
        self.p, self.end_id = p, end_id
        counts = torch.bincount(tokens)
        counts[end_id : end_id + 1] = 0
        self._below = counts.cumsum(0).to(device, widest(device))  # (v,): how many tokens have this id or less

    def __call__(self, ids: Tensor) -> Tensor:
        """ids (b, l) -> (b, l), on the device that was given; nothing is drawn where p is 0."""
        if not self.p:
            return ids
        place = torch.rand(ids.shape, device=ids.device, dtype=self._below.dtype) * self._below[-1]
        drawn = torch.searchsorted(self._below, place, right=True).clamp(max=len(self._below) - 1)
        replaced = (torch.rand(ids.shape, device=ids.device) < self.p) & (ids != self.end_id)
        return torch.where(replaced, drawn, ids)
