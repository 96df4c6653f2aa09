"""Other programs' Mamba-2 folders in our terms: what a config says and what a tensor is called, both ways.

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
    norm_eps                always 1e-5                       layer_norm_epsilon
    norm_before_gate        ssm_cfg.norm_before_gate          always False
    norm_per_group          always True                       always True
    weights                 pytorch_model.bin                 model.safetensors, or in shards, or pytorch_model.bin

Our tensors have the official names; transformers says `embeddings` for `embedding`. Nothing here touches a file:
configs are dicts as JSON gives them, weights are dicts of tensors, and what cannot be said in the other's terms is a
ValueError of one line. The defaults below are those programs' own: a key that a config leaves out means what it means
there.

`norm_per_group`: the norm after the scan runs over each group on its own in the official code, in its kernels, and in
transformers from version 5 on. The slow path of transformers 4 ran it over all channels, which for ngroups > 1 was
another function of the same weights; it is not what those weights were trained with, and not read so here.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from mamba2_min.config import Mamba2Config

# For each layout, the files that weights may be in, the first that exists being the one that counts. An index names
# the shards that it is cut into.
INDEX = ".index.json"
WEIGHT_FILES = {
    "own": ("model.pt",),
    "official": ("pytorch_model.bin",),
    "hf": ("model.safetensors", "model.safetensors" + INDEX, "pytorch_model.bin", "pytorch_model.bin" + INDEX),
}

# ours: (theirs, its default there)
_OFFICIAL_TOP = {
    "vocab_size": ("vocab_size", 50277),
    "d_model": ("d_model", 2560),
    "n_layer": ("n_layer", 64),
    "pad_vocab_size_multiple": ("pad_vocab_size_multiple", 8),
    "tie_embeddings": ("tie_embeddings", True),
    "residual_in_fp32": ("residual_in_fp32", True),
}
_OFFICIAL_SSM = {
    "d_state": ("d_state", 128),
    "d_conv": ("d_conv", 4),
    "expand": ("expand", 2),
    "headdim": ("headdim", 64),
    "ngroups": ("ngroups", 1),
    "chunk_size": ("chunk_size", 256),
    "norm_before_gate": ("norm_before_gate", False),
    "conv_bias": ("conv_bias", True),
    "proj_bias": ("bias", False),
    "dt_min": ("dt_min", 1e-3),
    "dt_max": ("dt_max", 0.1),
    "dt_init_floor": ("dt_init_floor", 1e-4),
}
# What else a config may hold without changing the function that the weights compute: the choice of a kernel, how
# parameters were drawn before training, how the work was spread.
_OFFICIAL_TOP_OTHER = ("d_intermediate", "ssm_cfg", "attn_layer_idx", "attn_cfg", "rms_norm", "fused_add_norm")
_OFFICIAL_SSM_OTHER = (
    "layer",
    "d_ssm",
    "D_has_hdim",
    "rmsnorm",
    "dt_limit",
    "conv_init",
    "A_init_range",
    "use_mem_eff_path",
    "sequence_parallel",
)
_OFFICIAL_NORM_EPS = 1e-5

_HF = {
    "vocab_size": ("vocab_size", 32768),
    "d_model": ("hidden_size", 4096),
    "n_layer": ("num_hidden_layers", 64),
    "d_state": ("state_size", 128),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "headdim": ("head_dim", 64),
    "ngroups": ("n_groups", 8),
    "chunk_size": ("chunk_size", 256),
    "tie_embeddings": ("tie_word_embeddings", False),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "conv_bias": ("use_conv_bias", True),
    "proj_bias": ("use_bias", False),
    "residual_in_fp32": ("residual_in_fp32", True),
    "dt_min": ("time_step_min", 1e-3),
    "dt_max": ("time_step_max", 0.1),
    "dt_init_floor": ("time_step_floor", 1e-4),
}
# What a Hugging Face config has no key for, kept under one of our own, which transformers carries along unread.
_HF_OURS = "mamba2_min"
_HF_OURS_KEYS = ("vocab_size", "pad_vocab_size_multiple", "a_init", "dropout")

_HF_EMBEDDING, _EMBEDDING, _HEAD = "backbone.embeddings.weight", "backbone.embedding.weight", "lm_head.weight"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def layout_of(values: dict[str, Any]) -> str:
    """Whose config this is: "own", "official" or "hf", told by keys that no other has (model_type, ssm_cfg...)."""
    if "model_type" in values:
        return "hf"
    if any(key in values for key in _OFFICIAL_TOP_OTHER):
        return "official"
    return "own"


def config_from(layout: str, values: dict[str, Any]) -> Mamba2Config:
    """The config that a layout's config.json means. Raises ValueError for what it asks and no `Mamba2LM` can do."""
    return _READERS[layout](values)


