"""Whether there is enough memory to read documents."""

from __future__ import annotations

import os

from mamba2_min import devices
from mamba2_min.data.documents import RULES, Reader
from mamba2_min.devices import size
from mamba2_min.errors import UserError

# Measured: the numbers of the pieces and the tokens take up to 4 bytes for each byte of all documents; the text that is
# being read takes up to 12 more, if it has a sign beyond U+FFFF, for then Python keeps 4 bytes for each character.
BYTES_PER_BYTE, BYTES_PER_BYTE_OF_LARGEST = 4, 12


def check_room(
    path: str | os.PathLike, val_path: str | os.PathLike | None = None, max_bytes: int | None = None, rules: int = RULES
) -> None:
    """Raises UserError where less memory is free than reading the documents at these paths takes.

    Only the bytes that would be read count: no files of other types, and of `path` at most `max_bytes`.
    """
    files = Reader(path, max_bytes=max_bytes, rules=rules).files
    if val_path is not None:
        files = files + Reader(val_path, rules=rules).files
    length, largest = sum(file.limit for file in files), max((file.limit for file in files), default=0)
    needed, free = BYTES_PER_BYTE * length + BYTES_PER_BYTE_OF_LARGEST * largest, devices.free_host_memory()
    if free is not None and needed > free:
        # The most that is sure to fit, even if all of it is in one file.
        part = max(free // 16, (free - BYTES_PER_BYTE_OF_LARGEST * largest) // BYTES_PER_BYTE, 1)
        raise UserError(
            f"the documents are {size(length)}: reading them takes about {size(needed)}, and {size(free)} is free; "
            f"add --max-documents-bytes {_rounded(part)} to train on a part of them (--ignore-memory starts anyway)"
        )


def _rounded(number: int) -> int:
    """The number with all but its first two digits 0."""
    unit = 10 ** max(len(str(number)) - 2, 0)
    return number // unit * unit
