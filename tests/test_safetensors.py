"""Our own reader and writer of safetensors, beside the package of that name."""

import json
import struct

import pytest
import torch

from mamba2_min.checkpoints.safetensors import load_safetensors, save_safetensors
from mamba2_min.errors import UserError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]
TENSORS = {
    **{f"of {dtype}": (torch.randn(3, 4) * 9).to(dtype) for dtype in DTYPES},
    "a view": torch.randn(5, 4).t()[1:],
    "one number": torch.tensor(2.5),
    "nothing": torch.empty(0, 3),
}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and torch.equal(a[name], b[name]), name


def test_a_round_trip_and_the_packages_reader(tmp_path):
    save_safetensors(tmp_path / "x", TENSORS, {"format": "pt", "who": "né"})
    tensors, metadata = load_safetensors(tmp_path / "x")
    same(tensors, TENSORS)
    assert metadata == {"format": "pt", "who": "né"}
    package = pytest.importorskip("safetensors.torch")
    same(package.load_file(tmp_path / "x"), TENSORS)


def test_what_the_package_wrote(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    tensors = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    package.save_file(tensors, tmp_path / "x", {"format": "pt"})
    same(load_safetensors(tmp_path / "x")[0], TENSORS)


def test_a_dtype_that_the_format_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="complex64"):
        save_safetensors(tmp_path / "x", {"c": torch.zeros(1, dtype=torch.complex64)})


def written(path, header, data=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
    return path


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN = {
    "not JSON": (b"{", b""),
    "a list": ([1], b""),
    "header too long": (b"{}", b"", 10**12),
    "unknown dtype": ({"a": {**GOOD, "dtype": "F128"}}, b"\0" * 8),
    "a dtype that is a list": ({"a": {**GOOD, "dtype": ["F32"]}}, b"\0" * 8),
    "shape and bytes differ": ({"a": {**GOOD, "shape": [3]}}, b"\0" * 8),
    "shape that is huge": ({"a": {**GOOD, "shape": [2**40, 2**40]}}, b"\0" * 8),
    "negative": ({"a": {**GOOD, "shape": [-2], "data_offsets": [8, 0]}}, b"\0" * 8),
    "a bool": ({"a": {**GOOD, "shape": [True, 2]}}, b"\0" * 8),
    "beyond the end": ({"a": {**GOOD, "data_offsets": [4, 12]}}, b"\0" * 8),
    "bytes left over": ({"a": GOOD}, b"\0" * 9),
    "overlap": ({"a": GOOD, "b": GOOD}, b"\0" * 8),
    "an entry that is a number": ({"a": 3}, b"\0" * 8),
    "deep": (b'{"a":' * 100_000, b""),
}


@pytest.mark.parametrize("parts", BROKEN.values(), ids=BROKEN)
def test_damage_is_one_line(tmp_path, parts):
    with pytest.raises(UserError, match="not a whole safetensors file") as caught:
        load_safetensors(written(tmp_path / "x", *parts))
    assert "\n" not in str(caught.value)


def test_every_cut_is_noticed(tmp_path):
    save_safetensors(tmp_path / "whole", {"a": torch.randn(3), "b": torch.randn(2, 2)})
    whole = (tmp_path / "whole").read_bytes()
    for length in range(0, len(whole), 3):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(UserError):
            load_safetensors(tmp_path / "cut")


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        load_safetensors(tmp_path / "none")
