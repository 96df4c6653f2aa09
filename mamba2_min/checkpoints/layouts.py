"""Translation of other programs' Mamba-2 configs and tensor names into ours, and back.

    ours                    official (state-spaces)           Hugging Face (transformers)
    vocab_size              vocab_size                        vocab_size, after padding
    d_model                 d_model                           hidden_size
    n_layer                 n_layer                           num_hidden_layers
    d_state                 ssm_cfg.d_state                   state_size
    d_conv                  ssm_cfg.d_conv                    conv_kernel
    expand                  ssm_cfg.expand                    expand
    headdim                 ssm_cfg.headdim                   head_dim (and num_heads)
    ngroups                 ssm_cfg.ngroups                   n_groups
    tie_embeddings          tie_embeddings                    tie_word_embeddings
    norm_eps                always 1e-5                       layer_norm_epsilon, norm_eps
    norm_before_gate        ssm_cfg.norm_before_gate          always False, norm_before_gate
    norm_per_group          always True                       always True
    weights                 pytorch_model.bin                 model.safetensors, or in shards, or pytorch_model.bin

Where the right column has two names, the second is flash-linear-attention's, which has the same model_type. Nothing
here touches a file: configs are dicts as JSON gives them, weights are dicts of tensors, and what the other format
cannot express is a ValueError of one line. A key that a config leaves out has the default of its own program. Every key
is read, or must have the one value that this model has, or is known not to change the function (config_keys.py); any
other is refused by name.

`norm_per_group`: the norm after the scan runs over each group on its own in the official code, in its kernels, and in
transformers from version 5 on. The slow path of transformers 4 ran it over all channels, which for ngroups > 1 was
another function of the same weights; it is not what those weights were trained with, and not read so here.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from torch import Tensor

from mamba2_min.checkpoints import config_keys as keys
from mamba2_min.checkpoints.weights import EMBEDDING, HEAD, parameter_shapes, with_tied_head
from mamba2_min.config import DROPOUTS, Mamba2Config

__all__ = ["WEIGHT_FILES", "config_from", "config_to", "layout_of", "parameter_shapes", "shards", "weights_to"]

# For each layout, the files that weights may be in: the first that exists counts. An index names the shards.
INDEX = ".index.json"
WEIGHT_FILES = {
    "own": ("model.pt",),
    "official": ("pytorch_model.bin", "model.safetensors"),
    "hf": ("model.safetensors", "model.safetensors" + INDEX, "pytorch_model.bin", "pytorch_model.bin" + INDEX),
}

# What a Hugging Face config has no key for. Ours is kept by transformers, but not read.
_HF_OURS = "mamba2_min"
_HF_OURS_KEYS = ("vocab_size", "pad_vocab_size_multiple", "a_init", *DROPOUTS)
_HF_EMBEDDING = "backbone.embeddings.weight"


def layout_of(values: dict[str, Any]) -> str:
    """Whose config this is: "own", "official" or "hf".

    Keys that shape the model decide, ssm_cfg first: tools of the hub add model_type and architectures to any config.
    """
    if "ssm_cfg" in values:
        return "official"
    if "d_state" in values or "a_init" in values:
        return "own"
    if "model_type" in values or "hidden_size" in values:
        return "hf"
    official = {*keys.OFFICIAL_TOP_OTHER, *keys.FIXED_TOP}
    return "official" if official & values.keys() else "own"


def config_from(layout: str, values: dict[str, Any]) -> Mamba2Config:
    """The config that a layout's config.json means. Raises ValueError where it asks for what a `Mamba2LM` cannot do."""
    return _READERS[layout](values)


def config_to(layout: str, config: Mamba2Config) -> dict[str, Any]:
    """A layout's config.json for a config. Raises ValueError for what that layout cannot express."""
    return _WRITERS[layout](config)


