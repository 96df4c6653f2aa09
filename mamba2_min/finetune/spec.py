"""What a fine-tuning is to do: its settings, their defaults by method, and what was saved of a run that resumes.

Plain Python without torch, for `--help`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba2_min import files
from mamba2_min.errors import UserError, printable
from mamba2_min.flags import flag
from mamba2_min.settings import ACCEPTABLE, Settings, check_fields, setting

SETTINGS = "settings.json"
TASKS = ("chat", "classify")
METHODS = ("full", "lora", "state", "scratch")
POOLS = ("mean", "last", "max", "mean+max")
TOKENS = ("none", "bytes", "seen")


@dataclass(frozen=True)
class FinetuneSettings:
    """Which model learns what, and how much of it. Impossible values raise ValueError."""

    model: str = setting("", "the base: a run's folder, or a published Mamba-2", metavar="DIR", shown="required")
    data: str = setting("", "records to learn from", metavar="FILE|DIR", shown="required")
    val_data: str | None = setting(None, "records to validate with", metavar="FILE|DIR", shown="a tenth of --data")
    val_fraction: float = setting(
        0.1, "share of the records to validate with; chat: 0 learns all of them by heart", high=1
    )
    encoding: str | None = setting(None, "how files that are not UTF-8 are encoded: cp1252, ...", shown="none are read")
    task: str = setting("chat", "answer requests, or sort texts", choices=TASKS, shown="chat")
    method: str = setting(
        "lora",
        "train all weights, adapters, the first state alone, or (classify) a new model of the shape, with own words",
        choices=METHODS,
        shown="lora",
    )
    lora_r: int = setting(16, "rank of the adapters", low=1, high=1 << 16)
    lora_alpha: float = setting(32.0, "their scale is alpha / r", high=1e12)
    lora_dropout: float = setting(0.1, "dropout on what they read", high=1)
    lora_targets: str = setting("in_proj,out_proj", "projections that get one, with commas")
    lora_tokens: str = setting(
        "none",
        "whose rows of the table of words LoRA trains too: of no token, of single bytes, of all in the records",
        choices=TOKENS,
        shown="none",
    )
    text_column: str = setting("text", "classify: the column or key with the text", metavar="NAME")
    label_column: str = setting("label", "classify: the column or key with the label", metavar="NAME")
    pool: str = setting("mean+max", "classify: what of the text the head reads", choices=POOLS, shown="mean+max")
    class_weights: bool = setting(False, "classify: weigh rare labels more")
    label_smoothing: float = setting(0.0, "classify: share of the target spread over all labels", high=1)
    word_dropout: float = setting(0.0, "classify: share of the words that training takes away", high=1)
    consistency: float = setting(
        0.0,
        "classify: weight of the difference of two readings of a text (R-Drop); a step takes twice as long",
        high=1e6,
    )
    spelling: int = setting(
        0, "classify: vectors for the parts of words, added to the embeddings; 0 for none", low=0, high=1 << 20
    )
    head_dropout: float = setting(0.1, "classify: dropout on what the head reads", high=1)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.model or not self.data:
            raise ValueError("--model and --data are needed")
        if self.method == "scratch" and self.task != "classify":
            raise ValueError("--method scratch is for --task classify; train.py trains a language model from scratch")
        for name in ("lora_dropout", "head_dropout", "label_smoothing", "word_dropout"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must be below 1")
        if self.spelling == 1:
            raise ValueError("spelling must be 0, or at least 2 vectors")


# Where fine-tuning differs from training: the rates of each method, from docs/LOG.md, a weak decay, and an evaluation
# more often, for small data.
_TRAINING: dict[str, Any] = {"context": 512, "weight_decay": 0.1, "eval_every": 50, "warmup_steps": 20, "beta2": 0.99}
_RATES = {"full": 1e-3, "lora": 5e-3, "state": 2e-2, "scratch": 5e-3}
# What --help shows as the defaults of these settings.
SHOWN = {**_TRAINING, "lr": ", ".join(f"{method} {rate:g}" for method, rate in _RATES.items())}


@dataclass(frozen=True)
class FinetuneSpec:
    """`finetune` and `training`: the settings; `resume`: whether a saved run goes on."""

    finetune: FinetuneSettings
    training: Settings
    resume: bool = False

    def save(self, out: str | Path, **more: Any) -> None:
        """Writes settings.json; `more` is what a reader of the model needs, such as the chat's template."""
        values = {"finetune": dataclasses.asdict(self.finetune), "training": dataclasses.asdict(self.training), **more}
        files.save_json(files.make_folder(out) / SETTINGS, values)


def plan(
    out: str | Path,
    overrides: dict[str, Any],
    resume: bool = False,
    overwrite: bool = False,
    accept: tuple[str, ...] = (),
) -> FinetuneSpec:
    """The spec of the run in `out`: a new one, or with `resume` the saved one if there is one.

    A new run in a folder that holds one is refused unless `overwrite`; a saved one continues with what it began with.
    Raises UserError.
    """
    out = Path(out)
    begun = files.is_file(out / SETTINGS)
    if resume and begun:
        return _saved(out, overrides, accept)
    if begun and not overwrite:
        raise UserError(f"{out} already holds a run ({SETTINGS}): --resume continues it, --overwrite replaces it")
    names = {f.name for f in dataclasses.fields(FinetuneSettings)}
    try:
        finetune = FinetuneSettings(**{name: value for name, value in overrides.items() if name in names})
        training = {**_TRAINING, "lr": _RATES[finetune.method]}
        training.update({name: value for name, value in overrides.items() if name not in names})
        training["min_lr"] = min(training.get("min_lr", 1e-5), training["lr"])
        return FinetuneSpec(finetune, Settings(**training))
    except ValueError as error:
        raise UserError(str(error)) from error


def _saved(out: Path, overrides: dict[str, Any], accept: tuple[str, ...]) -> FinetuneSpec:
    spec = read(out)
    values = {**dataclasses.asdict(spec.finetune), **dataclasses.asdict(spec.training)}
    for name, value in overrides.items():
        if name in ("model", "data", "val_data"):  # they may have moved: what is in them is checked instead
            continue
        if values[name] != value and not (name in ACCEPTABLE and name in accept):
            hint = f"; add --accept {flag(name)[2:]}" if name in ACCEPTABLE else "; leave it out to resume"
            raise UserError(f"{flag(name)} was {values[name]} when the run in {out} began, and is now {value}{hint}")
    try:
        finetune = dataclasses.replace(
            spec.finetune, **{k: v for k, v in overrides.items() if k in ("model", "data", "val_data")}
        )
        training = dataclasses.replace(spec.training, **{k: v for k, v in overrides.items() if k in accept})
    except ValueError as error:
        raise UserError(str(error)) from error
    return FinetuneSpec(finetune, training, resume=True)


def read(out: str | Path) -> FinetuneSpec:
    """The spec in a folder's settings.json. Raises UserError where it is missing, damaged or of train.py."""
    path = Path(out) / SETTINGS
    saved = files.load_json(path)
    try:
        if not isinstance(saved, dict) or not all(isinstance(saved.get(k), dict) for k in ("finetune", "training")):
            raise ValueError("it is not of a fine-tuning")
        return FinetuneSpec(FinetuneSettings(**saved["finetune"]), Settings(**saved["training"]), resume=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be understood: {printable(str(error))[:300]}") from error
