"""Recipes: settings of the optimizer that belong together. Plain Python without torch, for `--help`.

    gpt3          the Mamba paper's first (arXiv:2312.00752, appendix E.2.1): GPT-3's peak rate, AdamW's usual betas
    improved      its second: five times that peak, betas (0.9, 0.95), down to 1e-5; what its Mamba models trained with
    small-corpus  ours, for a small model that reads a small corpus several times: the defaults (docs/LOG.md)
    many-epochs   ours, for a model that reads its corpus dozens of times: against learning by heart (docs/quality.md)

The paper's two are for text that is read about once. They have warm-up, a cosine, decay 0.1, clipping at 1 and no
dropout. The paper does not say where the first one's cosine ends: GPT-3's ends at a tenth of its peak. Both also ask
for RMSNorm and no biases, which every model here has.
"""

from __future__ import annotations

import math
from typing import Any

from mamba2_min.config import DROPOUTS

RECIPES = ("small-corpus", "many-epochs", "gpt3", "improved")

# GPT-3's peak learning rate by the number of parameters (arXiv:2005.14165, table 2.1).
PEAKS = {125e6: 6e-4, 350e6: 3e-4, 760e6: 2.5e-4, 1.3e9: 2e-4, 2.7e9: 1.6e-4, 6.7e9: 1.2e-4, 13e9: 1e-4, 175e9: 0.6e-4}
NO_DROPOUT = dict.fromkeys(DROPOUTS, 0.0)
_SHARED = {"weight_decay": 0.1, "beta1": 0.9, "clip": 1.0}


def peak_rate(parameters: int) -> float:
    """GPT-3's peak rate in the row of the table that is nearest in size, by ratio; below 125 million the first
    row's."""
    size = min(PEAKS, key=lambda row: abs(math.log(row / max(parameters, 1))))
    return PEAKS[size]


def recipe(name: str, parameters: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a recipe sets for a model of this many parameters: fields of Settings, and of Mamba2Config.

    Raises ValueError for an unknown name.
    """
    if name == "small-corpus":
        return {}, {}
    if name == "many-epochs":
        training = {"lr": 3e-3, "ema_decay": 0.999, "epochs": 60, "eval_every": 200, "patience": 20}
        return training, {"dropout": 0.0, "variational_dropout": 0.5, "embedding_dropout": 0.1}
    peak = peak_rate(parameters)
    if name == "gpt3":
        return {**_SHARED, "lr": peak, "min_lr": round(peak / 10, 10), "beta2": 0.999}, NO_DROPOUT
    if name == "improved":
        return {**_SHARED, "lr": round(5 * peak, 10), "min_lr": 1e-5, "beta2": 0.95}, NO_DROPOUT
    raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, not {name!r}")
