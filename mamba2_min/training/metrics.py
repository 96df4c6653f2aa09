"""metrics.jsonl: one line of JSON per measurement of a run, in the order of steps, without gaps or repeats."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mamba2_min import console, files
from mamba2_min.checkpoints import checkpoint
from mamba2_min.errors import UserError, printable
from mamba2_min.files import append_line, write_atomically

_MAX_BYTES = 1 << 30  # ten million lines


class MetricsLog:
    """Appends records to a file and counts them, so that a resumed run can drop those that it will write again.

    `records` is the number of lines that were appended, or kept by `rewind`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.records = 0
        self.mirror: Callable[[dict[str, Any]], None] | None = None  # gets each record too

    def append(self, **values: Any) -> None:
        """Writes one line, whole or not at all. Raises UserError where that fails, as on a full disk."""
        record = {k: _plain(v) for k, v in values.items()}
        append_line(self.path, (json.dumps(record, allow_nan=False) + "\n").encode())
        self.records += 1
        if self.mirror:
            self.mirror(record)

    def flush(self) -> None:
        """Returns when every line is on the disk."""
        files.flush(self.path)

    def lines(self) -> int:
        """How many whole lines the file has; 0 where there is none."""
        return _content(self.path).count(b"\n")

    def rewind(self, records: int) -> None:
        """Keeps only the first `records` lines. Raises UserError where one of them is damaged."""
        content = _content(self.path)
        lines = content.split(b"\n")[:-1]
        kept = lines[:records]
        for number, line in enumerate(kept, start=1):
            _parse(line, self.path, number)
        text = b"".join(line + b"\n" for line in kept)
        if content != text:
            write_atomically(self.path, lambda file: file.write(text))
        self.records = len(kept)


class NoLog(MetricsLog):
    """Counts records and writes none: that of a process that does not lead."""

    def append(self, **values: Any) -> None:
        self.records += 1

    def flush(self) -> None:
        pass

    def rewind(self, records: int) -> None:
        self.records = records


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file, without a torn last line; none where there is no file.

    Each has `step`, an integer, `split`, "train" or "validation", and `loss`, a number, or None where it was not
    finite; a record of "train" has `lr`, a number. Raises UserError, one line, for anything else.
    """
    lines = _content(Path(path)).split(b"\n")[:-1]  # what follows the last line end was never completed
    return [_parse(line, Path(path), number) for number, line in enumerate(lines, start=1)]


def plot_run(folder: Path, seconds: float = 0.0) -> None:
    """Draws the metrics.jsonl of a run's folder into its loss.png, and how long it has trained, if that is known.

    Where there is no memory left for a picture, a line says so. Raises UserError where it cannot be written.
    """
    metrics = read_metrics(folder / checkpoint.METRICS)
    title = printable(str(folder)).replace("$", r"\$")  # text between two $ would be a formula
    if seconds and metrics:
        title += f": {metrics[-1]['step']:,} steps in {clock(seconds)}"
    try:
        from mamba2_min.plots import plot_loss  # matplotlib takes a second to import

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a folder's name may have letters that the font lacks
            plot_loss(metrics, folder / checkpoint.CURVE, title=title)
    except (ImportError, MemoryError) as error:  # a library that cannot be mapped is an ImportError
        reason = (str(error).splitlines() or [type(error).__name__])[-1]
        console.print(f"note: {checkpoint.CURVE} is not drawn: {printable(reason)[:200]}", file=sys.stderr)


def clock(seconds: float) -> str:
    """3:07 or 2:03:07."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _content(path: Path) -> bytes:
    return files.read_bytes(path, _MAX_BYTES) if files.exists(path) else b""


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = files.parse_json(line)
        _check(record)
    except ValueError as error:
        raise UserError(f"{path}, line {number} is not a measurement: {str(error)[:200]}") from error
    return record


def _check(record: Any) -> None:
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    if type(record.get("step")) is not int or not 0 <= record["step"] < 2**31:
        raise ValueError("its step is not an integer")
    if record.get("split") not in ("train", "validation"):
        raise ValueError("its split is neither train nor validation")
    if "loss" not in record or not (record["loss"] is None or _is_number(record["loss"])):
        raise ValueError("its loss is not a number")
    if record["split"] == "train" and not _is_number(record.get("lr")):
        raise ValueError("its learning rate is not a number")
    if not _is_number(record.get("bits_per_byte", 0)):
        raise ValueError("its bits per byte are not a number")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _plain(value: Any) -> Any:
    """A value for JSON: a float with seven digits, or None where it is not finite."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None
