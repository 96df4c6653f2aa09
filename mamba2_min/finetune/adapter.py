"""An adapter on disk: what fine-tuning changed, a fraction of the model's size, and the model that it belongs to.

    adapter_config.json         what it is: LoRA in the keys of the package peft, or an initial state
    adapter_model.safetensors   its tensors, LoRA's under peft's names, and the digest of the base model

A LoRA adapter for in_proj loads in peft on the same model in the Hugging Face layout, and one from there loads here.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba2_min import validate
from mamba2_min.checkpoints.safetensors import load_safetensors, save_safetensors
from mamba2_min.errors import UserError
from mamba2_min.files import is_file, is_folder, load_json, make_folder, save_json
from mamba2_min.finetune.initial_state import TunedStateLM
from mamba2_min.finetune.lora import LoRAConfig, LoRALinear, adapters, add_lora
from mamba2_min.finetune.token_rows import mark_rows, put_rows, rows_of, trained_tokens
from mamba2_min.models.mamba2 import Mamba2LM

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # what peft puts before the names of the model that it wraps
_STATE = "INITIAL_STATE"  # our own peft_type
_TABLE = "embeddings"  # what the Hugging Face layout calls the table of words
_ROWS = f"{_PREFIX}backbone.{_TABLE}.token_adapter.trainable_tokens_delta"  # the rows, not differences
DIGEST = "base_sha256"

# Keys of peft's LoraConfig that change what the adapter computes, each with the values under which it does not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
    "layers_pattern": (None, [], ""),
    "lora_bias": (False, None),
    "target_parameters": (None, []),
    "exclude_modules": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
}


def base_digest(model: Mamba2LM) -> str:
    """The sha256, in hexadecimal, of the base model's shape and weights, without adapters."""
    digest = hashlib.sha256(repr(sorted(model.config.to_dict().items())).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if ".lora_" not in name and not name.startswith("first_state."):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_adapter(folder: str | Path, model: Mamba2LM, base: str | Path, lora: LoRAConfig | None, digest: str) -> None:
    """Writes the adapter of `model`: LoRA, or the initial state where `lora` is None.

    base: the folder of the base model; digest: its `base_digest`. Raises UserError where the folder cannot be written.
    """
    folder = make_folder(folder)
    common = {"base_model_name_or_path": str(base), "inference_mode": True}
    if lora is None:
        config = {"peft_type": _STATE, **common}
    else:
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": lora.r,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "target_modules": list(lora.targets),
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            **common,
        }
        if trained_tokens(model):
            config["trainable_token_indices"] = {_TABLE: list(trained_tokens(model))}
    save_safetensors(folder / WEIGHTS, adapter_tensors(model), {"format": "pt", DIGEST: digest})
    save_json(folder / CONFIG, config)  # last: without it a folder holds no adapter


def adapter_tensors(model: Mamba2LM) -> dict[str, Tensor]:
    """The trained tensors of a model with an adapter, under the names that the file has."""
    if isinstance(model, TunedStateLM):
        return {f"first_state.{i}": state.detach() for i, state in enumerate(model.first_state)}
    found = {
        f"{_PREFIX}{name}.{part}.weight": getattr(module, part).weight.detach()
        for name, module in adapters(model)
        for part in ("lora_A", "lora_B")
    }
    return {**found, _ROWS: rows_of(model)} if trained_tokens(model) else found


def put_tensors(model: Mamba2LM, tensors: dict[str, Tensor]) -> None:
    """Puts what `adapter_tensors` gave into the model, in place. Raises ValueError where they do not match."""
    copy_tensors(tensors, adapter_tensors(model))
    if trained_tokens(model):
        put_rows(model, tensors[_ROWS])


def read_config(folder: str | Path) -> dict[str, Any]:
    """An adapter's config. Raises UserError where the folder holds none."""
    path = Path(folder) / CONFIG
    if not is_file(path):
        raise UserError(f"{folder} holds no {CONFIG}: no adapter was saved there")
    values = load_json(path)
    if not isinstance(values, dict) or values.get("peft_type") not in ("LORA", _STATE):
        raise UserError(f"{path} describes no adapter that this program knows: LORA or {_STATE}")
    return values


