"""The tensors of a model by name: what a config asks for, and whether a dictionary of tensors matches it.

Reading, saving and the start of a training use the same check, so that what is written can be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from mamba2_min.config import Mamba2Config

EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Parts of names that come from what a model was wrapped in, and not from the model: torch.compile, activation
# checkpointing and sharding anywhere in a name; DataParallel and trainers' own modules at its beginning.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_OUTSIDE = {"module", "model", "_forward_module"}
_IN_BACKBONE = {"embedding", "embeddings", "layers", "norm_f"}


def parameter_shapes(config: Mamba2Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and shape of every tensor of a `Mamba2LM(config)`, one by one and without building anything.

    A config can ask for more than any memory holds. The names come one by one, so that a comparison with the tensors
    that are there ends at the first difference.
    """
    c = config
    yield EMBEDDING, (c.padded_vocab_size, c.d_model)
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
    yield HEAD, (c.padded_vocab_size, c.d_model)


def plain_name(name: str) -> str:
    """A tensor's name in a model without wrappers, and with `backbone.` where that was left out.

    transformers says `embeddings` for `embedding`.
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _OUTSIDE:
        del parts[0]
    if parts and parts[0] in _IN_BACKBONE:
        parts.insert(0, "backbone")
    if parts[:2] == ["backbone", "embeddings"]:
        parts[1] = "embedding"
    return ".".join(parts)


def with_plain_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of a model without wrappers. Raises ValueError where two would get the same name."""
    plain: dict[str, Tensor] = {}
    came_from: dict[str, str] = {}
    for name, tensor in weights.items():
        if ".lora_" in name or ".base_layer." in name:
            raise ValueError(f"holds {name[:200]!r}, a part of an adapter; merge the adapter into the model first")
        key = plain_name(name)
        if key in plain:
            raise ValueError(f"{came_from[key]} and {name} are both there, and they are two names of one tensor")
        plain[key], came_from[key] = tensor, name
    return plain


def with_tied_head(weights: dict[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """The weights, with a tied head added where the file leaves it out."""
    if tied and HEAD not in weights and EMBEDDING in weights:
        return {**weights, HEAD: weights[EMBEDDING]}
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
            raise ValueError(f"holds an unexpected tensor {str(name)[:200]!r}")


def check_tensors(weights: Mapping[str, Tensor], tied: bool) -> None:
    """Raises ValueError for tensors that a model cannot use: not plain floats, without data of their own, not finite;
    or a tied head that differs from the embedding."""
    for name, tensor in weights.items():
        check_kind(name, tensor)
    # A view can repeat one number over any shape: a file of a kilobyte would ask for a terabyte when it is copied.
    claimed = sum(tensor.nbytes for name, tensor in weights.items() if name != HEAD or not tied)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in weights.values()}
    if claimed > sum(held.values()):
        raise ValueError(f"its tensors claim {claimed} bytes and hold {sum(held.values())}")
    check_values(weights, tied)


def check_values(weights: Mapping[str, Tensor], tied: bool) -> None:
    """The same for tensors whose sizes are known to be right, whatever their layout in memory."""
    for name, tensor in weights.items():
        check_kind(name, tensor)
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity: the file is damaged, or its training diverged")
    head, embedding = weights.get(HEAD), weights.get(EMBEDDING)
    if tied and head is not None and embedding is not None and not same(head, embedding):
        raise ValueError(f"the config ties the head to the embedding, and {HEAD} is not {EMBEDDING}")


def check_kind(name: str, tensor: Tensor, anywhere: bool = False) -> None:
    """Raises ValueError unless a tensor holds plain floats on the CPU, or with `anywhere` on any device but meta."""
    nowhere = tensor.device.type == "meta" or (tensor.device.type != "cpu" and not anywhere)
    if tensor.layout != torch.strided or nowhere or tensor.dtype not in _DTYPES:
        where = f" on {tensor.device.type}" if nowhere else ""
        raise ValueError(f"{name!r} is {tensor.dtype}, {tensor.layout}{where}; weights are plain tensors of floats")


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and numbers."""
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def unshared(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each with a storage of its own and of its size: no format stores a view rightly."""
    found: set[int] = set()
    own = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in found or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        found.add(tensor.untyped_storage().data_ptr())
        own[name] = tensor
    return own
