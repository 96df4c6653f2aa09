"""A model and a run on disk: what their files are called, and loading that never runs what it reads."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from mamba2_min import files
from mamba2_min.checkpoints import archive, layouts, pickles
from mamba2_min.checkpoints import weights as tensors
from mamba2_min.config import Mamba2Config
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError
from mamba2_min.files import load_json, make_folder, save_json, write_atomically

if TYPE_CHECKING:
    from mamba2_min.models.base import LanguageModel

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
    """`torch.save`, atomically: the old file stays until the new one is on disk, was read back, and can be loaded."""

    def write(file: BinaryIO) -> None:
        recorder = _Recorder(file)
        try:
            torch.save(value, cast(IO[bytes], recorder))
        except RuntimeError as error:  # how torch reports any failure to write, without its cause
            raise recorder.error or error from None
        file.flush()
        try:
            damaged = archive.damaged_record(file, _check_archive(file))
        except pickles.ForeignObject as error:
            raise UserError(f"{path} was not written: it would hold {error}, which is not loaded again") from error
        except ValueError as error:
            raise UserError(f"{path} was not written: {error}") from error
        if damaged:
            raise OSError(f"{damaged} was not read back as it was written")

    write_atomically(path, write)


class _Recorder:
    """Passes what is written on to a file, and remembers the error that ended it."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def load_tensors(path: str | Path, max_bytes: int | None = None) -> Any:
    """What `save_tensors` wrote, on the CPU. Raises UserError for anything else.

    Code in the file is refused, never run. Before torch reads the file, archive.py and pickles.py check that it takes
    no more memory than it is long, and that it holds a tree of tensors and plain values. torch's format of before 2020
    cannot be checked like that and is refused.
    """
    with files.open_regular(path, max_bytes) as file:
        try:
            if archive.is_legacy(file):
                hint = "load and save it again with torch, which then writes the format of today"
                raise UserError(f"{path} is in torch's format of before 2020, which is not read here: {hint}")
            _check_archive(file)
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about details of foreign files; real problems are errors below
                return _without_gradients(torch.load(file, map_location="cpu", weights_only=True))
        except UserError:
            raise
        except (pickles.ForeignObject, pickle.UnpicklingError) as error:
            what = f" ({_first_line(error)})" if isinstance(error, pickles.ForeignObject) else ""
            raise UserError(
                f"{path} holds something other than tensors and numbers{what}; it was not loaded"
            ) from error
        except archive.Compressed as error:
            raise UserError(f"{path} is compressed, which no checkpoint is; it was not loaded") from error
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        except Exception as error:  # a truncated or foreign file fails in torch's reader in many ways
            raise UserError(f"{path} is not a whole checkpoint: {_first_line(error)}") from error


def _without_gradients(tree: Any) -> Any:
    """The same tree. A tensor in it may say that it wants a gradient; what is loaded is data, and wants none."""
    left = [tree]
    while left:
        one = left.pop()
        if isinstance(one, Tensor):
            one.requires_grad_(False)
        elif isinstance(one, (dict, list, tuple)):
            left += one.values() if isinstance(one, dict) else one
    return tree


def _check_archive(file: BinaryIO) -> dict[str, archive.Record]:
    """The records of an archive that may be read. Raises ValueError for any other."""
    records = archive.read_directory(file)
    if "data.pkl" not in records:
        raise ValueError("it has no data.pkl")
    sizes = {name.removeprefix("data/"): one.size for name, one in records.items() if name.startswith("data/")}
    pickles.check(archive.read_record(file, records["data.pkl"]), sizes)
    return records


