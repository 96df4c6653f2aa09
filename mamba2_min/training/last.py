"""What last.pt must hold before a training resumes from it: the type and range of every value, and their consistency.

    check_last   each value on its own, by the table _LAST, and the counts against each other
    check_fit    the optimizer and the position in the data against those of the trainer that resumes
    check_model  the tensors against the model

All raise a ValueError of one line. Nothing is changed, and whatever the file holds, nothing else is raised.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mamba2_min import validate
from mamba2_min.checkpoints import weights as tensors
from mamba2_min.settings import Settings
from mamba2_min.training.guards import JUMPED, NOT_FINITE

Check = Callable[[str, Any], Any]

_LARGEST = 2**31 - 1
_LOSS = 1e30  # no loss or sum of losses of a run is larger
_SECONDS = 1e12
_MOMENTS = ("exp_avg", "exp_avg_sq")


def _integer(low: int = 0, high: int = _LARGEST) -> Check:
    return lambda name, value: validate.integer(name, value, low, high)


def _number(low: float, high: float) -> Check:
    return lambda name, value: validate.number(name, value, low, high)


def _one_of(*choices: str) -> Check:
    return lambda name, value: validate.one_of(name, value, choices)


def _list(check: Check) -> Check:
    def of_list(name: str, value: Any) -> None:
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list")
        for one in value:
            check(f"each of {name}", one)

    return of_list


def _record(fields: Mapping[str, Check], more: bool = False) -> Check:
    """A dictionary with these fields. With `more`, it may have others, which are not read."""

    def of_record(name: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be a dictionary")
        for key, check in fields.items():
            if key not in value:
                raise ValueError(f"{name} lacks {key}")
            check(f"{name}.{key}", value[key])
        if len(value) != len(fields) and not more:
            raise ValueError(f"{name} must have only {', '.join(fields)}")

    return of_record


def _optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _digest(name: str, value: Any) -> None:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{name} must be a sha256 in hexadecimal")


def _scalars(name: str, value: Any) -> None:
    """A dictionary of values that JSON can hold."""
    if not isinstance(value, dict) or not all(isinstance(key, str) and key.isidentifier() for key in value):
        raise ValueError(f"{name} must be a dictionary of plain values")
    for key, one in value.items():
        plain = one is None or isinstance(one, (bool, str)) or (isinstance(one, float) and math.isfinite(one))
        if not plain and not (isinstance(one, int) and abs(one) < 1 << 63):
            raise ValueError(f"{name}.{key[:40]} must be a number, a text or nothing")
        if isinstance(one, str) and not (len(one) <= 1000 and one.isprintable()):
            raise ValueError(f"{name}.{key[:40]} must be a short text of one line")


def _place(name: str, value: Any) -> None:
    """A position in the data: a few integers, which `check_fit` compares with those of the trainer."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value) or not 1 <= len(value) <= 16:
        raise ValueError(f"{name} must be a dictionary of a few integers")
    for key, one in value.items():
        _integer(0, 2**63 - 1 if key == "seed" else 2**62)(f"{name}.{key[:40]}", one)


def _settings(name: str, value: Any) -> None:
    """Settings. Those of an earlier version may have other names."""
    _scalars(name, value)
    Settings(
        **{key: one for key, one in value.items() if key in {field.name for field in dataclasses.fields(Settings)}}
    )


def _bytes(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.dim() != 1 or value.device.type != "cpu":
        raise ValueError(f"{name} must be a row of bytes")


def _cpu_generator(name: str, value: Any) -> None:
    _bytes(name, value)
    try:
        torch.Generator().set_state(value.clone())
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"{name} must be the state of a random generator") from None