def weights_to(layout: str, config: Mamba2Config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under a layout's names. A tied head is left out, except for the official code, which wants both."""
    if config.tie_embeddings:
        weights = {name: tensor for name, tensor in weights.items() if name != HEAD}
    if layout == "official":
        return with_tied_head(weights, config.tie_embeddings)
    if layout == "hf":
        return {_HF_EMBEDDING if name == EMBEDDING else name: tensor for name, tensor in weights.items()}
    return weights


def shards(index: Any) -> list[str]:
    """The files that an index names, each a plain name within the folder. Raises ValueError for any other."""
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError("it has no weight_map from tensors' names to files' names")
    for name in set(names.values()):
        # Both systems' rules on either system: a folder is copied from one to the other.
        plain = PurePosixPath(name).name == name == PureWindowsPath(name).name and name.isprintable()
        if not plain or not name.endswith((".safetensors", ".bin")):
            raise ValueError(f"it names the shard {name!r}, which is not a file of this folder")
    return sorted(set(names.values()))


def _from_own(values: dict[str, Any]) -> Mamba2Config:
    fields = {field.name for field in dataclasses.fields(Mamba2Config)}
    return Mamba2Config.from_dict({k: value for k, value in values.items() if k in fields or not _harmless(k, value)})


def _to_own(config: Mamba2Config) -> dict[str, Any]:
    return config.to_dict()


def _from_official(values: dict[str, Any]) -> Mamba2Config:
    ssm = values.get("ssm_cfg", {})
    if not isinstance(ssm, dict):
        raise ValueError(f"ssm_cfg must be an object, not {_shown(ssm)}")
    ssm = {"layer": "Mamba1", **ssm}  # the default there
    _require_fixed(values, keys.FIXED_TOP)
    _require_fixed(ssm, keys.FIXED_SSM, "ssm_cfg.")
    _require_no_limit("ssm_cfg.dt_limit", ssm.get("dt_limit"))
    top, layer = _theirs(keys.OFFICIAL_TOP), _theirs(keys.OFFICIAL_SSM)
    _refuse_unknown(values, {*top, *keys.FIXED_TOP, *keys.OFFICIAL_TOP_OTHER})
    _refuse_unknown(ssm, {*layer, *keys.FIXED_SSM, *keys.OFFICIAL_SSM_OTHER}, generic=False)
    fields = _translate(keys.OFFICIAL_TOP, values) | _translate(keys.OFFICIAL_SSM, ssm)
    config = Mamba2Config(**fields, norm_eps=keys.OFFICIAL_NORM_EPS, norm_per_group=fields["ngroups"] != 1)
    if ssm.get("d_ssm") not in (None, config.d_inner):
        raise ValueError(f"ssm_cfg.d_ssm {_shown(ssm['d_ssm'])} leaves channels to an MLP; this model has none")
    return config


def _to_official(config: Mamba2Config) -> dict[str, Any]:
    _require_norm_per_group(config, "the official code")
    if config.norm_eps != keys.OFFICIAL_NORM_EPS:
        raise ValueError(f"norm_eps is {config.norm_eps}, and the official code has {keys.OFFICIAL_NORM_EPS} alone")
    top = {theirs: getattr(config, ours) for ours, (theirs, _) in keys.OFFICIAL_TOP.items()}
    ssm = {theirs: getattr(config, ours) for ours, (theirs, _) in keys.OFFICIAL_SSM.items()}
    return {
        **top,
        "d_intermediate": 0,
        "ssm_cfg": {"layer": "Mamba2", **ssm},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "fused_add_norm": True,
    }


def _from_hf(values: dict[str, Any]) -> Mamba2Config:
    if values.get("model_type") != "mamba2":
        raise ValueError(f'model_type is {_shown(values.get("model_type"))}; only "mamba2" can be read')
    _require_fixed(values, keys.FIXED_HF)
    is_fla = bool(keys.FLA_ONLY & values.keys())
    read = _theirs(keys.HF) | set(keys.FIXED_HF) | keys.HF_OTHER | {_HF_OURS}
    _refuse_unknown(values, read)
    values = _with_one_name(values)
    _require_no_limit("time_step_limit", values.get("time_step_limit"))
    fields = _translate({ours: (name, fla if is_fla else hf) for ours, (name, hf, fla) in keys.HF.items()}, values)
    if is_fla:  # not read in transformers' configs: old ones say true, although their norm comes after the gate
        fields["norm_before_gate"] = values.get("norm_before_gate", False)
    ours = values.get(_HF_OURS)
    if isinstance(ours, dict):
        own = {key: ours[key] for key in _HF_OURS_KEYS if key in ours}
        # another program may have resized the embedding since: its number of rows counts
        if Mamba2Config(**{**fields, **own}).padded_vocab_size == fields["vocab_size"]:
            fields |= own
    config = Mamba2Config(**fields, norm_per_group=fields["ngroups"] != 1)
    heads = values.get("num_heads", config.nheads if is_fla else 128)
    if heads != config.nheads:
        raise ValueError(
            f"num_heads * head_dim must equal expand * hidden_size = {config.expand} * {config.d_model} = "
            f"{config.d_inner}, and num_heads {_shown(heads)}, head_dim {config.headdim} do not"
        )
    return config


def _with_one_name(values: dict[str, Any]) -> dict[str, Any]:
    """The config with transformers' names for what flash-linear-attention calls otherwise.

    Where both are there, and differ, a key that only its configs have decides that its own name counts.
    """
    renamed = dict(values)
    its_own = bool(keys.FLA_ONLY - set(keys.FLA_NAMES.values()) & values.keys())
    for name, other in keys.FLA_NAMES.items():
        if other not in values:
            continue
        if name in values and values[name] != values[other] and not its_own:
            both = f"{name} is {_shown(values[name])} and {other} is {_shown(values[other])}"
            raise ValueError(f"{both}, which are two names of one setting; take out the one that does not count")
        renamed[name] = renamed.pop(other)
    return renamed


def _to_hf(config: Mamba2Config) -> dict[str, Any]:
    _require_norm_per_group(config, "transformers")
    if config.norm_before_gate:
        raise ValueError("norm_before_gate is true, and transformers gates before the norm")
    values = {theirs: getattr(config, ours) for ours, (theirs, _, _) in keys.HF.items()}
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        **values,
        "vocab_size": config.padded_vocab_size,
        "num_heads": config.nheads,
        "hidden_act": "silu",
        # transformers would assume the ids 0, 1 and 2, which are words of our vocabulary, and stop at one of them.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        _HF_OURS: {key: getattr(config, key) for key in _HF_OURS_KEYS},
    }