def plain_model(model: nn.Module) -> LanguageModel:
    """The model in what torch.compile, DataParallel and the like wrap around it, ready to be trained and saved.

    A head that the config ties to the embedding, and that load_state_dict(assign=True) has untied, is tied again.
    Raises UserError where the weights are not those that the config asks for, because the trained model could not be
    saved: with an adapter around a projection, for example, or a tied head with values of its own.
    """
    while isinstance(inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None), nn.Module):
        model = inner
    config: Any = getattr(model, "config", None)
    try:
        if not isinstance(getattr(model, "lm_head", None), nn.Module) or not hasattr(config, "tie_embeddings"):
            raise ValueError(
                f"it is a {type(model).__name__}, not a language model of this package or a wrapper of one"
            )
        weights = tensors.with_plain_names(model.state_dict())
        if isinstance(config, Mamba2Config):
            tensors.check_shapes(tensors.parameter_shapes(config), weights)
        for name, tensor in weights.items():
            tensors.check_kind(name, tensor, anywhere=True)
        lm = cast("LanguageModel", model)
        if config.tie_embeddings and weights[tensors.HEAD].data_ptr() != weights[tensors.EMBEDDING].data_ptr():
            if not tensors.same(weights[tensors.HEAD], weights[tensors.EMBEDDING]):
                raise ValueError("its config ties the head to the embedding, and they differ; say tie_embeddings=False")
            lm.lm_head.weight = cast(nn.Parameter, lm.get_parameter("backbone.embedding.weight"))
    except ValueError as error:
        raise UserError(f"the model cannot be trained, for it could not be saved: {_first_line(error)}") from error
    return lm


def save_model(folder: str | Path, config: Mamba2Config, weights: dict[str, Tensor], format: str = "own") -> None:
    """Writes a model's config and weights into a folder, which is created if it is missing.

    format: "own" (config.json, model.pt), "official" (config.json, pytorch_model.bin: state-spaces' mamba_ssm) or "hf"
    (config.json, model.safetensors: transformers). The official layout drops what only training reads: a_init and the
    dropouts. Raises UserError where a layout cannot say what the weights need, where the folder holds a model in
    another layout, or where it cannot be written; ValueError for any other format.
    """
    if format not in layouts.WEIGHT_FILES:
        raise ValueError(f"format must be one of {', '.join(layouts.WEIGHT_FILES)}, not {format!r}")
    try:
        config, weights = _savable(config, weights)
        values = layouts.config_to(format, config)
    except ValueError as error:
        raise UserError(f'the model cannot be saved in the layout "{format}": {_first_line(error)}') from error
    folder = make_folder(folder)
    if files.exists(folder / CONFIG) and _read_config(folder)[0] != format:
        raise UserError(f"{folder} holds a model in another layout, which this one would break; choose another folder")
    weights = layouts.weights_to(format, config, weights)
    path = folder / layouts.WEIGHT_FILES[format][0]
    if format == "hf":
        data = _safetensors(path).save(weights, metadata={"format": "pt"})
        write_atomically(path, lambda file: file.write(data))
        save_json(folder / "generation_config.json", layouts.hf_generation_config(config))
    else:
        save_tensors(path, weights)
    save_json(folder / CONFIG, values)  # last: without it a folder holds no model


def _savable(config: Mamba2Config, weights: dict[str, Tensor]) -> tuple[Mamba2Config, dict[str, Tensor]]:
    """The weights as `load_model` will accept them, and their config. Raises ValueError where no config fits.

    A head that differs from the embedding, although the config ties them, is saved with tie_embeddings=False.
    """
    weights = tensors.with_plain_names(weights)
    for name, tensor in weights.items():
        tensors.check_kind(name, tensor, anywhere=True)
    weights = tensors.unshared(weights)
    head, embedding = weights.get(tensors.HEAD), weights.get(tensors.EMBEDDING)
    if config.tie_embeddings and head is not None and embedding is not None and not tensors.same(head, embedding):
        config = dataclasses.replace(config, tie_embeddings=False)
    if isinstance(config, Mamba2Config):  # a TransformerConfig is saved here too
        weights = tensors.with_tied_head(weights, config.tie_embeddings)
        tensors.check_shapes(tensors.parameter_shapes(config), weights)
    tensors.check_tensors(weights, config.tie_embeddings)
    return config, weights


def load_model(folder: str | Path) -> tuple[Mamba2Config, dict[str, Tensor]]:
    """The config and the weights in a folder of any of the three layouts, under our names and on the CPU.

    The weights are complete, finite, and of the shapes that the config asks for; loading takes no more memory than the
    files hold. Raises UserError where anything is missing, damaged or contradicts the rest, or asks for what a
    `Mamba2LM` does not have.
    """
    folder = Path(folder)
    layout, config = _checked_config(folder)
    names = layouts.WEIGHT_FILES[layout]
    path = next((folder / name for name in names if files.is_file(folder / name)), None)
    if path is None:
        raise UserError(f"{folder} holds no {' or '.join(names)}: no model was saved there")
    try:
        weights = tensors.with_plain_names(_read_weights(path, _most_bytes(config)))
        weights = tensors.with_tied_head(weights, config.tie_embeddings)
        tensors.check_shapes(tensors.parameter_shapes(config), weights)
        tensors.check_tensors(weights, config.tie_embeddings)
    except ValueError as error:
        raise UserError(f"{path}: {_first_line(error)}") from error
    return config, weights


