"""What lies on disk: files that are never half written, and loading that never runs what it reads."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from mamba2_min.config import Mamba2Config
from mamba2_min.errors import UserError

if TYPE_CHECKING:
    from torch import nn

CONFIG, WEIGHTS, TOKENIZER, RESUME, METRICS, CURVE = (
    "config.json", "model.pt", "tokenizer.json", "last.pt", "metrics.jsonl", "loss.png",
)  # fmt: skip


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls `write(file)` on a new file beside `path`, flushes it to disk, and renames it into place.

    Whatever happens, `path` is either what it was or what it should be. Raises UserError where the disk is full or the
    folder cannot be written; the old file is then still there, and the new one is gone.
    """
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        _flush_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    except RuntimeError as error:  # how torch.save reports that a write failed
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


def save_json(path: str | Path, value: Any) -> None:
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()))


def load_json(path: str | Path) -> Any:
    """The value in a JSON file. Raises UserError, with one line, where it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {str(error).splitlines()[0]}") from error


def save_tensors(path: str | Path, value: Any) -> None:
    """`torch.save`, atomically: the old file stays until the new one is on disk and has been read back."""

    def write(file: BinaryIO) -> None:
        torch.save(value, file)
        file.flush()
        damaged = zipfile.ZipFile(file.name).testzip()  # compares every record with its checksum
        if damaged:
            raise OSError(f"{damaged} was not read back as it was written")

    write_atomically(path, write)


def load_tensors(path: str | Path) -> Any:
    """What `save_tensors` wrote, on the CPU; code in the file is refused, never run. Raises UserError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds something other than tensors and numbers; it was not loaded") from error
    except Exception as error:  # a truncated or foreign file fails in torch's reader in many ways
        raise UserError(f"{path} is not a whole checkpoint: {str(error).splitlines()[0][:200]}") from error


def save_model(folder: str | Path, config: Mamba2Config, weights: dict[str, Tensor]) -> None:
    """Writes config.json and model.pt into a folder, which is made if need be."""
    folder = make_folder(folder)
    if config.tie_embeddings:
        weights = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    save_json(folder / CONFIG, config.to_dict())
    save_tensors(folder / WEIGHTS, {name: tensor.detach().cpu() for name, tensor in weights.items()})


def load_model(folder: str | Path) -> tuple[Mamba2Config, dict[str, Tensor]]:
    """The config and the weights in a folder. Raises UserError where either is missing or cannot be understood."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; train a model first, or name the folder of one")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}: no model was saved there")
    values = load_json(folder / CONFIG)
    try:
        config = Mamba2Config.from_dict(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error
    weights = load_tensors(folder / WEIGHTS)
    if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise UserError(f"{folder / WEIGHTS} is not a model's weights")
    return config, weights


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Copies weights into a model; every name and shape must match. Raises UserError for the first that does not."""
    expected = model.state_dict()
    if "lm_head.weight" not in weights and model.config.tie_embeddings:
        weights = {**weights, "lm_head.weight": weights.get("backbone.embedding.weight")}
    for name, tensor in expected.items():
        if weights.get(name) is None:
            raise UserError(f"{source} lacks the tensor {name}")
        if weights[name].shape != tensor.shape:
            raise UserError(
                f"{source}: {name} is {tuple(weights[name].shape)}, and the config asks for {tuple(tensor.shape)}"
            )
    for name in weights:
        if name not in expected:
            raise UserError(f"{source} holds an unexpected tensor {name}")
    model.load_state_dict(weights)


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Makes the folder if need be and holds it for this process alone. Raises UserError where another one holds it.

    The lock is on the open folder itself, so it leaves no file and dies with the process. What an earlier process left
    half written is taken away. Windows has no such lock, and there nothing is held.
    """
    folder = make_folder(folder)
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another training is writing into {folder}; wait for it, or take another --out") from error
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
        yield
    finally:
        os.close(handle)


def make_folder(folder: str | Path) -> Path:
    """The folder, made with its parents if need be. Raises UserError where that cannot be done."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
    return folder


def _flush_folder(folder: Path) -> None:
    """Makes a rename survive a loss of power, where the system lets a folder be flushed (Windows does not)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
