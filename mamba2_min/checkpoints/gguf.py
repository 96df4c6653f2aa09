"""GGUF, the file format of llama.cpp and Ollama: key-value pairs and tensors in one file (version 3).

    magic, version, counts │ key, type, value │ name, dimensions, type, offset │ padding │ tensor, padding, tensor ...
                             for every pair     for every tensor                 all tensor data is aligned to 32 bytes

Types follow from the values: str, bool, int (uint32), float (float32), list of str, list of int (int32); and from the
arrays' dtypes: float32, float16, and `Q8_0`, blocks of 32 numbers in 8 bits each that share a scale.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mamba2_min.errors import UserError
from mamba2_min.files import write_atomically

Value = str | bool | int | float | list[str] | list[int]

BLOCK = 32
Q8_0 = np.dtype([("scale", "<f2"), ("numbers", "i1", BLOCK)])
_TENSOR_TYPES: dict[np.dtype, int] = {np.dtype("<f4"): 0, np.dtype("<f2"): 1, Q8_0: 8}
_MAGIC, _VERSION, _ALIGNMENT = b"GGUF", 3, 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


def write_gguf(path: str | Path, metadata: Mapping[str, Value], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a GGUF file, atomically: it counts as written once it was read back and is equal.

    tensors: float32, float16 or `Q8_0` arrays by name, of one dimension or more. Raises UserError where the file cannot
    be written, ValueError for values that the format cannot hold.
    """
    metadata = {key: float(np.float32(value)) if type(value) is float else value for key, value in metadata.items()}
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    header = _header(metadata, arrays)

    def write(file: BinaryIO) -> None:
        file.write(header)
        for array in arrays.values():
            file.write(_raw(array).data)
            file.write(bytes(-array.nbytes % _ALIGNMENT))
        file.flush()
        found, read = read_gguf(file.name)
        same = found == metadata and list(read) == list(arrays)
        if not same or not all(np.array_equal(_raw(read[name]), _raw(array)) for name, array in arrays.items()):
            raise OSError("it was not read back as it was written")

    write_atomically(path, write)


def read_gguf(path: str | Path) -> tuple[dict[str, Value], dict[str, np.ndarray]]:
    """The pairs and the tensors (mapped from the file, not copied) of a GGUF file with the types that are named above.

    Raises UserError for anything else.
    """
    try:
        content = np.memmap(path, np.uint8, "r")
        reader = _Reader(content)
        magic, version, count, pairs = reader.unpack("<4sIQQ")
        if (magic, version) != (_MAGIC, _VERSION):
            raise ValueError("it does not begin as a GGUF file of version 3 does")
        metadata = {reader.string(): reader.value(*reader.unpack("<I")) for _ in range(pairs)}
        infos = [reader.tensor_info() for _ in range(count)]
        begin = reader.at + -reader.at % _ALIGNMENT
        tensors = {}
        for name, shape, dtype, offset in infos:
            size = int(np.prod(shape)) * dtype.itemsize
            data = content[begin + offset : begin + offset + size]
            if len(data) < size:
                raise ValueError(f"it ends within the tensor {name}")
            tensors[name] = data.view(dtype).reshape(shape)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, struct.error, KeyError, MemoryError) as error:
        raise UserError(f"{path} is not a GGUF file that this program can read: {error}") from error
    return metadata, tensors


def quantize_q8_0(x: np.ndarray) -> np.ndarray:
    """float32 (..., n) -> `Q8_0` (..., n / 32): each block's largest magnitude becomes 127. n is a multiple of 32."""
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)  # (..., n / 32, 1)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    scaled = blocks * inverse
    quantized = np.empty(blocks.shape[:-1], Q8_0)
    quantized["scale"] = scale[..., 0]
    quantized["numbers"] = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))  # halves away from zero
    return quantized


def dequantize_q8_0(x: np.ndarray) -> np.ndarray:
    """`Q8_0` (..., n / 32) -> float32 (..., n)."""
    numbers = x["numbers"] * x["scale"].astype(np.float32)[..., None]  # (..., n / 32, 32)
    return numbers.reshape(*x.shape[:-1], -1)


def _header(metadata: Mapping[str, Value], arrays: Mapping[str, np.ndarray]) -> bytes:
    parts = [struct.pack("<4sIQQ", _MAGIC, _VERSION, len(arrays), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(value)]
    offset = 0
    for name, array in arrays.items():
        if array.dtype not in _TENSOR_TYPES or not 1 <= array.ndim <= 4:
            raise ValueError(f"a tensor of {array.dtype} and {array.ndim} dimensions has no place in this file")
        dimensions = [*reversed(_numbers(array))]
        parts.append(_string(name) + struct.pack(f"<I{array.ndim}Q", array.ndim, *dimensions))
        parts.append(struct.pack("<IQ", _TENSOR_TYPES[array.dtype], offset))
        offset += array.nbytes + -array.nbytes % _ALIGNMENT
    header = b"".join(parts)
    return header + bytes(-len(header) % _ALIGNMENT)


def _numbers(array: np.ndarray) -> tuple[int, ...]:
    """The shape in numbers, not in blocks of them."""
    return (*array.shape[:-1], array.shape[-1] * (BLOCK if array.dtype == Q8_0 else 1))


def _raw(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    """The type and the value. bool comes before int, because a bool is an int in Python."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if all(isinstance(item, int) for item in value) and value:
        return struct.pack("<IIQ", _ARRAY, _INT32, len(value)) + np.array(value, "<i4").tobytes()
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join([_string(str(item)) for item in value])


class _Reader:
    """Reads one value after the other from `content` (bytes,); `at` is where the next one begins."""

    def __init__(self, content: np.ndarray):
        self.content, self.at = content, 0

    def take(self, size: int) -> bytes:
        data = self.content[self.at : self.at + size].tobytes()
        if len(data) < size:
            raise ValueError("it ends too soon")
        self.at += size
        return data

    def unpack(self, form: str) -> tuple:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def string(self) -> str:
        return self.take(*self.unpack("<Q")).decode()

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.string()
        if kind in (_BOOL, _UINT32, _FLOAT32):
            return self.unpack({_BOOL: "<?", _UINT32: "<I", _FLOAT32: "<f"}[kind])[0]
        if kind != _ARRAY:
            raise ValueError(f"it has a value of type {kind}")
        kind, length = self.unpack("<IQ")
        if kind == _STRING:
            return [self.string() for _ in range(length)]
        if kind != _INT32:
            raise ValueError(f"it has an array of type {kind}")
        return np.frombuffer(self.take(4 * length), "<i4").tolist()

    def tensor_info(self) -> tuple[str, tuple[int, ...], np.dtype, int]:
        """Name, shape of the array, its dtype, and where it begins in the tensor data."""
        name = self.string()
        (dimensions,) = self.unpack("<I")
        shape = list(reversed(self.unpack(f"<{dimensions}Q")))
        kind, offset = self.unpack("<IQ")
        dtypes = [dtype for dtype, number in _TENSOR_TYPES.items() if number == kind]
        if not dtypes or not shape:
            raise ValueError(f"the tensor {name} has the type {kind}")
        if dtypes[0] == Q8_0:
            shape[-1] //= BLOCK
        return name, tuple(shape), dtypes[0], offset
