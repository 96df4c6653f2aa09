"""Which documents a run can be judged by: those that it was not trained on, by what its settings.json says."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from mamba2_min import files
from mamba2_min.checkpoints import checkpoint
from mamba2_min.data.documents import Document, Reader
from mamba2_min.data.repeats import Repeats
from mamba2_min.data.split import split_documents
from mamba2_min.errors import UserError
from mamba2_min.printable import one_line
from mamba2_min.settings import BEFORE_OF_DATA, DataSettings


def held_out(runs: Sequence[str | Path], source: str | Path, encoding: str | None = None) -> list[Document]:
    """The documents of `source` that each of `runs` kept for validation, read and split as each run did.

    Where `source` is the folder that a run was trained on with `--val-data`, they are the documents of that; where it
    is that validation part, all of them. A folder that a run was not trained on is split by the run's rules all the
    same, and a printed line says that its training is unknown. `encoding` replaces that of the runs.
    Raises UserError where nothing was held out by all runs, and what `Reader` raises.
    """
    asked: dict[DataSettings, None] = {}  # a set in order: runs with equal settings share one reading
    for run in runs:
        settings = _settings_of(run)
        if settings is None:
            print(f"note: {one_line(str(run))} does not say what it was trained on")
            settings = DataSettings()
        elif not any(_same(source, path) for path in (settings.data, settings.val_data)):
            print(f"note: {one_line(f'{run} was trained on {settings.data}, and may have seen documents of {source}')}")
        asked[_for_source(settings, source, encoding)] = None
    first, *others = map(validation_documents, asked)
    for documents in others:
        keys = {document.key for document in documents}
        first = [document for document in first if document.key in keys]
    if not first:
        raise UserError(f"no document of {source} was held out by all of these runs; judge them by other documents")
    return first


def validation_documents(data: DataSettings) -> list[Document]:
    """The documents that a run with these settings validates with. (`load_corpus` gives their tokens.)"""
    strip = data.pattern != "whitespace"
    if data.val_data is not None:
        return list(Reader(data.val_data, strip, data.encoding, rules=data.rules))
    documents = list(Reader(data.data, strip, data.encoding, data.max_documents_bytes, data.rules))
    keys = [document.key for document in documents]
    if data.drop_repeats:
        repeats = Repeats()
        for document in documents:
            repeats.add(document.text)
        dropped = [Document(repeats.without(document.text), document.source) for document in documents]
        kept = [(key, document) for key, document in zip(keys, dropped, strict=True) if document.text.strip()]
        keys, documents = [key for key, _ in kept], [document for _, document in kept]
    return split_documents(documents, data.val_fraction, data.rules, keys).validation


def _for_source(settings: DataSettings, source: str | Path, encoding: str | None) -> DataSettings:
    """What decides the validation part of `source`; all else is as in every run, so that equal parts compare equal."""
    val_data = None
    if settings.val_data is not None and (_same(source, settings.val_data) or _same(source, settings.data)):
        val_data = settings.val_data
    return DataSettings(
        data=str(source),
        val_data=val_data,
        val_fraction=settings.val_fraction,
        encoding=encoding or settings.encoding,
        drop_repeats=settings.drop_repeats,
        max_documents_bytes=settings.max_documents_bytes,
        pattern="whitespace" if settings.pattern == "whitespace" else "words",
        rules=settings.rules,
    )


def _same(path: str | Path, other: str | None) -> bool:
    return other is not None and os.path.realpath(path) == os.path.realpath(other)


def _settings_of(run: str | Path) -> DataSettings | None:
    """What a run of `train.py` was trained on; None for a folder that does not say. Raises UserError."""
    path = Path(run) / checkpoint.SETTINGS
    saved = files.load_json(path) if files.is_file(path) else None
    data = saved.get("data") if isinstance(saved, dict) else None
    if not isinstance(data, dict):
        return None
    names = {field.name for field in dataclasses.fields(DataSettings)}
    if unknown := data.keys() - names:
        raise UserError(f"{path} cannot be understood: data has {one_line(str(min(unknown)))}")
    try:
        return DataSettings(**{**BEFORE_OF_DATA, **data})
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be understood: {one_line(str(error))}") from error
