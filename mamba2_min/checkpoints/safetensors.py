"""The safetensors format, read and written without the package of that name.

A file is 8 bytes with the length of a header, the header, and the tensors' bytes, row by row, little endian:

    {"__metadata__": {name: text}, "weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}

Nothing in it is code, and every length is checked before a byte is read (the format is specified in the README of
huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from mamba2_min.errors import UserError
from mamba2_min.files import open_regular, parse_json, write_atomically

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, as the format has it


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors and texts about them, atomically.

    Raises UserError where the file cannot be written, ValueError for a dtype that the format does not have.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data, end = [], 0
    for name, tensor in sorted(tensors.items()):
        if tensor.dtype not in _NAMES:
            raise ValueError(f"safetensors has no {tensor.dtype}, the dtype of {name}")
        content = _bytes_of(tensor)
        offsets = [end, end := end + len(content)]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data.append(content)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors then begin at a multiple of 8

    def write(file: Any) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for content in data:
            file.write(content)

    write_atomically(path, write)


def load_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the metadata of a file. Raises UserError, one line, for a damaged file."""
    try:
        with open_regular(path) as file:
            length = os.fstat(file.fileno()).st_size
            header, start = _read_header(file, length)
            places = {name: _place(entry, length - start) for name, entry in header.items() if name != "__metadata__"}
            if sum(end - begin for _, _, begin, end in places.values()) != length - start:
                raise ValueError("its tensors overlap or leave bytes over")
            tensors = {name: _read_tensor(file, start, *place) for name, place in places.items()}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RuntimeError) as error:  # the latter for shapes that torch cannot have
        raise UserError(f"{path} is not a whole safetensors file: {str(error).splitlines()[0][:200]}") from error
    metadata = header.get("__metadata__", {})
    return tensors, {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}


def _bytes_of(tensor: Tensor) -> bytes:
    if sys.byteorder != "little":
        raise ValueError("safetensors files are little endian, and this machine is not")
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _read_header(file: Any, length: int) -> tuple[dict[str, Any], int]:
    first = file.read(8)
    size = struct.unpack("<Q", first)[0] if len(first) == 8 else _MAX_HEADER + 1
    if size > min(_MAX_HEADER, length - 8):
        raise ValueError("its header is longer than the file")
    header = parse_json(file.read(size))
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return header, 8 + size


def _place(entry: Any, most: int) -> tuple[torch.dtype, list[int], int, int]:
    """A tensor's dtype and shape, and where its bytes begin and end after the header."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or entry["dtype"] not in _DTYPES:
        raise ValueError("a tensor has no known dtype")
    dtype, shape, offsets = _DTYPES[entry["dtype"]], entry.get("shape"), entry.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError("a tensor's shape or place is not a list of integers >= 0")
    begin, end = offsets
    if end - begin != math.prod(shape) * torch.empty((), dtype=dtype).element_size() or end > most:
        raise ValueError("a tensor's shape does not match its bytes")
    return dtype, shape, begin, end


def _read_tensor(file: Any, start: int, dtype: torch.dtype, shape: list[int], begin: int, end: int) -> Tensor:
    file.seek(start + begin)
    content = bytearray(file.read(end - begin))
    return torch.frombuffer(content, dtype=dtype).reshape(shape) if content else torch.empty(shape, dtype=dtype)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and len(values) <= 64 and all(type(v) is int and 0 <= v < 1 << 48 for v in values)
