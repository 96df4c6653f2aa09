"""How a training is to go: its settings, the presets of shapes, and what may change when a run goes on.

Plain Python without torch, so that `train.py --help` can show the true defaults at once.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

_LARGEST = 2**31 - 1  # of every whole number but the seed: beyond it stands a slip, or a file that means harm


@dataclass(frozen=True)
class Settings:
    """How to train. Unknown names raise TypeError, impossible values ValueError.

    The optimiser's defaults are for what this project is for, a small model that sees a small corpus several times: a
    strong decay and a long memory of the gradients' size are worth 0.08 bits per byte on a thousand stories over the
    papers' recipe (lr 3e-3, weight_decay 0.1, beta2 0.95), which is meant for text that is seen once (docs/LOG.md).
    """

    context: int = 256  # tokens a window; what is remembered from before a window is not trained
    batch_size: int = 8  # windows a step
    micro_batch: int = 0  # windows at a time; their gradients add up to those of the whole batch; 0: all at once
    adapt_micro_batch: bool = False  # where memory runs out: halve micro_batch and go on, instead of ending
    max_steps: int = 0  # 0: as many as make 10 passes over the training part, at least 200
    max_minutes: float = 0.0  # 0: no limit. The learning rate then also falls with the clock
    eval_every: int = 100  # steps
    save_every: int = 100  # steps; also at every evaluation that is the best, at the end and on a signal
    patience: int = 5  # evaluations without a better one, then it stops; 0: never
    min_delta: float = 0.0  # nats by which the loss must fall to count as better
    lr: float = 5e-3  # the peak
    min_lr: float = 1e-5
    warmup_steps: int = 100
    weight_decay: float = 1.0  # on matrices only
    beta1: float = 0.9
    beta2: float = 0.99
    clip: float = 1.0  # largest norm of the gradient; 0: none
    seed: int = 0
    precision: str = "auto"
    compile: bool = False  # the blocks by torch.compile; where that fails the run goes on without it, and says so
    recompute: bool = False  # each block again in the backward pass: less memory, a third more work
    deterministic: bool = False  # on CUDA only: the same bits every time, at some cost; a CPU gives them anyway
    log_every: int = 10  # steps a training line of metrics.jsonl is the mean of
    spike: float = 10.0  # usual deviations above the recent losses from which a step is skipped (guards.py); 0: never
    max_bad_steps: int = 10  # skipped steps in a row, then it stops

    def __post_init__(self) -> None:
        for name, least in (
            ("context", 1),
            ("batch_size", 1),
            ("micro_batch", 0),
            ("max_steps", 0),
            ("eval_every", 1),
            ("save_every", 1),
            ("patience", 0),
            ("warmup_steps", 0),
            ("seed", 0),
            ("log_every", 1),
            ("max_bad_steps", 1),
        ):
            self._check_whole(name, least, 2**63 - 1 if name == "seed" else _LARGEST)
        for name in ("max_minutes", "min_delta", "lr", "min_lr", "weight_decay", "beta1", "beta2", "clip", "spike"):
            self._check_number(name)
        for name in ("adapt_micro_batch", "compile", "recompute", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)!r}")
        if self.lr <= 0:
            raise ValueError("lr must be above 0")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr must not exceed lr, and {self.min_lr} is above {self.lr}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {str(self.precision)[:40]!r}")

    def _check_whole(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{name} must be a whole number from {least} to {most}, not {str(value)[:40]}")

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1e12:
            raise ValueError(f"{name} must be a number from 0 to 1e12, not {str(value)[:40]}")


PRECISIONS = ("auto", "float32", "bf16")

# What may differ when a run goes on, where the user accepts it by name: when to stop, look and save, and how the work
# of a step is divided. None of them changes what a step is meant to compute.
ACCEPTABLE = (
    "max_steps",
    "max_minutes",
    "eval_every",
    "save_every",
    "patience",
    "min_delta",
    "log_every",
    "spike",
    "max_bad_steps",
    "micro_batch",
    "adapt_micro_batch",
    "compile",
    "recompute",
)

# Shapes to start from: about 1, 4 and 135 million parameters with a vocabulary of 8,192.
PRESETS = {
    "tiny": {"d_model": 128, "n_layer": 3, "d_state": 32, "headdim": 32, "dropout": 0.1},
    "small": {"d_model": 256, "n_layer": 4, "dropout": 0.1},
    "base": {"d_model": 768, "n_layer": 24, "d_state": 128, "chunk_size": 128},
}
DATA = {
    "data": "training_data",
    "val_data": None,
    "vocab_size": 8192,
    "min_count": 2,
    "pattern": "words",
    "val_fraction": 0.1,
}


def check_data(data: dict[str, Any]) -> None:
    """Raises ValueError unless `data` has the names of DATA, each with a value of its kind."""
    kinds = {
        "data": (str,),
        "val_data": (str, type(None)),
        "vocab_size": (int, type(None)),
        "min_count": (int,),
        "pattern": (str,),
        "val_fraction": (int, float),
    }
    if data.keys() != DATA.keys():
        raise ValueError(f"its data settings are not {', '.join(DATA)}")
    for name, value in data.items():
        if type(value) not in kinds[name]:
            raise ValueError(f"{name} cannot be {str(value)[:40]!r}")


def defaults(cls: type) -> dict[str, Any]:
    """The default of every field of a dataclass that has one."""
    return {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}


def learning_rate(progress: float, step: int, settings: Settings) -> float:
    """A cosine from lr to min_lr as `progress` goes from 0 to 1, times a linear warm-up over warmup_steps."""
    cosine = settings.min_lr + (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * min(progress, 1))) / 2
    return cosine * min(1.0, (step + 1) / max(settings.warmup_steps, 1))
