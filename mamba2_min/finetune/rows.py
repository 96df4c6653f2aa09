"""Files of records for fine-tuning, read strictly: what cannot be learnt from is an error, and nothing is left out.

The files are those of data/records.py: .jsonl and .json; .csv, whose cells may be quoted with "; and .tsv, in which
nothing is quoted, so that a cell may hold any quotation mark. The first row of a table names its columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mamba2_min import files
from mamba2_min.data import records
from mamba2_min.data.encodings import Undecodable, advice, check_encoding, decode
from mamba2_min.data.records import SUFFIXES
from mamba2_min.errors import UserError

_MAX_BYTES = 1 << 30


def read_rows(path: str | Path, columns: Sequence[str] = (), encoding: str | None = None) -> Iterator[tuple[Any, str]]:
    """The records of a file in order, each with its place, "file, line 7".

    columns: names that the first row of a table must have, instead of those of a conversation. encoding: that of a file
    which is not UTF-8 and has no mark of UTF-16 or UTF-32. Raises UserError, naming file and line, for what cannot be
    read.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: records come in {', '.join(SUFFIXES)} files")
    if encoding is not None:
        check_encoding(encoding)
    try:
        content = decode(files.read_bytes(path, _MAX_BYTES), encoding).replace("\r\n", "\n")
    except Undecodable as error:
        expected = "UTF-8" if encoding is None else f"UTF-8 or {encoding}"
        raise UserError(f"{path} is not {expected}: {error}; it looks like {advice(error.guess)}") from None
    for row in records.read_rows(content, suffix, columns):
        where = f"{path}, {row.where}"
        if row.problem:
            hint = " (--text-column and --label-column name others)" if "no column is called" in row.problem else ""
            raise UserError(f"{where}: {row.problem}{hint}")
        yield row.value, where
