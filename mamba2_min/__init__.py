"""Mamba-2 from scratch: a state-space language model small enough to read in an evening.

The names below are the whole interface. Each is imported when it is first used, so that `import mamba2_min`, and the
`--help` of every command, stays free of torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mamba2_min import ssd
    from mamba2_min.config import Mamba2Config
    from mamba2_min.data.corpus import load_corpus
    from mamba2_min.data.tokenizer import WordTokenizer
    from mamba2_min.errors import UserError
    from mamba2_min.evaluation.perplexity import evaluate
    from mamba2_min.inference.completer import Completer
    from mamba2_min.inference.quantize import quantize
    from mamba2_min.models.mamba2 import Mamba2LM, State
    from mamba2_min.models.transformer import TransformerConfig, TransformerLM
    from mamba2_min.ops.sampling import Sampler
    from mamba2_min.settings import Settings
    from mamba2_min.training.trainer import Trainer

# Read when torch is first imported. Threads that wait for each other in a loop take the cores that the others need: on
# two cores that are not all ours, a step of training took 0.8 to 5 s, and takes 0.3 s where they sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_MODULE_OF = {
    "Completer": "inference.completer",
    "Mamba2Config": "config",
    "Mamba2LM": "models.mamba2",
    "Sampler": "ops.sampling",
    "Settings": "settings",
    "State": "models.mamba2",
    "Trainer": "training.trainer",
    "TransformerConfig": "models.transformer",
    "TransformerLM": "models.transformer",
    "UserError": "errors",
    "WordTokenizer": "data.tokenizer",
    "evaluate": "evaluation.perplexity",
    "load_corpus": "data.corpus",
    "quantize": "inference.quantize",
    "ssd": "ssd",
}

__all__ = [
    "Completer",
    "Mamba2Config",
    "Mamba2LM",
    "Sampler",
    "Settings",
    "State",
    "Trainer",
    "TransformerConfig",
    "TransformerLM",
    "UserError",
    "WordTokenizer",
    "evaluate",
    "load_corpus",
    "quantize",
    "ssd",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mamba2_min' has no attribute {name!r}")
    module = importlib.import_module(f"mamba2_min.{_MODULE_OF[name]}")
    if name in ("Mamba2LM", "State"):
        importlib.import_module("mamba2_min.inference.stepping")  # registers the fast forms of `Mamba2LM.step`
    value = module if name == "ssd" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
