"""metrics.jsonl: a line of JSON for each thing measured in a run, in order of steps, without gap or repeat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mamba2_min.checkpoint import write_atomically
from mamba2_min.errors import UserError


class MetricsLog:
    """Appends lines to a file. `rewind(step)` drops what came after a step, and a last line that was torn."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def append(self, **values: Any) -> None:
        """Writes one line and hands it to the system. Raises UserError where the disk is full."""
        line = json.dumps({k: _rounded(v) for k, v in values.items()}) + "\n"
        try:
            with open(self.path, "ab", buffering=0) as file:
                file.write(line.encode())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error

    def rewind(self, step: int) -> None:
        kept = [record for record in read_metrics(self.path) if record.get("step", 0) <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(self.path, lambda file: file.write(text.encode()))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file, without a torn last line; none where there is no file."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line end was never finished
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        records.append(record)
    return records


def _rounded(value: Any) -> Any:
    return float(f"{value:.7g}") if isinstance(value, float) else value
