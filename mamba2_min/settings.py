"""How to train and on what: the settings of a run, presets of the model's shape, what may change when a run resumes.

Plain Python without torch: `train.py --help` makes its flags from the fields' metadata (flags.py), at once.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mamba2_min import validate
from mamba2_min.config import DROPOUTS
from mamba2_min.recipes import RECIPES

LARGEST = 2**31 - 1  # of every integer except the seed: a larger one is a typing error, or a malicious file
LARGEST_FLOAT = 1e12
OPTIMIZERS = ("adamw", "muon")
PRECISIONS = ("auto", "float32", "bf16")
VALIDATE = ("documents", "carried")
PATTERNS = ("words", "llama3", "whitespace")  # where a tokenizer cuts text: data/patterns.py


def setting(
    default: Any, help: str = "", low: float = 0, high: float | None = None, group: str = "training", **more: Any
) -> Any:
    """A field of a settings class. `help` makes it a flag of train.py, in `group`; numbers must lie in [low, high].

    In `more`: `choices`; `metavar`; `shown`, what the help prints in place of the default; `auto`, the field that the
    word "auto" switches on; `acceptable`, see ACCEPTABLE.
    """
    if high is None:
        high = LARGEST_FLOAT if isinstance(default, float) else LARGEST
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "group": group, **more})


@dataclass(frozen=True)
class Settings:
    """How to train. Unknown names raise TypeError, impossible values ValueError.

    The optimizer's defaults are for a small model that reads a small corpus several times: on a thousand stories,
    strong weight decay and a long average of squared gradients gain 0.08 bits per byte over the papers' recipe (lr
    3e-3, weight_decay 0.1, beta2 0.95), which is meant for text that is read once (docs/LOG.md).
    """

    recipe: str = setting(  # what it sets stands in the other fields; the name is kept to tell one run from another
        "small-corpus",
        "settings that go together; flags beside it win",
        choices=RECIPES,
        shown="small-corpus",
        group="recipe",
    )
    context: int = setting(256, "tokens per window", low=1)  # each window starts with an empty state
    batch_size: int = setting(8, "windows per step, or auto", low=1, auto="adapt_micro_batch")
    micro_batch: int = setting(
        0,
        "windows at a time; their gradients add up to the batch's; or auto: what memory allows",
        shown="all",
        auto="adapt_micro_batch",
        acceptable=True,
    )
    adapt_micro_batch: bool = setting(False, acceptable=True)  # out of memory: halve micro_batch instead of ending
    epochs: int = setting(10, "passes over the data, unless --max-steps is given", low=1, acceptable=True)
    max_steps: int = setting(0, "step limit", shown="that of --epochs, at least 200", acceptable=True)
    max_minutes: float = setting(  # the learning rate then also falls with the clock
        0.0, "time limit", shown="none", acceptable=True
    )
    eval_every: int = setting(100, "steps between validations", low=1, acceptable=True)
    save_every: int = setting(  # it also saves at every best validation, at the end and on a signal
        100, "steps between saves", low=1, acceptable=True
    )
    patience: int = setting(5, "validations without a better one, then stop; 0: never", acceptable=True)
    min_delta: float = setting(0.0, "nats that count as better", acceptable=True)
    validate: str = setting(
        "documents",
        "each document from an empty state, as it is completed, or the state carried through all of them",
        choices=VALIDATE,
    )
    carry_state: bool | None = setting(  # see Streams; None, in older runs: on where most of the text is long documents
        False, "each window goes on with the state of the one before it"
    )
    ema_decay: float = setting(  # see Average
        0.0, "of the average of weights that is validated and kept, such as 0.998; 0: none", high=1
    )
    input_noise: float = setting(  # see UnigramNoise
        0.0, "share of the input tokens that training reads as other ones, against learning by heart", high=1
    )
    optimizer: str = setting("adamw", "of the layers' matrices; all else has adamw", choices=OPTIMIZERS)
    lr: float = setting(5e-3, "peak learning rate", acceptable=True)
    min_lr: float = setting(1e-5, "final learning rate", acceptable=True)
    warmup_steps: int = setting(100, "steps of linear warm-up")
    weight_decay: float = setting(1.0, "on matrices only")
    beta1: float = setting(0.9, "AdamW's mean of gradients", high=1)
    beta2: float = setting(0.99, "AdamW's mean of their squares", high=1)
    clip: float = setting(1.0, "largest gradient norm; 0: none")
    seed: int = setting(0, "of the weights, the order of data and dropout", high=2**63 - 1)
    precision: str = setting(
        "auto", "of matrix products", choices=PRECISIONS, shown="auto: the faster", group="machine"
    )
    compile: bool = setting(  # where that fails, the run goes on without it and says so
        False,
        "torch.compile the blocks: faster, after some time; on a GPU --graph gains more",
        group="machine",
        acceptable=True,
    )
    graph: bool = setting(  # where that fails, the run goes on without it and says so
        False, "launch a step's kernels as one CUDA graph: faster on a GPU, at once", group="machine", acceptable=True
    )
    recompute: bool = setting(
        False, "compute blocks again in the backward pass: less memory", group="machine", acceptable=True
    )
    deterministic: bool = setting(  # a CPU gives the same bits anyway
        False, "the same bits on CUDA every time; slower", group="machine"
    )
    log_every: int = setting(10, "steps per training line of metrics.jsonl", low=1, acceptable=True)
    spike: float = setting(  # see guards.py
        10.0, "skip a step whose loss is this many deviations above recent ones; 0: never", acceptable=True
    )
    max_bad_steps: int = setting(10, "skipped steps in a row, then stop", low=1, acceptable=True)
    rules: int = setting(2, low=1, high=2)  # how micro-batches are added up; 1 is how the first version did it

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("beta1", "beta2", "ema_decay"):
            if getattr(self, name) == 1:
                raise ValueError(f"{name} must be below 1")
        if self.lr == 0:
            raise ValueError("lr must be above 0")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr must not exceed lr, and {self.min_lr} is above {self.lr}")


# What may differ when a run resumes, if the user accepts it by name: when to stop, validate and save, how the work of a
# step is divided, and the learning rate, because a run whose loss jumps needs a lower one.
ACCEPTABLE = tuple(field.name for field in dataclasses.fields(Settings) if field.metadata.get("acceptable"))


# What a run began with that does not name a setting, because it is older: the others are the defaults of today.
BEFORE: dict[str, Any] = {
    "validate": "carried",
    "carry_state": False,
    "ema_decay": 0.0,
    "optimizer": "adamw",
    "rules": 1,
}
BEFORE_OF_DATA = {"rules": 1}


@dataclass(frozen=True)
class DataSettings:
    """Where the documents are and how the vocabulary is made. Impossible values raise ValueError."""

    data: str = setting(
        "training_data",
        "documents to train on: .md, .txt, and records in .jsonl, .json, .csv, .tsv",
        metavar="DIR|FILE",
    )
    val_data: str | None = setting(None, "documents to validate with", metavar="DIR|FILE", shown="a tenth of --data")
    val_fraction: float = setting(0.1, "share of the text to validate with", high=1)
    init_from: str | None = setting(
        None,
        "continue the training of this model on other documents, with its tokenizer and shape",
        metavar="RUN|FOLDER",
        shown="a new model",
        group="start",
    )
    encoding: str | None = setting(None, "how files that are not UTF-8 are encoded: cp1252, ...", shown="none are read")
    drop_repeats: bool = setting(False, "leave out paragraphs that stand in three documents or more")
    max_documents_bytes: int | None = setting(
        None, "train on a part of the documents, of so many bytes", low=1, high=2**63 - 1, shown="all"
    )
    vocab_size: int | None = setting(8192, "tokens in the vocabulary, at most", low=1)
    min_count: int = setting(2, "a word seen less often becomes its bytes", low=1)
    pattern: str = setting("llama3", "where text is cut; whitespace: the WikiText convention", choices=PATTERNS)
    rules: int = setting(2, low=1, high=2)  # how documents are read and split; 1 is how the first version did it

    def __post_init__(self) -> None:
        check_fields(self)
        if self.init_from == "":
            raise ValueError("init_from must name a folder")


def check_fields(instance: Any) -> None:
    """Raises ValueError unless each field of a dataclass has a value of its type, as its metadata allows it.

    Metadata: `low` and `high` bound a number, `choices` lists strings. A field of type "… | None" may be None.
    """
    for field in dataclasses.fields(instance):
        name, value, about, kind = field.name, getattr(instance, field.name), field.metadata, kind_of(field)
        if value is None and "None" in str(field.type):
            continue
        if "choices" in about:
            validate.one_of(name, value, about["choices"])
        elif kind == "int":
            validate.integer(name, value, about["low"], about["high"])
        elif kind == "float":
            validate.number(name, value, about["low"], about["high"])
        elif kind == "bool":
            validate.boolean(name, value)
        elif kind == "str" and not isinstance(value, str):
            raise ValueError(f"{name} must be a string, not {str(value)[:40]}")


def kind_of(field: dataclasses.Field[Any]) -> str:
    """The name of a field's type, without "| None": "int" for int and for int | None."""
    name = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    return name.partition(" | ")[0]


# Shapes to start from: about 1, 4 and 135 million parameters with a vocabulary of 8,192.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 128, "n_layer": 3, "d_state": 32, "headdim": 32, "dropout": 0.1},
    "small": {"d_model": 256, "n_layer": 4, "dropout": 0.1},
    "base": {"d_model": 768, "n_layer": 24, "d_state": 128, "chunk_size": 128},
}
# The fields of Mamba2Config that are flags of train.py.
MODEL_FLAGS = ("d_model", "n_layer", "d_state", "headdim", "expand", "ngroups", "chunk_size", "a_init", *DROPOUTS)


def defaults(cls: type) -> dict[str, Any]:
    """The default of every field of a dataclass that has one."""
    return {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}


def learning_rate(progress: float, step: int, settings: Settings) -> float:
    """A cosine from lr to min_lr as `progress` goes from 0 to 1, times a linear warm-up over warmup_steps."""
    cosine = settings.min_lr + (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * min(progress, 1))) / 2
    return cosine * min(1.0, (step + 1) / max(settings.warmup_steps, 1))
