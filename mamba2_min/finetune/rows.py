"""Files of records: one object per record, and where it stands.

.jsonl, .json   objects, one per line, or one list of them
.csv            a first row that names the columns; cells may be quoted with "
.tsv            a first row that names the columns; nothing is quoted, so that a cell may hold any quotation mark
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mamba2_min import files
from mamba2_min.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_MAX_BYTES = 1 << 30

Row = tuple[dict[str, Any], str]  # a record, and "file, line 7"


def read_rows(path: str | Path, columns: Sequence[str] = ()) -> Iterator[Row]:
    """The records of a file in order. `columns`: names that the first row of a table must have.

    Raises UserError, naming file and line, for what is not an object or a row of the table.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: records come in {', '.join(SUFFIXES)} files")
    content = files.read_text(path, _MAX_BYTES, "utf-8-sig")
    if suffix in (".csv", ".tsv"):
        return _table(content, path, "\t" if suffix == ".tsv" else ",", columns)
    return _objects(content, path, lines=suffix != ".json")


def _objects(content: str, path: Path, lines: bool) -> Iterator[Row]:
    if not lines:
        values = _parsed(content, f"{path}")
        if not isinstance(values, list):
            raise UserError(f"{path}: it must be a list of objects")
        yield from ((_object(value, f"{path}, record {k}"), f"{path}, record {k}") for k, value in enumerate(values, 1))
        return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _object(_parsed(line, where), where), where


def _parsed(text: str, where: str) -> Any:
    try:
        return files.parse_json(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {str(error).splitlines()[0][:100]}") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: a record must be an object, not {str(value)[:40]!r}")
    return value


def _table(content: str, path: Path, delimiter: str, columns: Sequence[str]) -> Iterator[Row]:
    options: Any = {"quoting": csv.QUOTE_NONE} if delimiter == "\t" else {}
    limit = csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True, **options)
        names = [name.strip() for name in next(reader, [])]
        for wanted in columns:
            if wanted not in names:
                there = ", ".join(names)[:200] or "none"
                raise UserError(
                    f"{path}, line 1: no column is called {wanted!r}; the first row has {there}"
                    " (--text-column and --label-column name others)"
                )
        line = reader.line_num
        for row in reader:
            where, line = f"{path}, line {line + 1}", reader.line_num
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(names):
                raise UserError(f"{where}: {len(row)} cells, where the first row names {len(names)} columns")
            yield dict(zip(names, row, strict=True)), where
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not a table: {error}") from error
    finally:
        csv.field_size_limit(limit)
