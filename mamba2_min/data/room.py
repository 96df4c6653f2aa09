"""Whether there is enough memory to read documents."""

from __future__ import annotations

import os
from pathlib import Path

from mamba2_min import devices
from mamba2_min.data.corpus import document_files
from mamba2_min.devices import size
from mamba2_min.errors import UserError

BYTES_PER_BYTE = 24  # measured: while a text is split into words, each of its bytes takes up to 23


def check_room(*paths: str | os.PathLike | None) -> None:
    """Raises UserError where less memory is free than reading the documents at these paths takes.

    Only the files that would be read count. A path of None is left out.
    """
    files = [file for path in paths if path is not None for file in document_files(Path(path), [])]
    length = sum(file.stat().st_size for file in files)
    needed, free = BYTES_PER_BYTE * length, devices.free_host_memory()
    if free is not None and needed > free:
        raise UserError(
            f"the documents are {size(length)}: reading them takes about {size(needed)}, and {size(free)} is free; "
            "take some of them out (--ignore-memory starts anyway)"
        )