def config_to(layout: str, config: Mamba2Config) -> dict[str, Any]:
    """A layout's config.json for a config. Raises ValueError for what that layout cannot say."""
    return _WRITERS[layout](config)


def weights_from(layout: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layout's tensors under our names. Raises ValueError where two would get the same."""
    if layout != "hf" or _HF_EMBEDDING not in weights:  # some published folders keep the official name of that one
        return weights
    if _EMBEDDING in weights:
        raise ValueError(f"both {_EMBEDDING} and {_HF_EMBEDDING} are there, and they are two names of one tensor")
    return {_EMBEDDING if name == _HF_EMBEDDING else name: tensor for name, tensor in weights.items()}


def weights_to(layout: str, config: Mamba2Config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under a layout's names. A tied head is left out, but for the official code, which wants it twice."""
    if config.tie_embeddings:
        weights = {name: tensor for name, tensor in weights.items() if name != _HEAD}
    if layout == "official":
        return with_tied_head(weights, config.tie_embeddings)
    if layout == "hf":
        return {_HF_EMBEDDING if name == _EMBEDDING else name: tensor for name, tensor in weights.items()}
    return weights


def parameter_shapes(config: Mamba2Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and shape of every tensor of a `Mamba2LM(config)`, one by one and without building anything.

    A config can ask for more than any memory holds; compared with the tensors that are there, the first that differs
    ends the matter.
    """
    c = config
    yield _EMBEDDING, (c.padded_vocab_size, c.d_model)
    for i in range(c.n_layer):
        block = f"backbone.layers.{i}"
        yield f"{block}.norm.weight", (c.d_model,)
        yield f"{block}.mixer.in_proj.weight", (c.d_in_proj, c.d_model)
        yield f"{block}.mixer.conv1d.weight", (c.conv_dim, 1, c.d_conv)
        if c.conv_bias:
            yield f"{block}.mixer.conv1d.bias", (c.conv_dim,)
        for name in ("dt_bias", "A_log", "D"):
            yield f"{block}.mixer.{name}", (c.nheads,)
        yield f"{block}.mixer.norm.weight", (c.d_inner,)
        yield f"{block}.mixer.out_proj.weight", (c.d_model, c.d_inner)
        if c.proj_bias:
            yield f"{block}.mixer.in_proj.bias", (c.d_in_proj,)
            yield f"{block}.mixer.out_proj.bias", (c.d_model,)
    yield "backbone.norm_f.weight", (c.d_model,)
    yield _HEAD, (c.padded_vocab_size, c.d_model)


def with_tied_head(weights: dict[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """The weights with the head that a file may leave out where it is the embedding."""
    if tied and _HEAD not in weights and _EMBEDDING in weights:
        return {**weights, _HEAD: weights[_EMBEDDING]}
    return weights


def check_shapes(expected: Iterable[tuple[str, tuple[int, ...]]], weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError for the first tensor that is missing, of another shape, or not expected at all."""
    names = set()
    for name, shape in expected:
        if name not in weights or not isinstance(weights[name], Tensor):
            raise ValueError(f"lacks the tensor {name}, which the config asks for")
        if tuple(weights[name].shape) != tuple(shape):
            raise ValueError(f"{name} is {tuple(weights[name].shape)}, and the config asks for {tuple(shape)}")
        names.add(name)
    for name in weights:
        if name not in names:
            raise ValueError(f"holds an unexpected tensor {name!r}")


def check_tensors(weights: Mapping[str, Tensor], tied: bool) -> None:
    """Raises ValueError for tensors that a model cannot use: not plain floats, not really there, not finite; or a tied
    head that is not the embedding."""
    for name, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _DTYPES:
            raise ValueError(f"{name!r} is {tensor.dtype}, {tensor.layout}; weights are plain tensors of floats")
    # A view can repeat one number over any shape: a file of a kilobyte would ask for a terabyte when it is copied.
    claimed = sum(tensor.nbytes for name, tensor in weights.items() if name != _HEAD or not tied)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in weights.values()}
    if claimed > sum(held.values()):
        raise ValueError(f"its tensors claim {claimed} bytes and hold {sum(held.values())}")
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity: the file is damaged, or its training had gone astray")
    head, embedding = weights[_HEAD], weights[_EMBEDDING]
    if tied and (head.dtype != embedding.dtype or not torch.equal(head, embedding)):
        raise ValueError(f"the config ties the head to the embedding, and {_HEAD} is not {_EMBEDDING}")


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
    return Mamba2Config.from_dict(values)


def _to_own(config: Mamba2Config) -> dict[str, Any]:
    return config.to_dict()


def _from_official(values: dict[str, Any]) -> Mamba2Config:
    ssm = values.get("ssm_cfg", {})
    if not isinstance(ssm, dict):
        raise ValueError(f"ssm_cfg must be an object, not {ssm!r}")
    _refuse_unknown(values, _OFFICIAL_TOP, _OFFICIAL_TOP_OTHER)
    _refuse_unknown(ssm, _OFFICIAL_SSM, _OFFICIAL_SSM_OTHER)
    layer = ssm.get("layer", "Mamba1")
    if layer != "Mamba2":
        raise ValueError(f'the layers are {layer!r}, which ssm_cfg.layer names; this model has "Mamba2" alone')
    if values.get("attn_layer_idx"):
        raise ValueError(f"attn_layer_idx {values['attn_layer_idx']!r} asks for attention; this model has none")
    if values.get("d_intermediate", 0) != 0:
        raise ValueError(f"d_intermediate {values['d_intermediate']!r} asks for MLPs; this model has none")
    if values.get("rms_norm", True) is not True or ssm.get("rmsnorm", True) is not True:
        raise ValueError("rms_norm and ssm_cfg.rmsnorm must be true: this model normalises by RMSNorm alone")
    if ssm.get("D_has_hdim", False) is not False:
        raise ValueError("ssm_cfg.D_has_hdim asks for a D a channel; this model has one a head")
    _require_no_limit("ssm_cfg.dt_limit", ssm.get("dt_limit"))
    fields = _translate(_OFFICIAL_TOP, values) | _translate(_OFFICIAL_SSM, ssm)
    config = Mamba2Config(**fields, norm_eps=_OFFICIAL_NORM_EPS, norm_per_group=fields["ngroups"] != 1)
    if ssm.get("d_ssm") not in (None, config.d_inner):
        raise ValueError(f"ssm_cfg.d_ssm {ssm['d_ssm']!r} leaves channels to an MLP; this model has none")
    return config


def _to_official(config: Mamba2Config) -> dict[str, Any]:
    _require_norm_per_group(config, "the official code")
    if config.norm_eps != _OFFICIAL_NORM_EPS:
        raise ValueError(f"norm_eps is {config.norm_eps}, and the official code has {_OFFICIAL_NORM_EPS} alone")
    top = {theirs: getattr(config, ours) for ours, (theirs, _) in _OFFICIAL_TOP.items()}
    ssm = {theirs: getattr(config, ours) for ours, (theirs, _) in _OFFICIAL_SSM.items()}
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
    if values["model_type"] != "mamba2":
        raise ValueError(f'model_type is {values["model_type"]!r}; only "mamba2" can be read')
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):  # two names of one function
        raise ValueError(f'hidden_act is {activation!r}; this model has "silu" alone')
    if values.get("rms_norm", True) is not True:
        raise ValueError("rms_norm must be true: this model normalises by RMSNorm alone")
    _require_no_limit("time_step_limit", values.get("time_step_limit"))
    # norm_before_gate is left unread: old configs say true, and transformers has gated before the norm all along
    fields = _translate(_HF, values)
    ours = values.get(_HF_OURS)
    if isinstance(ours, dict):
        own = {key: ours[key] for key in _HF_OURS_KEYS if key in ours}
        # where the embedding was resized since, by another program, its number of rows is what counts
        if Mamba2Config(**{**fields, **own}).padded_vocab_size == fields["vocab_size"]:
            fields |= own
    config = Mamba2Config(**fields, norm_per_group=fields["ngroups"] != 1)
    heads = values.get("num_heads", 128)
    if heads != config.nheads:
        raise ValueError(
            f"num_heads * head_dim must equal expand * hidden_size = {config.expand} * {config.d_model} = "
            f"{config.d_inner}, and num_heads {heads!r}, head_dim {config.headdim} do not"
        )
    return config


def _to_hf(config: Mamba2Config) -> dict[str, Any]:
    _require_norm_per_group(config, "transformers")
    if config.norm_before_gate:
        raise ValueError("norm_before_gate is true, and transformers gates before the norm")
    values = {theirs: getattr(config, ours) for ours, (theirs, _) in _HF.items()}
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        **values,
        "vocab_size": config.padded_vocab_size,
        "num_heads": config.nheads,
        "hidden_act": "silu",
        # The ids that transformers would assume, 0, 1 and 2, are words of our vocabulary: it would stop at one.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        _HF_OURS: {key: getattr(config, key) for key in _HF_OURS_KEYS},
    }


