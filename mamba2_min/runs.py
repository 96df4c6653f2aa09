"""What a run is to do: presets, defaults and the user's wishes for a new one, what was saved for one that goes on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba2_min import checkpoint
from mamba2_min.config import Mamba2Config
from mamba2_min.corpus import Corpus, load_corpus
from mamba2_min.errors import UserError
from mamba2_min.tokenizer import WordTokenizer
from mamba2_min.trainer import Settings

SETTINGS = "settings.json"

# Shapes to start from: about 1, 4 and 135 million parameters with a vocabulary of 8,192.
PRESETS = {
    "tiny": {"d_model": 128, "n_layer": 3, "d_state": 32, "headdim": 32},
    "small": {"d_model": 256, "n_layer": 4},
    "base": {"d_model": 768, "n_layer": 24, "d_state": 128, "chunk_size": 128},
}
DATA = {
    "data": "training_data", "val_data": None, "vocab_size": 8192, "min_count": 2, "pattern": "words",
    "val_fraction": 0.1,
}  # fmt: skip
# What may differ when a run goes on, where the user accepts it by name: when to stop, look and save.
ACCEPTABLE = ("max_steps", "max_minutes", "eval_every", "save_every", "patience", "min_delta")


@dataclass(frozen=True)
class Plan:
    """`data`: where the documents are and how the vocabulary is made; `model`: Mamba2Config without the vocabulary;
    `training`: how to train; `resume`: whether a saved run goes on."""

    data: dict[str, Any]
    model: dict[str, Any]
    training: Settings
    resume: bool = False

    def corpus(self, out: str | Path) -> Corpus:
        """Reads the documents; with the run's own tokenizer where it goes on. Raises UserError."""
        d = self.data
        tokenizer = WordTokenizer.load(Path(out) / checkpoint.TOKENIZER) if self.resume else None
        return load_corpus(
            d["data"], d["vocab_size"], d["min_count"], d["pattern"], d["val_fraction"], d["val_data"],
            tokenizer=tokenizer,
        )  # fmt: skip

    def config(self, corpus: Corpus) -> Mamba2Config:
        try:
            return Mamba2Config(vocab_size=len(corpus.tokenizer), **self.model)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error

    def save(self, out: str | Path) -> None:
        values = {"data": self.data, "model": self.model, "training": dataclasses.asdict(self.training)}
        checkpoint.save_json(Path(out) / SETTINGS, values)


def plan_run(
    out: str | Path,
    wishes: dict[str, Any],
    preset: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    accept: tuple[str, ...] = (),
) -> Plan:
    """The plan for the run in `out`. `wishes` are the values asked for by name; what is not in it takes its default.

    A new run in a folder that holds one is refused unless `overwrite`. With `resume`, a saved run goes on with what it
    was begun with, and a wish that differs is refused, unless it is one of ACCEPTABLE and named in `accept`. Where
    nothing has been saved yet, `resume` begins anew. Raises UserError.
    """
    out = Path(out)
    for name in accept:
        if name not in ACCEPTABLE:
            known = ", ".join(_flag(n)[2:] for n in ACCEPTABLE)
            raise UserError(f"--accept takes {known}, not {_flag(name)[2:]}")
    if resume and (out / checkpoint.RESUME).is_file():
        return _saved_plan(out, wishes, preset, accept)
    holds = [name for name in (checkpoint.RESUME, checkpoint.WEIGHTS, checkpoint.CONFIG) if (out / name).exists()]
    if holds and not overwrite and not (resume and not (out / checkpoint.WEIGHTS).exists()):
        raise UserError(f"{out} already holds a model ({holds[0]}): --resume goes on with it, --overwrite replaces it")
    return _new_plan(wishes, preset)


def _new_plan(wishes: dict[str, Any], preset: str | None) -> Plan:
    data = {name: wishes.get(name, default) for name, default in DATA.items()}
    model = dict(PRESETS[preset or "small"])
    model.update({name: wishes[name] for name in _names(Mamba2Config) & wishes.keys() if name not in DATA})
    training = {name: wishes[name] for name in _names(Settings) & wishes.keys()}
    try:
        return Plan(data, model, Settings(**training))
    except ValueError as error:
        raise UserError(str(error)) from error


def _saved_plan(out: Path, wishes: dict[str, Any], preset: str | None, accept: tuple[str, ...]) -> Plan:
    saved = checkpoint.load_json(out / SETTINGS)
    try:
        plan = Plan(dict(saved["data"]), dict(saved["model"]), Settings(**saved["training"]), resume=True)
        Mamba2Config(vocab_size=1, **plan.model)
        if plan.data.keys() != DATA.keys():
            raise ValueError("its data settings are not complete")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{out / SETTINGS} cannot be understood: {error}") from error
    if preset and any(plan.model.get(name) != value for name, value in PRESETS[preset].items()):
        raise UserError(f"the run in {out} was not begun with --preset {preset}; leave the flag out, or train anew")
    before = {**plan.data, **_defaults(Mamba2Config), **plan.model, **dataclasses.asdict(plan.training)}
    accepted = {}
    for name, value in wishes.items():
        if name in ("data", "val_data"):  # the same documents may lie elsewhere: what is in them is checked instead
            plan.data[name] = value
        elif before[name] != value:
            change = f"{_flag(name)} was {before[name]} when the run in {out} began, and is now {value}"
            if name not in ACCEPTABLE:
                raise UserError(f"{change}; leave it out to go on, or train anew with another --out")
            if name not in accept:
                raise UserError(f"{change}; add --accept {_flag(name)[2:]} to go on with the new value")
            accepted[name] = value
    return dataclasses.replace(plan, training=dataclasses.replace(plan.training, **accepted))


def _names(cls) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _defaults(cls) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
