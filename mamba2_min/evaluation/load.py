"""A run's model and tokenizer, whichever of the two architectures it is of."""

from __future__ import annotations

from pathlib import Path

import torch

from mamba2_min import files
from mamba2_min.checkpoints import checkpoint
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError
from mamba2_min.inference import stepping  # noqa: F401  the fast forms of `Mamba2LM.step`
from mamba2_min.inference.decoding import lay_out_columns
from mamba2_min.models.base import LanguageModel
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.models.transformer import TransformerLM


def load_run(folder: str | Path, device: torch.device) -> tuple[LanguageModel, WordTokenizer]:
    """The model of a run's folder, in evaluation mode on `device`, and its tokenizer. Raises UserError."""
    path = Path(folder) / checkpoint.CONFIG
    config = files.load_json(path) if files.is_file(path) else None
    is_transformer = isinstance(config, dict) and config.get("architecture") == "transformer"
    model: LanguageModel = (TransformerLM if is_transformer else Mamba2LM).from_pretrained(folder)
    tokenizer = WordTokenizer.load(Path(folder) / checkpoint.TOKENIZER)
    if len(tokenizer) != model.config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}")
    model = model.to(device).eval()
    return lay_out_columns(model) if isinstance(model, Mamba2LM) else model, tokenizer
