"""A file of JSON lines that only grows: what a long measurement has found so far, so that it can go on after a stop."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mamba2_min import files
from mamba2_min.errors import UserError

MOST_BYTES = 1 << 30


class Journal:
    """The records of a JSONL file, in order, in `records`. A last line that was cut off by a crash is dropped."""

    def __init__(self, path: Path, fields: Mapping[str, Collection[Any]]):
        """Reads what is there. Raises UserError for a line that is not a JSON object with these `fields`.

        A field's value is one of those named, or of one of the types named.
        """
        self.path = path
        self.records: list[dict[str, Any]] = []
        if not files.exists(path):
            return
        whole, _, rest = files.read_bytes(path, MOST_BYTES, follow=False).rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
            try:
                record = files.parse_json(line)
                if not isinstance(record, dict) or not set(fields) <= record.keys():
                    raise ValueError(f"an object with {', '.join(fields)} is wanted")
                for name, wanted in fields.items():
                    if type(record[name]) not in wanted and not (type(record[name]) is str and record[name] in wanted):
                        raise ValueError(f"{name} is not what was written there")
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}") from error
            self.records.append(record)
        if rest:
            files.write_atomically(path, lambda file: file.write(whole + b"\n" if whole else b""))

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record; it is on the disk when this returns. Raises UserError."""
        files.append_line(self.path, (json.dumps(record) + "\n").encode(), flush=True)
        self.records.append(record)