def load_config(folder: str | Path) -> Mamba2Config:
    """The config of the model in a folder of any layout, without its weights. Raises UserError as `load_model`."""
    return _checked_config(Path(folder))[1]


def load_tokenizer(folder: str | Path, vocab_size: int) -> WordTokenizer:
    """The tokenizer beside a model of `vocab_size`. Raises UserError where there is none of ours, or another's."""
    path = Path(folder) / TOKENIZER
    if not files.is_file(path):
        raise UserError(f"{folder} holds no {TOKENIZER}: to train on, a model needs the words that it knows")
    tokenizer = WordTokenizer.load(path)
    if len(tokenizer) != vocab_size:
        raise UserError(f"the tokenizer in {folder} has {len(tokenizer)} tokens and the model {vocab_size}")
    return tokenizer


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Copies weights into a model, whose dtype they take. Raises UserError for the first name or shape that differs."""
    config: Any = model.config
    own = model.state_dict()
    try:
        weights = tensors.with_tied_head(tensors.with_plain_names(weights), config.tie_embeddings)
        expected = tensors.with_plain_names(own)
        tensors.check_shapes(((name, tuple(tensor.shape)) for name, tensor in expected.items()), weights)
    except ValueError as error:
        raise UserError(f"{source}: {_first_line(error)}") from error
    model.load_state_dict({name: weights[tensors.plain_name(name)] for name in own})


def _most_bytes(config: Mamba2Config) -> int:
    """An upper bound on the bytes of a config's weights in a file: float64, a tied head twice, and some room."""
    tied = config.padded_vocab_size * config.d_model
    return 8 * (config.num_parameters() + tied) + 4096 * (16 * config.n_layer + 256)


def _checked_config(folder: Path) -> tuple[str, Mamba2Config]:
    """The layout of the model in a folder, and its config. Raises UserError."""
    if not files.is_folder(folder):
        raise UserError(f"{folder} is not a folder; train a model first, or name the folder of one")
    if not files.is_file(folder / CONFIG):
        files.names_in(folder)  # says so where the folder cannot be read
        raise UserError(f"{folder} holds no {CONFIG}: no model was saved there")
    layout, values = _read_config(folder)
    try:
        config = layouts.config_from(layout, values)
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: {_first_line(error)}") from error
    return layout, config


def _read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """The layout of a folder's config.json, and what it says."""
    values = load_json(folder / CONFIG)
    if not isinstance(values, dict):
        raise UserError(f"{folder / CONFIG} is not a JSON object: it describes no model")
    return layouts.layout_of(values), values


def _read_weights(path: Path, most: int) -> dict[str, Tensor]:
    """All tensors of one file of at most `most` bytes, or of the shards that an index names. Raises ValueError too."""
    paths = [path]
    if path.name.endswith(layouts.INDEX):
        paths = [path.parent / name for name in layouts.shards(load_json(path))]
    weights: dict[str, Tensor] = {}
    for one in paths:
        part = _read_safetensors(one, most) if one.suffix == ".safetensors" else load_tensors(one, most)
        if not isinstance(part, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in part.items()):
            inner = [key for key in ("state_dict", "model", "model_state_dict") if _is_dict_of_tensors(part, key)]
            if inner:
                raise ValueError(f"its tensors are one level down, under {inner[0]!r}; save that dictionary alone")
            raise UserError(f"{one} is not a dictionary of tensors")
        for name in part:
            if name in weights:
                raise ValueError(f"{one.name} holds {name!r}, which another shard holds too")
        weights |= part
        most -= sum(tensor.nbytes for tensor in part.values())
    return weights


def _is_dict_of_tensors(values: Any, key: str) -> bool:
    inner = values.get(key) if isinstance(values, dict) else None
    return isinstance(inner, dict) and bool(inner) and all(isinstance(tensor, Tensor) for tensor in inner.values())


def _read_safetensors(path: Path, most: int) -> dict[str, Tensor]:
    safetensors = _safetensors(path)
    files.open_regular(path, most).close()
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