def hf_generation_config(config: Mamba2Config) -> dict[str, Any]:
    """generation_config.json: in transformers the embedding's padding rows have logits too, and must not be sampled."""
    return {"suppress_tokens": list(range(config.vocab_size, config.padded_vocab_size)) or None}


_READERS: dict[str, Callable[[dict[str, Any]], Mamba2Config]] = {
    "own": _from_own,
    "official": _from_official,
    "hf": _from_hf,
}
_WRITERS: dict[str, Callable[[Mamba2Config], dict[str, Any]]] = {"own": _to_own, "official": _to_official, "hf": _to_hf}


def _theirs(table: dict[str, tuple[Any, ...]]) -> set[str]:
    return {theirs for theirs, *_ in table.values()}


def _translate(table: dict[str, tuple[str, Any]], values: dict[str, Any]) -> dict[str, Any]:
    return {ours: values.get(theirs, default) for ours, (theirs, default) in table.items()}


def _require_fixed(values: dict[str, Any], table: dict[str, tuple[tuple[Any, ...], str]], where: str = "") -> None:
    """Raises ValueError for a key that asks for another function than this model's."""
    for key, (allowed, why) in table.items():
        value = values.get(key, allowed[0])
        if not any(type(value) is type(one) and value == one for one in allowed):
            wanted = json.dumps(allowed[0])
            raise ValueError(f"{where}{key} is {_shown(value)}; {where}{key} must be {wanted}: this model {why}")


def _refuse_unknown(values: dict[str, Any], known: set[str], generic: bool = True) -> None:
    """Raises ValueError for a key that no table has: it may change the function."""
    for key, value in values.items():
        if key in known or (generic and _harmless(key, value)):
            continue
        near = difflib.get_close_matches(key, known, n=1)
        raise ValueError(
            f"unknown config key {key[:80]!r}"
            + (f"; did you mean {near[0]!r}?" if near else "; take it out if it does not change what is computed")
        )


def _harmless(key: str, value: Any) -> bool:
    """Whether any config on the hub may have this key, although no table of its program has it."""
    return key in keys.GENERIC or key.startswith("_") or value is None


def _require_no_limit(name: str, limit: Any) -> None:
    """Other programs can clamp dt to a range; softplus never leaves (0, inf), the only range that is read.

    JSON has no infinity: Python writes it as a bare word, transformers as an object, other tools as a text or as null.
    """
    if limit is None:
        return
    if isinstance(limit, (list, tuple)) and len(limit) == 2:
        low, high = (_number(end) for end in limit)
        if (low is None or low <= 0) and (high is None or high == math.inf):
            return
    raise ValueError(f"{name} is {_shown(limit)}; this model does not clamp dt, so only [0, Infinity] can be read")


def _number(value: Any) -> float | None:
    """An end of a range, None where there is none; NaN for what is not a number."""
    if value is None:
        return None
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        value = value["__float__"]
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _require_norm_per_group(config: Mamba2Config, whose: str) -> None:
    if config.ngroups > 1 and not config.norm_per_group:
        raise ValueError(
            f"ngroups is {config.ngroups} with norm_per_group false, and {whose} normalises each group on its own"
        )


def _shown(value: Any) -> str:
    """A value on one short line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
