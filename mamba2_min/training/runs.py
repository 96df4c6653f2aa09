"""What a run is to do: presets, defaults and the user's wishes for a new one, what was saved for one that goes on."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mamba2_min import devices, files
from mamba2_min.checkpoints import checkpoint
from mamba2_min.config import Mamba2Config
from mamba2_min.data.corpus import Corpus, load_corpus
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError, printable
from mamba2_min.settings import ACCEPTABLE, DATA, PRESETS, Settings, check_data, defaults

DOCUMENTS = "documents"  # what --accept calls other documents than those that a run was begun with


@dataclass(frozen=True)
class RunSpec:
    """`data`: where the documents are and how the vocabulary is made; `model`: Mamba2Config without the vocabulary;
    `training`: how to train; `resume`: whether a saved run goes on; `accept_documents`: with others than before."""

    data: dict[str, Any]
    model: dict[str, Any]
    training: Settings
    resume: bool = False
    accept_documents: bool = False

    def corpus(self, out: str | Path, ignore_memory: bool = False) -> Corpus:
        """Reads the documents; with the run's own tokenizer where it goes on. Raises UserError."""
        d = self.data
        if not ignore_memory:
            _check_room([d["data"], d["val_data"]])
        tokenizer = WordTokenizer.load(Path(out) / checkpoint.TOKENIZER) if self.resume else None
        return load_corpus(
            d["data"],
            d["vocab_size"],
            d["min_count"],
            d["pattern"],
            d["val_fraction"],
            d["val_data"],
            tokenizer=tokenizer,
        )

    def config(self, corpus: Corpus) -> Mamba2Config:
        try:
            return Mamba2Config(vocab_size=len(corpus.tokenizer), **self.model)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error

    def save(self, out: str | Path) -> None:
        """Writes settings.json, from which the next `--resume` makes its plan."""
        values = {"data": self.data, "model": self.model, "training": dataclasses.asdict(self.training)}
        path = files.make_folder(out) / checkpoint.SETTINGS
        with contextlib.suppress(UserError):  # what cannot be read is written anew
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
    """The plan for the run in `out`. `wishes` are the values asked for by name; what is not in it takes its default.

    A new run in a folder that holds one is refused unless `overwrite`. With `resume`, a saved run goes on with what it
    was begun with, and a wish that differs is refused, unless it is one of ACCEPTABLE and named in `accept`;
    "documents" there allows other documents. Where nothing has been saved yet, `resume` begins anew. Raises UserError.
    """
    out = Path(out)
    for name in accept:
        if name not in (*ACCEPTABLE, DOCUMENTS):
            known = ", ".join(_flag(n)[2:] for n in (*ACCEPTABLE, DOCUMENTS))
            raise UserError(f"--accept takes {known}, not {_flag(name)[2:]}")
    if resume and (out / checkpoint.RESUME).is_file():
        return _saved_plan(out, overrides, preset, accept)
    model, begun = (out / checkpoint.WEIGHTS).exists(), (out / checkpoint.SETTINGS).is_file()
    if resume and model:
        raise UserError(f"{out} holds a model but no {checkpoint.RESUME} to go on from; --overwrite replaces it")
    if resume and begun:  # it was ended before its first save: the same run, from its beginning
        return dataclasses.replace(_saved_plan(out, overrides, preset, accept), resume=False)
    if not (resume or overwrite):
        holds = [name for name in (checkpoint.RESUME, checkpoint.WEIGHTS, checkpoint.CONFIG) if (out / name).exists()]
        if holds:
            raise UserError(f"{out} holds a run already ({holds[0]}): --resume goes on, --overwrite replaces it")
    return _new_plan(overrides, preset)


def _new_plan(overrides: dict[str, Any], preset: str | None) -> RunSpec:
    data = {name: overrides.get(name, default) for name, default in DATA.items()}
    model = dict(PRESETS[preset or "small"])
    model.update({name: overrides[name] for name in _names(Mamba2Config) & overrides.keys() if name not in DATA})
    training = {name: overrides[name] for name in _names(Settings) & overrides.keys()}
    try:
        check_data(data)
        return RunSpec(data, model, Settings(**training))
    except ValueError as error:
        raise UserError(str(error)) from error


def _saved_plan(out: Path, overrides: dict[str, Any], preset: str | None, accept: tuple[str, ...]) -> RunSpec:
    plan = dataclasses.replace(read_plan(out), accept_documents=DOCUMENTS in accept)
    if preset and any(
        plan.model.get(name) != value for name, value in PRESETS[preset].items() if name not in overrides
    ):
        raise UserError(f"the run in {out} was not begun with --preset {preset}; leave the flag out, or train anew")
    before = {**plan.data, **defaults(Mamba2Config), **plan.model, **dataclasses.asdict(plan.training)}
    accepted = {}
    for name, value in overrides.items():
        if name in ("data", "val_data"):  # the same documents may lie elsewhere: what is in them is checked instead
            plan.data[name] = value
        elif before[name] != value:
            change = f"{_flag(name)} was {_shown(before[name])} when the run in {out} began, and is now {_shown(value)}"
            if name not in ACCEPTABLE:
                raise UserError(f"{change}; leave it out to go on, or train anew with another --out")
            if name not in accept:
                raise UserError(f"{change}; add --accept {_flag(name)[2:]} to go on with the new value")
            accepted[name] = value
    try:
        return dataclasses.replace(plan, training=dataclasses.replace(plan.training, **accepted))
    except ValueError as error:
        raise UserError(str(error)) from error


def read_plan(out: str | Path) -> RunSpec:
    """The plan that a run was begun with, from its settings.json. Raises UserError where that is not whole."""
    path = Path(out) / checkpoint.SETTINGS
    saved = files.load_json(path)
    try:
        if not isinstance(saved, dict) or saved.keys() != {"data", "model", "training"}:
            raise ValueError("it does not hold data, model and training")
        if not all(isinstance(part, dict) for part in saved.values()):
            raise ValueError("data, model and training are not objects")
        check_data(saved["data"])
        Mamba2Config(vocab_size=1, **saved["model"])
        return RunSpec(saved["data"], saved["model"], Settings(**saved["training"]), resume=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be understood: {printable(str(error))[:300]}") from error


def _check_room(paths: list[str | None]) -> None:
    """Raises UserError where there is less memory than reading the documents at these paths takes.

    That is measured: while a text is cut into words, each of its bytes takes up to 23.
    """
    files = [file for path in paths if path for file in (Path(path), *Path(path).rglob("*"))]
    length = sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())
    needed, free = 24 * length, devices.free_memory(torch.device("cpu"))
    if free is not None and needed > free:
        raise UserError(
            f"the documents are {devices.size(length)}: reading them takes about {devices.size(needed)}, and "
            f"{devices.size(free)} is free; take some of them out (--ignore-memory starts all the same)"
        )


def _names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    return {True: "on", False: "off", None: "unset"}[value] if value is None or isinstance(value, bool) else str(value)