_GROUP = {"lr": _number(0, 1e12), "params": _list(_integer())}  # its other options come from the settings
_LAST = _record(
    {
        "step": _integer(),
        "seconds": _number(0, _SECONDS),
        "pending": _list(_number(-_LOSS, _LOSS)),
        "records": _integer(),
        "best": _optional(
            _record({"nats": _number(0, _LOSS), "tokens": _integer(1, 2**62), "n_bytes": _integer(1, 2**62)}, more=True)
        ),
        "best_step": _integer(),
        "evaluated_step": _integer(-1),
        "stale": _integer(),
        "micro_batch": _integer(1),
        "windows": _place,
        "guard": _record(
            {
                "recent": _list(_number(-_LOSS, _LOSS)),
                "in_a_row": _integer(),
                "skipped": _integer(),
                "reason": _one_of("", NOT_FINITE, JUMPED),
            }
        ),
        "settings": _settings,
        "config": _scalars,
        "environment": _scalars,
        "documents": _digest,
        "tokenizer": _digest,
        "torch_rng": _cpu_generator,
        "cuda_rng": _list(_bytes),
        "model": _record({}, more=True),
        "optimizer": _record({"state": _record({}, more=True), "param_groups": _list(_record(_GROUP, more=True))}),
    },
    more=True,
)


def check_last(values: Any) -> None:
    """Raises ValueError unless `values` can be what a trainer saved: types, ranges, and counts that agree."""
    _LAST("it", values)
    guard, step = values["guard"], values["step"]
    in_order = (
        (values["evaluated_step"], step, "the last evaluation comes after the last step"),
        (values["best_step"], max(values["evaluated_step"], 0), "the best step comes after the last evaluation"),
        (values["stale"], step + 1, "there are more evaluations than steps"),
        (guard["skipped"], step, "more steps were skipped than there were"),
        (guard["in_a_row"], guard["skipped"], "more steps were skipped in a row than in all"),
    )
    for low, high, fault in in_order:
        if low > high:
            raise ValueError(fault)
    if guard["in_a_row"] and not guard["reason"]:
        raise ValueError("steps were skipped for no reason")
    if values["best"] is None and values["best_step"]:
        raise ValueError("there is a best step and no best score")


def check_fit(
    values: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, data: Mapping[str, int] | None
) -> None:
    """Raises ValueError unless the optimizer and the position in `values`, which passed check_last, fit this training.

    data: the `state_dict` of the trainer's batches, None where the documents are different and are read from their
    start. The model's tensors are checked by `ModelFiles.check`, the best score by `Task.restored_score`.
    """
    _check_optimizer(values, optimizer)
    if data is None:
        return
    place = values["windows"]
    if place.keys() != data.keys():
        raise ValueError("its place in the data is of another kind")
    for name in data.keys() - {"epoch", "position"}:
        if place[name] != data[name]:
            raise ValueError(f"its place in the data has {name} {place[name]}, and not {data[name]}")


def optimizer_state(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What `optimizer.load_state_dict` takes: the saved moments and rates, with the options that the settings give.

    A moment gets the strides of its parameter, because fused AdamW reads both in the order of memory.
    """
    groups = zip(optimizer.state_dict()["param_groups"], saved["param_groups"], strict=True)
    state = {i: dict(one) for i, one in saved["state"].items()}
    parameters = _parameters(optimizer)
    for i, one in state.items():
        for moment in one.keys() & set(_MOMENTS):
            if one[moment].stride() != parameters[i].stride():
                one[moment] = torch.empty_like(parameters[i], device="cpu").copy_(one[moment])
    return {"state": state, "param_groups": [{**own, "lr": group["lr"]} for own, group in groups]}


def _parameters(optimizer: torch.optim.Optimizer) -> dict[int, Tensor]:
    """The optimizer's parameters by their numbers in its state_dict."""
    groups = zip(optimizer.state_dict()["param_groups"], optimizer.param_groups, strict=True)
    return {i: p for group, own in groups for i, p in zip(group["params"], own["params"], strict=True)}


def check_model(saved: dict[Any, Any], model: nn.Module) -> None:
    """Raises ValueError unless `saved` holds all tensors of the model, of the right shapes, finite and not shared."""
    config: Any = model.config
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in saved.items()):
        raise ValueError("its model is not a dictionary of tensors")
    weights = tensors.with_tied_head(tensors.with_plain_names(saved), config.tie_embeddings)
    expected = tensors.with_plain_names(model.state_dict())
    tensors.check_shapes(((name, tuple(tensor.shape)) for name, tensor in expected.items()), weights)
    tensors.check_values(weights, config.tie_embeddings)  # weights that the user made layers share are shared here


