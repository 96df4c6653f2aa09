"""A fine-tuned model for writing: the base with its adapter merged in, and the template that it learnt with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mamba2_min import files
from mamba2_min.checkpoints import checkpoint
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError
from mamba2_min.finetune import adapter
from mamba2_min.finetune.conversations import TEMPLATES, ChatTemplate, template_for
from mamba2_min.finetune.lora import merge_lora
from mamba2_min.finetune.spec import SETTINGS
from mamba2_min.inference.completer import Completer
from mamba2_min.inference.decoding import lay_out_columns
from mamba2_min.models.mamba2 import Mamba2LM


def open_run(
    folder: str | Path, adapter_folder: str | Path | None, chat: bool, device: torch.device, weights: str | None
) -> tuple[Completer, ChatTemplate | None]:
    """The completer of a run with its adapter, and for a chat the template. Raises UserError."""
    completer = load_completer(folder, adapter_folder, device, weights)
    return completer, template_of(adapter_folder or folder, completer.tokenizer) if chat else None


def load_completer(
    folder: str | Path, adapter_folder: str | Path | None, device: torch.device, weights: str | None = None
) -> Completer:
    """The completer of a run, with an adapter merged into it: a token then costs what it costs the base.

    Raises UserError for an adapter of another base, and for narrow weights beside an adapter.
    """
    if adapter_folder is None:
        return Completer.load(folder, device, weights)
    if weights is not None:
        raise UserError("--quantize needs a merged model: python -m mamba2_min.merge makes one")
    model = adapter.load_adapter(adapter_folder, Mamba2LM.from_pretrained(folder))
    merge_lora(model)
    model = lay_out_columns(model.to(device))
    return Completer(model, checkpoint.load_tokenizer(folder, model.config.vocab_size))


def template_of(folder: str | Path, tokenizer: WordTokenizer) -> ChatTemplate:
    """The template that a fine-tuning wrote down, or the one that fits the tokenizer. Raises UserError for another."""
    return saved_template(folder) or TEMPLATES[template_for(tokenizer)]


def saved_template(folder: str | Path) -> ChatTemplate | None:
    """The template that a fine-tuning wrote down; None in any other run. Raises UserError for an unknown one."""
    path = Path(folder) / SETTINGS
    settings: Any = files.load_json(path) if files.is_file(path) else {}
    about = settings.get("chat") if isinstance(settings, dict) else None
    name = about.get("template") if isinstance(about, dict) else about
    if name is None:
        return None
    if not isinstance(name, str) or name not in TEMPLATES:
        raise UserError(f"{path} names the chat template {str(name)[:40]!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
