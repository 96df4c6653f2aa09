"""A model and a run on disk: what their files are called, and loading that never runs what it reads."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from mamba2_min.checkpoints import layouts
from mamba2_min.config import Mamba2Config
from mamba2_min.errors import UserError
from mamba2_min.files import load_json, make_folder, save_json, write_atomically

if TYPE_CHECKING:
    from torch import nn

CONFIG, WEIGHTS, TOKENIZER, RESUME, METRICS, CURVE, SETTINGS = (
    "config.json",
    "model.pt",
    "tokenizer.json",
    "last.pt",
    "metrics.jsonl",
    "loss.png",
    "settings.json",
)
RUN_FILES = (CONFIG, WEIGHTS, TOKENIZER, RESUME, METRICS, CURVE, SETTINGS)


def save_tensors(path: str | Path, value: Any) -> None:
    """`torch.save`, atomically: the old file stays until the new one is on disk and has been read back."""

    def write(file: BinaryIO) -> None:
        recorder = _Recorder(file)
        try:
            torch.save(value, recorder)
        except RuntimeError as error:  # how torch reports any failure to write, without its cause
            raise recorder.error or error from None
        file.flush()
        damaged = zipfile.ZipFile(file).testzip()  # compares every record with its checksum
        if damaged:
            raise OSError(f"{damaged} was not read back as it was written")

    write_atomically(path, write)


class _Recorder:
    """Passes what is written on to a file, and remembers the error that ended it."""

    def __init__(self, file: BinaryIO):
        self.file, self.error = file, None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def load_tensors(path: str | Path) -> Any:
    """What `save_tensors` wrote, on the CPU; code in the file is refused, never run, and no more memory is taken than
    the file is long. Raises UserError."""
    try:
        with open(path, "rb") as file:
            bomb = _is_inflated(file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # an archive's directory may be damaged in any way
        raise UserError(f"{path} is not a whole checkpoint: {_first_line(error)}") from error
    if bomb:
        raise UserError(f"{path} is compressed, which no checkpoint is; it was not loaded")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a foreign file's details; what counts is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds something other than tensors and numbers; it was not loaded") from error
    except Exception as error:  # a truncated or foreign file fails in torch's reader in many ways
        raise UserError(f"{path} is not a whole checkpoint: {_first_line(error)}") from error


def _is_inflated(file: BinaryIO) -> bool:
    """Whether a file is an archive whose records are longer than itself: torch never compresses, bombs do."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return sum(record.file_size for record in archive.infolist()) > os.fstat(file.fileno()).st_size


def save_model(folder: str | Path, config: Mamba2Config, weights: dict[str, Tensor], format: str = "own") -> None:
    """Writes a model's config and weights into a folder, which is made if need be.

    format: "own" (config.json, model.pt), "official" (config.json, pytorch_model.bin: state-spaces' mamba_ssm) or "hf"
    (config.json, model.safetensors: transformers). The official layout drops a_init and dropout, which only training
    reads. Raises UserError where a layout cannot say what the weights need, where the folder holds a model in another
    layout, or where it cannot be written; ValueError for any other format.
    """
    if format not in layouts.WEIGHT_FILES:
        raise ValueError(f"format must be one of {', '.join(layouts.WEIGHT_FILES)}, not {format!r}")
    try:
        values = layouts.config_to(format, config)
    except ValueError as error:
        raise UserError(f'the model cannot be saved in the layout "{format}": {error}') from error
    folder = make_folder(folder)
    if (folder / CONFIG).exists() and _read_config(folder)[0] != format:
        raise UserError(f"{folder} holds a model in another layout, which this one would break; choose another folder")
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    weights = layouts.weights_to(format, config, on_cpu)
    path = folder / layouts.WEIGHT_FILES[format][0]
    if format == "hf":
        data = _safetensors(path).save(weights, metadata={"format": "pt"})
        write_atomically(path, lambda file: file.write(data))
        save_json(folder / "generation_config.json", layouts.hf_generation_config(config))
    else:
        save_tensors(path, weights)
    save_json(folder / CONFIG, values)  # last: without it a folder holds no model


def load_model(folder: str | Path) -> tuple[Mamba2Config, dict[str, Tensor]]:
    """The config and the weights in a folder of any of the three layouts, under our names and on the CPU.

    The weights are all there, finite, and of the shapes that the config asks for; no more memory is taken than the
    files hold. Raises UserError where anything is missing, damaged, at odds with the rest, or asks for what a
    `Mamba2LM` does not have.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; train a model first, or name the folder of one")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} holds no {CONFIG}: no model was saved there")
    layout, values = _read_config(folder)
    try:
        config = layouts.config_from(layout, values)
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: {_first_line(error)}") from error
    files = layouts.WEIGHT_FILES[layout]
    path = next((folder / name for name in files if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds no {' or '.join(files)}: no model was saved there")
    weights = _read_weights(path)
    try:
        weights = layouts.with_tied_head(layouts.weights_from(layout, weights), config.tie_embeddings)
        layouts.check_shapes(layouts.parameter_shapes(config), weights)
        layouts.check_tensors(weights, config.tie_embeddings)
    except ValueError as error:
        raise UserError(f"{path}: {_first_line(error)}") from error
    return config, weights


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Copies weights into a model, whose dtype they take. Raises UserError for the first name or shape that differs."""
    weights = layouts.with_tied_head(weights, model.config.tie_embeddings)
    try:
        layouts.check_shapes(((name, tensor.shape) for name, tensor in model.state_dict().items()), weights)
    except ValueError as error:
        raise UserError(f"{source}: {_first_line(error)}") from error
    model.load_state_dict(weights)


def _read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """The layout of a folder's config.json, and what it says."""
    values = load_json(folder / CONFIG)
    if not isinstance(values, dict):
        raise UserError(f"{folder / CONFIG} is not a JSON object: it describes no model")
    return layouts.layout_of(values), values


def _read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of one file, or of the shards that an index names."""
    files = [path]
    if path.name.endswith(layouts.INDEX):
        try:
            files = [path.parent / name for name in layouts.shards(load_json(path))]
        except ValueError as error:
            raise UserError(f"{path}: {_first_line(error)}") from error
    weights: dict[str, Tensor] = {}
    for file in files:
        part = _read_safetensors(file) if file.suffix == ".safetensors" else load_tensors(file)
        if not isinstance(part, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in part.items()):
            raise UserError(f"{file} is not a model's weights")
        for name in part:
            if name in weights:
                raise UserError(f"{file} holds the tensor {name!r}, which another shard holds too")
        weights.update(part)
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    safetensors = _safetensors(path)
    try:
        return safetensors.load_file(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or _first_line(error)}") from error
    except Exception as error:  # its reader is not Python's, and has errors of its own
        raise UserError(f"{path} is not a whole checkpoint: {_first_line(error)}") from error


def _safetensors(path: Path) -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError(f'{path} needs the package safetensors: pip install "mamba2-min[hf]"') from error
    return safetensors.torch


def _first_line(error: Exception) -> str:
    """What an exception says, in a line that fits a screen."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
