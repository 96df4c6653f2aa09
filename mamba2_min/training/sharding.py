"""A model whose weights, gradients and moments are divided among processes (FSDP2): train.py --shard.

Each process keeps one part of every tensor, by rows. A block's weights are brought together just before the block runs,
forward and backward, and let go after it; its gradient is added up over the processes, and each keeps its own rows. So
a process holds 16 bytes per parameter divided by the number of processes, and the whole weights of one block or two.

Files hold whole tensors: last.pt and model.pt are those of an unsharded run. Whoever resumes may have another number of
processes, or none of this. torch.distributed.checkpoint would save each process's part without bringing them together;
but it reads its index by pickle, which may run what it reads, and this package loads nothing of that kind.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from mamba2_min.checkpoints import weights as tensors
from mamba2_min.errors import UserError
from mamba2_min.models.base import LanguageModel
from mamba2_min.settings import Settings


def placed(model: Any, device: torch.device, sharded: bool, settings: Settings) -> Any:
    """The model on a device, or divided among those of all processes. Raises UserError for settings that exclude it."""
    if not sharded:
        return model.to(device)
    if settings.compile or settings.graph:
        raise UserError("--shard cannot be combined with --compile or --graph")
    shard(model, device)
    return model


def shard(model: LanguageModel, device: torch.device) -> None:
    """Divides a model, which every process has whole on the CPU, among all processes, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.backbone.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # Also after evaluating: weights that are exchanged for their average must be brought together again.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, "loss_and_state")
    model.backbone.sharded = True


def is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")


def own_part(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor, sharing its memory; the tensor itself where it is whole."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tree: Any, keep: bool) -> Any:
    """The same tree with every sharded tensor brought together, one after the other, on the CPU.

    Every process must call it; those that do not `keep` get None in the place of such a tensor.
    """
    if isinstance(tree, dict):
        return {key: whole(value, keep) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value, keep) for value in tree]
    if not is_sharded(tree):
        return tree
    full = tree.full_tensor()
    return full.detach().cpu() if keep else None


def whole_weights(model: LanguageModel, keep: bool) -> dict[str, Tensor]:
    """The state_dict of a sharded model with whole tensors; a tied head is the embedding itself."""
    weights = model.state_dict()
    tied = model.config.tie_embeddings
    found = whole({name: weight for name, weight in weights.items() if not (tied and name == tensors.HEAD)}, keep)
    return {name: found[tensors.EMBEDDING if tied and name == tensors.HEAD else name] for name in weights}


def whole_model(model: LanguageModel, keep: bool) -> Any:
    """The model; of a sharded one its config and whole weights, for those that `keep` them. All processes call it."""
    if not any(map(is_sharded, model.parameters())):
        return model
    weights = whole_weights(model, keep)
    return SimpleNamespace(config=model.config, state_dict=lambda: weights)


def clip_gradients(model: nn.Module, most: float) -> Tensor:
    """Scales the gradients down to the norm `most`; returns the norm that they had, over all processes' parts."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if is_sharded(norm):
        norm = norm.full_tensor()  # type: ignore[attr-defined]
    nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, divided as `like` is; as it is where that is whole."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(full.to(like.device, like.dtype), mesh, placements)


@torch.no_grad()
def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copies whole weights, which fit the model, into a sharded one."""
    for name, mine in model.state_dict().items():
        mine.copy_(part_of(weights[name], mine))


def with_parts(optimizer_state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state_dict with its moments divided as the optimizer's parameters are."""
    groups = zip(optimizer.state_dict()["param_groups"], optimizer.param_groups, strict=True)
    own = {i: p for group, group_of in groups for i, p in zip(group["params"], group_of["params"], strict=True)}
    state = {
        i: {name: part_of(t, own[i]) if t.dim() else t for name, t in one.items()}
        for i, one in optimizer_state["state"].items()
    }
    return {**optimizer_state, "state": state}
