"""What a run does: a new one by the user's values, a preset and the defaults; a saved one by its settings.json."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba2_min import files
from mamba2_min.checkpoints import checkpoint
from mamba2_min.config import DROPOUTS, Mamba2Config
from mamba2_min.data.corpus import Corpus, corpus_of
from mamba2_min.data.room import check_room
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError, printable
from mamba2_min.flags import flag
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.recipes import recipe
from mamba2_min.settings import (
    ACCEPTABLE,
    BEFORE,
    BEFORE_OF_DATA,
    MODEL_FLAGS,
    PRESETS,
    DataSettings,
    Settings,
    defaults,
)

_TRAINING_ONLY = (*DROPOUTS, "chunk_size")  # of a model's config: what no weight depends on
_MOST_WORDS = 50_257  # GPT-2's vocabulary: to estimate a model's size before its text is read, if there is no limit
DOCUMENTS = "documents"  # the name by which --accept allows other documents than those that a run began with


@dataclass(frozen=True)
class RunSpec:
    """`data`: the documents and the vocabulary; `model`: Mamba2Config without its vocab_size; `training`: how to train;
    `resume`: whether a saved run is resumed; `accept_documents`: with other documents than before."""

    data: DataSettings
    model: dict[str, Any]
    training: Settings
    resume: bool = False
    accept_documents: bool = False

    def corpus(self, out: str | Path, ignore_memory: bool = False) -> Corpus:
        """Reads the documents; with the run's own tokenizer where it is resumed. Raises UserError."""
        d = self.data
        if not ignore_memory:
            check_room(d.data, d.val_data, d.max_documents_bytes, d.rules)
        if self.resume:
            return corpus_of(d, WordTokenizer.load(Path(out) / checkpoint.TOKENIZER))
        return corpus_of(d, start_of(d.init_from)[1] if d.init_from else None)

    def config(self, corpus: Corpus) -> Mamba2Config:
        try:
            return Mamba2Config(vocab_size=len(corpus.tokenizer), **self.model)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error

    def build(self, config: Mamba2Config) -> Mamba2LM:
        """The model: new, or with the weights that the run begins from. Raises UserError where they cannot be read."""
        model = Mamba2LM(config, seed=self.training.seed)
        if self.data.init_from and not self.resume:  # a resumed run has weights of its own
            weights = checkpoint.load_model(self.data.init_from)[1]
            checkpoint.load_weights(model, weights, self.data.init_from)
        return model

    def save(self, out: str | Path) -> None:
        """Writes settings.json, which the next `--resume` reads."""
        data, training = dataclasses.asdict(self.data), dataclasses.asdict(self.training)
        values = {"data": data, "model": self.model, "training": training}
        path = files.make_folder(out) / checkpoint.SETTINGS
        with contextlib.suppress(UserError):  # a file that cannot be read is written again
            if files.load_json(path) == values:
                return
        files.save_json(path, values)


def plan_run(
    out: str | Path,
    overrides: dict[str, Any],
    preset: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    accept: tuple[str, ...] = (),
) -> RunSpec:
    """The plan for the run in `out`. `overrides` are the values that the user named; the others take their defaults.

    A new run in a folder that holds one is refused unless `overwrite`. With `resume` a saved run continues with what it
    began with: an override that differs is refused, unless it is one of ACCEPTABLE and named in `accept`; "documents"
    there allows other documents. Where nothing has been saved yet, `resume` starts a new run. Raises UserError.
    """
    out = Path(out)
    for name in accept:
        if name not in (*ACCEPTABLE, DOCUMENTS):
            known = ", ".join(flag(n)[2:] for n in (*ACCEPTABLE, DOCUMENTS))
            raise UserError(f"--accept takes {known}, not {flag(name)[2:]}")
    if resume and files.is_file(out / checkpoint.RESUME):
        return _saved_plan(out, overrides, preset, accept)
    model, begun = files.exists(out / checkpoint.WEIGHTS), files.is_file(out / checkpoint.SETTINGS)
    if resume and model:
        raise UserError(f"{out} holds a model but no {checkpoint.RESUME} to resume from; --overwrite replaces it")
    if resume and begun:  # it ended before its first save: the same run, from its beginning
        return dataclasses.replace(_saved_plan(out, overrides, preset, accept), resume=False)
    if not (resume or overwrite):
        holds = [
            name for name in (checkpoint.RESUME, checkpoint.WEIGHTS, checkpoint.CONFIG) if files.exists(out / name)
        ]
        if holds:
            raise UserError(f"{out} already holds a run ({holds[0]}): --resume continues it, --overwrite replaces it")
    return _new_plan(out, overrides, preset)