def load_base(folder: str | Path, base: str | Path | None = None) -> tuple[Mamba2LM, str]:
    """The base model that an adapter names, or the one in `base`, and its folder. Raises UserError."""
    source = str(base or read_config(folder).get("base_model_name_or_path", ""))
    if not source or not is_folder(source):
        raise UserError(f"the base of {folder} is {source[:200] or 'not named'}, which is not a folder here; name it")
    return Mamba2LM.from_pretrained(source), source


def load_adapter(folder: str | Path, model: Mamba2LM) -> Mamba2LM:
    """Puts the adapter of a folder on its base `model`, in place, and returns that.

    Raises UserError for a broken file, an adapter of another base, and one that asks for what is not here.
    """
    folder = Path(folder)
    values = read_config(folder)
    tensors, metadata = load_safetensors(folder / WEIGHTS)
    if DIGEST in metadata and metadata[DIGEST] != base_digest(model):
        raise UserError(
            f"{folder} is an adapter of another base model: of {str(values.get('base_model_name_or_path'))[:200]} as it"
            " was when the adapter was trained"
        )
    try:
        if values["peft_type"] == _STATE:
            model = TunedStateLM.of(model)
        else:
            add_lora(model, _lora_config(values))
            tokens = _tokens(values.get("trainable_token_indices"))
            if tokens:
                mark_rows(model, tokens)
        put_tensors(model, tensors)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    return model.requires_grad_(False)


def _lora_config(values: dict[str, Any]) -> LoRAConfig:
    for key, neutral in _NEUTRAL.items():
        if key in values and values[key] not in neutral:
            raise ValueError(f"it sets {key} to {str(values[key])[:60]}, which is not supported here")
    targets = values.get("target_modules")
    if not isinstance(targets, list):
        raise ValueError("its target_modules are not a list of names")
    r = validate.integer("its r", values.get("r"), 1, 1 << 16)
    alpha = validate.number("its lora_alpha", values.get("lora_alpha"), 0, math.inf)
    if values.get("use_rslora"):  # scaled by alpha / sqrt(r)
        alpha *= math.sqrt(r)
    return LoRAConfig(r, float(alpha), 0.0, tuple(targets))


def _tokens(value: Any) -> list[int]:
    """The tokens of peft's trainable_token_indices: a list, or a list by the table's name."""
    if isinstance(value, dict) and value.keys() <= {_TABLE, "embedding"} and len(value) < 2:
        value = next(iter(value.values()), None)
    if value is None:
        return []
    if not isinstance(value, list) or not all(type(i) is int for i in value) or sorted(set(value)) != value:
        raise ValueError("its trainable_token_indices are not a list of tokens in order, of the embedding alone")
    return value


def check_tensors(tensors: dict[Any, Any], targets: dict[str, Tensor]) -> None:
    """Raises ValueError unless `tensors` has the names and shapes of `targets`, and finite numbers."""
    for name, target in targets.items():
        if name not in tensors:
            raise ValueError(f"it lacks the tensor {name}")
        if not isinstance(tensors[name], Tensor) or not tensors[name].dtype.is_floating_point:
            raise ValueError(f"{name} is not a tensor of floats")
        if tensors[name].shape != target.shape:
            raise ValueError(f"{name} is {tuple(tensors[name].shape)}, and the model needs {tuple(target.shape)}")
        if not tensors[name].isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")
    for name in tensors:
        if name not in targets:
            raise ValueError(f"it holds the unexpected tensor {name!r}")


@torch.no_grad()
def copy_tensors(tensors: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
    """Copies `tensors` into `targets` in place. Raises ValueError where they do not match."""
    check_tensors(tensors, targets)
    for name, target in targets.items():
        target.copy_(tensors[name])


def has_adapter(model: Mamba2LM) -> bool:
    """Whether a model has LoRA adapters or a learnt initial state."""
    return isinstance(model, TunedStateLM) or any(isinstance(m, LoRALinear) for m in model.modules())
