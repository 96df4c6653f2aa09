"""Texts with labels: read from files of records (rows.py), split, and turned into tokens.

The split is by a hash of the text, so that equal texts are on one side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError
from mamba2_min.finetune.rows import read_rows

LABELS, HEAD, CONFUSION = "labels.json", "head.safetensors", "confusion.png"
_MAX_LABELS = 10_000
_MAX_WORDS = 8192  # in a vocabulary of the texts' own words


@dataclass(frozen=True)
class Sample:
    """A text's tokens (l,) int64, the end token of the document before it first, and the index of its label."""

    ids: Tensor
    label: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class LabelData:
    """Samples to train on and to validate with, the labels' names in the order of their indices, notes, and the
    tokenizer that made the samples where it is one of their own words."""

    train: list[Sample]
    validation: list[Sample]
    names: list[str]
    notes: list[str] = field(default_factory=list)
    own_words: WordTokenizer | None = None


def read_texts(
    path: str | Path, text: str = "text", label: str = "label", encoding: str | None = None
) -> list[tuple[str, str, str]]:
    """(text, label, where) of every record of a file, in order. Raises UserError that names file and line."""
    rows = read_rows(path, (text, label), encoding)
    found = [(_cell(row, text, where), _cell(row, label, where), where) for row, where in rows]
    if not found:
        raise UserError(f"{path} has no records")
    return found


def _cell(row: Any, name: str, where: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a record must be an object with {name}")
    value = row.get(name)
    if isinstance(value, (bool, int, float)):  # a label such as 1 or true, in JSON
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {name} is {'missing' if value is None else 'empty or not a text'}")
    return value.strip()


def load_texts(
    data: str | Path,
    tokenizer: WordTokenizer,
    val_data: str | Path | None = None,
    val_fraction: float = 0.1,
    text: str = "text",
    label: str = "label",
    encoding: str | None = None,
    own_words: bool = False,
) -> LabelData:
    """Reads texts with labels and makes samples of them. Raises UserError.

    own_words: the vocabulary is that of the training texts, cut by the pattern of `tokenizer`, instead of that one's.
    """
    rows, notes = read_texts(data, text, label, encoding), []
    rows, repeats = _without_repeats(rows)
    if repeats:
        notes.append(f"{repeats:,} repeated texts left out")
    if val_data is None:
        chosen = {key for key in {_key(t) for t, _, _ in rows} if int(key[:15], 16) / 16**15 < val_fraction}
        train = [row for row in rows if _key(row[0]) not in chosen]
        validation = [row for row in rows if _key(row[0]) in chosen]
    else:
        validation, _ = _without_repeats(read_texts(val_data, text, label, encoding))
        held_out = {_key(t) for t, _, _ in validation}
        train = [row for row in rows if _key(row[0]) not in held_out]
        if len(train) < len(rows):
            notes.append(f"{len(rows) - len(train):,} texts left out of training: they are in {val_data} too")
    names = sorted({name for _, name, _ in train})
    _check_labels(names, train, validation, data)
    counts = Counter(name for _, name, _ in train)
    notes.append(f"most frequent label: {counts.most_common(1)[0][0]} ({max(counts.values()) / len(train):.1%})")
    index = {name: k for k, name in enumerate(names)}
    own = WordTokenizer.train([t for t, _, _ in train], _MAX_WORDS, 2, tokenizer.pattern) if own_words else None
    tokenizer = own or tokenizer
    made = [[Sample(_ids(t, tokenizer, where), index[name]) for t, name, where in part] for part in (train, validation)]
    return LabelData(made[0], made[1], names, notes, own)


def _check_labels(
    names: list[str],
    train: Sequence[tuple[str, str, str]],
    validation: Sequence[tuple[str, str, str]],
    data: str | Path,
) -> None:
    for name, where in ((name, where) for _, name, where in (*train, *validation)):
        if "\t" in name or "\n" in name or "\r" in name:
            raise UserError(f"{where}: the label {name[:40]!r} holds a tab or a line end")
    if len(names) < 2:
        raise UserError(f"{data} has {len(names) or 'no'} label to train on: sorting needs at least two")
    if len(names) > _MAX_LABELS:
        raise UserError(f"{data} has {len(names):,} labels; at most {_MAX_LABELS:,} are possible")
    unseen = next(((name, where) for _, name, where in validation if name not in set(names)), None)
    if unseen:
        raise UserError(f"{unseen[1]}: the label {unseen[0]!r} does not occur in the training part")
    if not validation:
        raise UserError(f"nothing to validate with: of {len(train)} texts in {data} none is in the validation part")


def _without_repeats(rows: Sequence[tuple[str, str, str]]) -> tuple[list[tuple[str, str, str]], int]:
    """The first of each text. Raises UserError where one text has two labels."""
    seen: dict[str, tuple[str, str, str]] = {}
    for row in rows:
        before = seen.setdefault(row[0], row)
        if before[1] != row[1]:
            raise UserError(f"{row[2]}: this text has the label {row[1]!r}, and {before[1]!r} in {before[2]}")
    return list(seen.values()), len(rows) - len(seen)


def _key(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _ids(text: str, tokenizer: WordTokenizer, where: str) -> Tensor:
    return torch.tensor([tokenizer.eos_id, *encode(text, tokenizer, where)])


def encode(text: str, tokenizer: WordTokenizer, where: str) -> list[int]:
    """A text's tokens. Raises UserError, naming `where`, for what is not text."""
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