def hf_generation_config(config: Mamba2Config) -> dict[str, Any]:
    """generation_config.json: the rows that pad the embedding have logits in transformers, and must not be picked."""
    return {"suppress_tokens": list(range(config.vocab_size, config.padded_vocab_size)) or None}


_READERS: dict[str, Callable[[dict[str, Any]], Mamba2Config]] = {
    "own": _from_own,
    "official": _from_official,
    "hf": _from_hf,
}
_WRITERS: dict[str, Callable[[Mamba2Config], dict[str, Any]]] = {"own": _to_own, "official": _to_official, "hf": _to_hf}


def _translate(table: dict[str, tuple[str, Any]], values: dict[str, Any]) -> dict[str, Any]:
    return {ours: values.get(theirs, default) for ours, (theirs, default) in table.items()}


def _refuse_unknown(values: dict[str, Any], table: dict[str, tuple[str, Any]], others: tuple[str, ...]) -> None:
    known = [theirs for theirs, _ in table.values()] + list(others)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"unknown config key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _require_no_limit(name: str, limit: Any) -> None:
    """Both programs can clamp dt to a range; softplus never leaves (0, inf), the only range that is read.

    JSON has no infinity: Python writes it as a bare word, transformers as an object.
    """
    if limit is None:
        return
    read = [math.inf if v == {"__float__": "Infinity"} else v for v in limit] if isinstance(limit, list) else limit
    if read != [0, math.inf]:
        raise ValueError(f"{name} is {limit!r}; this model does not clamp dt, so only [0, Infinity] can be read")


def _require_norm_per_group(config: Mamba2Config, whose: str) -> None:
    if config.ngroups > 1 and not config.norm_per_group:
        raise ValueError(
            f"ngroups is {config.ngroups} with norm_per_group false, and {whose} normalises each group on its own"
        )
