"""The figures of metrics.jsonl for TensorBoard, through PyTorch's own writer, as a run goes on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mamba2_min import files
from mamba2_min.errors import UserError

FOLDER = "tensorboard"  # within the run's


def writer_class() -> Any:
    """PyTorch's SummaryWriter. Raises UserError where the package that it needs is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError('--tensorboard needs the package tensorboard: pip install "mamba2-min[tensorboard]"') from None
    return SummaryWriter


class Board:
    """Writes each record of metrics.jsonl as scalars named "loss/train", "loss/validation", and so on.

    `step`: where the run goes on; what a former sitting wrote for later steps no longer counts. In a `with`: it ends
    with everything on disk. Raises UserError where the package is missing or its files cannot be written.
    """

    def __init__(self, out: str | Path, step: int = 0):
        folder = files.make_folder(Path(out) / FOLDER, follow=False)
        try:
            self._writer = writer_class()(str(folder), purge_step=step + 1 if step else None)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror or error}") from error

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()

    def write(self, record: dict[str, Any]) -> None:
        """Takes a record as `MetricsLog.append` does: its numbers, but for the step itself."""
        for name, value in record.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name != "step" and number and math.isfinite(value):
                self._writer.add_scalar(f"{name}/{record['split']}", value, record["step"])
        if record["split"] == "validation":
            self._writer.flush()
