"""A checkpoint's file before torch opens it: does it hold what it claims, and can reading it take more than its size?

torch.save writes a zip archive whose records are not compressed: data.pkl, a pickle with the structure, and data/0,
data/1, ... with the tensors' bytes. zip readers differ on files that are not written as torch writes them: where the
directory is, whose sizes count, which of two records with one name is meant. So a file is read only in that one form,
in which all readers agree: the end record stands at the very end, the directory right before it, names are unique, and
every record is stored as it is. Then reading takes no more memory than the file is long, and pickles.py can judge what
would be built.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO

_END, _END64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_ENTRY, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_MAX_DIRECTORY = 64 << 20  # bytes; 100,000 tensors take 8 MB
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "see the 64-bit field"
_ENCRYPTED = 1
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickle of 0x1950a86a20f9469cfc6c


class Compressed(ValueError):
    """A record is compressed, and could become a thousand times as long."""


@dataclass(frozen=True)
class Record:
    """A file in the archive: where its bytes begin, how many there are, and their CRC-32."""

    start: int
    size: int
    crc: int


def is_legacy(file: BinaryIO) -> bool:
    """Whether a file is in torch.save's format of before 2020: several pickles, of which the first is a magic number.

    How much memory it takes cannot be known in advance: storages are allocated as long as they claim to be.
    """
    file.seek(0)
    return file.read(len(_LEGACY)) == _LEGACY


def read_directory(file: BinaryIO) -> dict[str, Record]:
    """The records of an archive by name, without the folder that all of them are in.

    Raises ValueError, one line, unless the file has the one form in which every reader sees the same records.
    """
    size = os.fstat(file.fileno()).st_size
    if _read(file, 0, 4) != b"PK\x03\x04":
        raise ValueError("it does not begin as one")
    start, length, count = _find_directory(file, size)
    if length > _MAX_DIRECTORY:
        raise ValueError("its directory is too long")
    directory = _read(file, start, length)
    records: dict[str, Record] = {}
    folders, names, at = set(), set(), 0
    for _ in range(count):
        name, record, at = _read_entry(file, directory, at)
        folder, slash, rest = name.partition("/")
        folders.add(folder)
        names.add(name.lower())  # torch's reader does not tell Data.pkl from data.pkl
        records[rest] = record
        if not slash or len(folders) > 1 or len(names) < len(records) or not name.isascii():
            raise ValueError("its records are not in one folder, each with a name of its own")
    if at != length or len(names) != count:
        raise ValueError("its directory does not end where it should")
    if sum(record.size for record in records.values()) > size:
        raise ValueError("its records overlap")
    return records


def read_record(file: BinaryIO, record: Record) -> bytes:
    """A record's content."""
    return _read(file, record.start, record.size)


def damaged_record(file: BinaryIO, records: dict[str, Record]) -> str:
    """The name of the first record that differs from its checksum, or ""."""
    for name, record in records.items():
        file.seek(record.start)
        left, crc = record.size, 0
        while left:
            part = file.read(min(left, 1 << 20))
            if not part:
                return name
            crc, left = zlib.crc32(part, crc), left - len(part)
        if crc != record.crc:
            return name
    return ""


def _find_directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Where the directory begins, its length, and its number of entries."""
    at = size - _END.size
    sign, disk, first, here, count, length, start, comment = _END.unpack(_read(file, at, _END.size))
    if sign != b"PK\x05\x06" or comment:
        raise ValueError("it is cut off, or has something after its end")
    near = _read(file, at - _LOCATOR.size, _LOCATOR.size) if at >= _LOCATOR.size + _END64.size else b""
    if near.startswith(b"PK\x06\x07"):
        at -= _LOCATOR.size + _END64.size
        _, disk, where, disks = _LOCATOR.unpack(near)
        sign, left, _, _, disk64, first, here, count, length, start = _END64.unpack(_read(file, at, _END64.size))
        if sign != b"PK\x06\x06" or where != at or left != _END64.size - 12 or disks != 1 or disk64:
            raise ValueError("its end record contradicts itself")
    if disk or first or here != count or start + length != at:
        raise ValueError("its directory is not where its end record says")
    return start, length, count


def _read_entry(file: BinaryIO, directory: bytes, at: int) -> tuple[str, Record, int]:
    """An entry of the directory: the record's name, the record, and where the next entry begins."""
    if at + _ENTRY.size > len(directory):
        raise ValueError("its directory is cut off")
    (sign, _, _, flags, method, _, _, crc, packed, size, n_name, n_extra, n_comment, _, _, _, offset) = (
        _ENTRY.unpack_from(directory, at)
    )
    name_at = at + _ENTRY.size
    extra_at = name_at + n_name
    end = extra_at + n_extra + n_comment
    if sign != b"PK\x01\x02" or end > len(directory) or flags & _ENCRYPTED:
        raise ValueError("its directory is damaged")
    packed, size, offset = _wide(directory[extra_at : extra_at + n_extra], [packed, size, offset])
    if method or packed != size:
        raise Compressed("it is compressed")
    name = directory[name_at:extra_at]
    local = _LOCAL.unpack(_read(file, offset, _LOCAL.size))
    start = offset + _LOCAL.size + local[9] + local[10]
    if local[0] != b"PK\x03\x04" or local[3] or _read(file, offset + _LOCAL.size, local[9]) != name:
        raise ValueError("a record is not where its directory says")
    if start + size > os.fstat(file.fileno()).st_size:
        raise ValueError("a record is cut off")
    return name.decode("ascii", "replace"), Record(start, size, crc), end


def _wide(extra: bytes, values: list[int]) -> list[int]:
    """The compressed size, size and offset of an entry. Those that need 64 bits are in its extra field."""
    at = 0
    while _FULL32 in values and at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1:
            # The field's order is size, compressed size, offset; each is there only if it does not fit into the entry.
            for i in (1, 0, 2):
                if values[i] == _FULL32:
                    if at + 8 > len(extra):
                        raise ValueError("its directory is damaged")
                    values[i] = struct.unpack_from("<Q", extra, at)[0]
                    at += 8
            return values
        at += length
    return values


def _read(file: BinaryIO, at: int, length: int) -> bytes:
    if at < 0:
        raise ValueError("it is cut off")
    file.seek(at)
    content = file.read(length)
    if len(content) != length:
        raise ValueError("it is cut off")
    return content