def start_of(folder: str) -> tuple[Mamba2Config, WordTokenizer]:
    """The config and the tokenizer of the model that a run begins from. Raises UserError where one is missing."""
    config = checkpoint.load_config(folder)
    return config, checkpoint.load_tokenizer(folder, config.vocab_size)


def _new_plan(out: Path, overrides: dict[str, Any], preset: str | None) -> RunSpec:
    def chosen(cls: type, besides: frozenset[str] = frozenset()) -> dict[str, Any]:
        return {name: overrides[name] for name in (_names(cls) - besides) & overrides.keys()}

    data, model = chosen(DataSettings), chosen(Mamba2Config, besides=_names(DataSettings))
    try:
        if data.get("init_from"):
            shape, data = _continued(out, overrides, preset, data)
        else:
            shape = PRESETS[preset or "small"]
        config = Mamba2Config(data.get("vocab_size", DataSettings.vocab_size) or _MOST_WORDS, **{**shape, **model})
        of_training, of_model = recipe(overrides.get("recipe", Settings.recipe), config.num_parameters())
        training = {**of_training, **chosen(Settings)}
        return RunSpec(DataSettings(**data), {**shape, **of_model, **model}, Settings(**training))
    except ValueError as error:
        raise UserError(str(error)) from error


def _continued(
    out: Path, overrides: dict[str, Any], preset: str | None, data: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The shape of the model that a run begins from, and `data` with its vocabulary. Raises UserError."""
    source = data["init_from"]
    if os.path.realpath(source) == os.path.realpath(out):  # Path.resolve raises for a loop of links
        raise UserError(f"--out and --init-from are one folder, {out}: a new run needs another --out")
    config, tokenizer = start_of(source)
    if preset:
        raise UserError(f"--preset cannot be given with --init-from: the shape is that of {source}")
    for name in ("vocab_size", "min_count", "pattern"):
        if name in overrides:
            raise UserError(f"{flag(name)} cannot be given with --init-from: the vocabulary is that of {source}")
    shape = {name: value for name, value in config.to_dict().items() if name != "vocab_size"}
    for name in MODEL_FLAGS:
        if name in overrides and name not in _TRAINING_ONLY and overrides[name] != shape[name]:
            raise UserError(f"{flag(name)} {overrides[name]} cannot be: it is {shape[name]} in {source}")
    return shape, {**data, "vocab_size": config.vocab_size, "pattern": tokenizer.pattern}


def _saved_plan(out: Path, overrides: dict[str, Any], preset: str | None, accept: tuple[str, ...]) -> RunSpec:
    plan = dataclasses.replace(read_plan(out), accept_documents=DOCUMENTS in accept)
    data, training = dataclasses.asdict(plan.data), dataclasses.asdict(plan.training)
    before = {**defaults(Mamba2Config), **plan.model, **training, **data}
    set_otherwise = overrides.keys() | recipe(plan.training.recipe, 1)[1].keys()
    if preset and any(before[name] != value for name, value in PRESETS[preset].items() if name not in set_otherwise):
        raise UserError(f"the run in {out} did not begin with --preset {preset}; leave it out, or start a new run")
    for name, value in overrides.items():
        if name in ("data", "val_data"):  # the documents may have moved: their content is checked instead
            data[name] = value
        elif before[name] != value:
            change = f"{flag(name)} was {_shown(before[name])} when the run in {out} began, and is now {_shown(value)}"
            if name not in ACCEPTABLE:
                raise UserError(f"{change}; leave it out to resume, or start a new run with another --out")
            if name not in accept:
                raise UserError(f"{change}; add --accept {flag(name)[2:]} to resume with the new value")
            training[name] = value
    try:
        return dataclasses.replace(plan, data=DataSettings(**data), training=Settings(**training))
    except ValueError as error:
        raise UserError(str(error)) from error


def read_plan(out: str | Path) -> RunSpec:
    """The plan of a saved run, from its settings.json. Raises UserError where that is missing or damaged."""
    path = Path(out) / checkpoint.SETTINGS
    saved = files.load_json(path)
    try:
        if not isinstance(saved, dict) or saved.keys() != {"data", "model", "training"}:
            raise ValueError("it does not hold data, model and training")
        if not all(isinstance(part, dict) for part in saved.values()):
            raise ValueError("data, model and training are not objects")
        Mamba2Config(vocab_size=1, **saved["model"])
        data, training = (
            DataSettings(**{**BEFORE_OF_DATA, **saved["data"]}),
            Settings(**{**BEFORE, **saved["training"]}),
        )
        return RunSpec(data, saved["model"], training, resume=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be understood: {printable(str(error))[:300]}") from error


def _names(cls: type) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(cls))


def _shown(value: Any) -> str:
    return {True: "on", False: "off", None: "unset"}[value] if value is None or isinstance(value, bool) else str(value)