def _check_optimizer(values: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's moments: all of each parameter, of its shape, not shared, finite, and consistent."""
    saved, groups = values["optimizer"], optimizer.state_dict()["param_groups"]
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in groups]:
        raise ValueError("its optimizer belongs to another model")
    taken = values["step"] - values["guard"]["skipped"]
    if saved["state"].keys() != (_parameters(optimizer).keys() if taken else set()):
        raise ValueError("its optimizer does not have one state for each parameter")
    if not taken:
        return
    moments: list[Tensor] = []
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        for i, parameter in zip(group["params"], own["params"], strict=True):
            name, state = f"the optimizer's state {i}", saved["state"][i]
            _check_state(name, state, parameter, _moments(own), taken)
            _check_range(name, state, own, values["settings"].get("clip", 0))
            moments += [state[moment] for moment in _moments(own)]
    memory = {tensor.untyped_storage().data_ptr() or (k,) for k, tensor in enumerate(moments)}  # empty ones have none
    if len(memory) != len(moments):
        raise ValueError("its optimizer has one tensor in several places")


def _check_state(name: str, state: Any, parameter: Tensor, moments: tuple[str, ...], taken: int) -> None:
    """What is kept for one parameter: the number of steps, and the moments as finite tensors of its shape."""
    if not isinstance(state, dict) or state.keys() != {"step", *moments}:
        raise ValueError(f"{name} must have only step, {', '.join(moments)}")
    step = state["step"]
    if not isinstance(step, Tensor) or step.shape != () or not step.is_floating_point():
        raise ValueError(f"{name}.step must be a number")
    tensors.check_kind(f"{name}.step", step)
    if step.item() != taken:
        raise ValueError(f"{name}.step is {step.item():g}, and {taken} steps were taken")
    for moment in moments:
        _check_moment(f"{name}.{moment}", state[moment], parameter)


def _check_range(name: str, state: Mapping[str, Tensor], group: Mapping[str, Any], clip: float) -> None:
    """The moments of one parameter: such as gradients whose norm is at most `clip` (0: any) can have."""
    mean, square = state["exp_avg"], state.get("exp_avg_sq")
    if square is None:  # Muon's
        beyond = clip and mean.norm() > 1.01 * clip
    else:
        exact = mean.dtype in (torch.float32, torch.float64)
        bound = _largest_ratio(*group["betas"])
        if square.min() < 0 or (exact and (mean.abs() > bound * square.sqrt() + 1e-15).any()):
            raise ValueError(f"{name}: its moments contradict each other")
        beyond = clip and square.max() > 1.01 * clip**2  # no number of a gradient is larger than its norm
    if beyond:
        raise ValueError(f"{name}: its moments are beyond what clipped gradients can have")


def _moments(group: Mapping[str, Any]) -> tuple[str, ...]:
    """What an optimizer keeps for each parameter of a group: AdamW two moments, Muon (muon.py) one."""
    return _MOMENTS[:1] if group.get("rows") else _MOMENTS


def _check_moment(name: str, tensor: Any, parameter: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.shape != parameter.shape:
        raise ValueError(f"{name} must be a tensor of {tuple(parameter.shape)}")
    tensors.check_kind(name, tensor)
    if tensor.untyped_storage().nbytes() < tensor.nbytes or not tensor.isfinite().all():
        raise ValueError(f"{name} must have finite numbers, and each of its own")


def _largest_ratio(beta1: float, beta2: float) -> float:
    """The most that AdamW's mean of gradients can be, in units of the root of its mean of squares (Cauchy-Schwarz)."""
    if beta1**2 >= beta2:
        return math.inf
    return 1.001 * (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
