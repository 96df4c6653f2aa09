"""Where the work runs and in what precision, how much memory there is, and how much a training will need."""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import dataclasses
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from mamba2_min.config import Mamba2Config
from mamba2_min.errors import UserError
from mamba2_min.settings import PRECISIONS, Settings


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" is the first of cuda, mps, cpu that is there. Raises UserError for one that is not."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, there in available.items() if there))
    kind = name.split(":")[0]
    if kind not in available:
        raise UserError(f"unknown device {name!r}; there are auto, cpu, cuda and mps")
    if not available[kind]:
        raise UserError(f"this machine has no {kind} device that torch can use; try --device cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{name!r} is no device; a number may follow, as in cuda:1") from error
    if kind == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"there is no {name}: this machine has {torch.cuda.device_count()} of them, counted from 0")
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """ "auto" is bf16 where matrix units make it faster (GPUs, CPUs with AMX) and float32 elsewhere."""
    if name not in PRECISIONS:
        raise UserError(f"unknown precision {name!r}; there are {', '.join(PRECISIONS)}")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "float32"
    return "bf16" if device.type == "cpu" and has_amx() else "float32"


def has_amx() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware; where it does not, bf16 is slower than float32."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """What a forward pass runs in: on a GPU in bf16, projections and their results; states and sums stay float32."""
    if precision == "float32" or device.type == "cpu":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@contextlib.contextmanager
def matmul_precision(device: torch.device, precision: str) -> Iterator[None]:
    """What forward and backward run in: how products of float32 matrices are rounded on their way in.

    With "bf16" a CPU rounds the operands to bf16, all else stays float32, and a GPU rounds what autocast leaves in
    float32 to TF32. With "float32" nothing is rounded.
    """
    before = torch.get_float32_matmul_precision()
    rounded = "medium" if device.type == "cpu" else "high"
    torch.set_float32_matmul_precision("highest" if precision == "float32" else rounded)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on the device, or None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    for limit, used in _CGROUPS:  # a container may be allowed less than the machine has
        with contextlib.suppress(OSError, ValueError):
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(free, 0)


_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def training_memory(
    config: Mamba2Config,
    batch_size: int,
    context: int,
    device: torch.device | str = "cpu",
    recompute: bool = False,
    precision: str = "float32",
) -> int:
    """An estimate of the bytes that a training adds to the process: a bit more than it takes, within a half.

    Weights, gradients and AdamW's two moments are four float32 copies of the parameters, and while the head's gradient
    is made there is one more of the embedding. A token keeps, for each layer, the residual stream and the outputs and
    inputs of its projections, convolution, scan and norms until the backward pass; with `recompute`, of one layer only.
    With `precision` "bf16" a GPU keeps all but the stream in half of the bytes.
    """
    tokens = batch_size * context
    on_cpu = torch.device(device).type == "cpu"
    head = config.padded_vocab_size * config.d_model
    a_layer = (
        3 * config.d_model
        + 2 * config.d_in_proj
        + 2 * config.conv_dim
        + 4 * config.d_inner
        + 2 * config.d_inner * config.d_state // config.chunk_size  # a state and its gradient a chunk
    )
    width = 2 if precision == "bf16" and not on_cpu else 4
    layers = width * a_layer * (1 if recompute else config.n_layer) + 4 * config.d_model * (config.n_layer + 4)
    logits = tokens * config.vocab_size
    most = (1 << 23 if precision == "bf16" else 1 << 22) if on_cpu else 1 << 27  # as in loss.py
    slices = min(most, logits) * (1 if on_cpu else 3)
    libraries = 192 << 20 if on_cpu else 0  # what the optimiser and the picture import
    return 4 * (4 * config.num_parameters() + head + slices) + tokens * layers + libraries


def _needed(config: Mamba2Config, settings: Settings, device: torch.device, batch: int, context: int) -> int:
    precision = pick_precision(settings.precision, device)
    return training_memory(config, batch, context, device, settings.recompute, precision)


def fit_to_memory(config: Mamba2Config, settings: Settings, device: torch.device) -> Settings:
    """The settings with a micro-batch that fits what is free, where they leave it to the machine: the batch, halved
    until it does. Once chosen it is kept, or a run that goes on would add its gradients up in another order."""
    if not settings.adapt_micro_batch or settings.micro_batch:
        return settings
    micro, free = settings.batch_size, free_memory(device)
    while micro > 1 and free is not None and _needed(config, settings, device, micro, settings.context) > free:
        micro = -(-micro // 2)
    return dataclasses.replace(settings, micro_batch=micro)


def check_memory(
    config: Mamba2Config, settings: Settings, device: torch.device, ignore: bool = False
) -> tuple[str, str]:
    """What a step will need and what is free, for people ("" where the system does not tell).

    Raises UserError that says what to lower, and to what, where it is too much, unless that is to be ignored.
    """
    micro, context = settings.micro_batch or settings.batch_size, settings.context
    needed, free = _needed(config, settings, device, micro, context), free_memory(device)
    if free is None or needed <= free or ignore:
        return size(needed), "" if free is None else size(free)
    says = f"training needs about {size(needed)}, and {size(free)} is free"

    def fits(batch: int, length: int) -> bool:
        return _needed(config, settings, device, batch, length) <= free

    if not fits(1, 1):
        raise UserError(f"{says}: the model alone is too large; lower --d-model, --n-layer or --vocab-size")
    flag = "--micro-batch" if settings.micro_batch else "--batch-size"
    # The most of each that fits beside the other, or 0.
    batch = bisect.bisect_left(range(micro), True, key=lambda b: not fits(b + 1, context))
    length = bisect.bisect_left(range(context), True, key=lambda n: not fits(micro, n + 1))
    options = [f"{flag} from {micro} to {batch}"] if batch else []
    options += [f"--context from {context} to {length}"] if length else []
    lower = " or ".join(options) or f"both {flag} and --context"
    auto = "" if settings.adapt_micro_batch else "; --batch-size auto computes the same batch in parts"
    raise UserError(f"{says}: lower {lower}{auto} (--ignore-memory starts all the same)")


def size(n_bytes: float) -> str:
    """Bytes for people: 4.2 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            return f"{n_bytes:.0f} {unit}" if n_bytes >= 100 or unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    raise AssertionError("unreachable")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no room for a tensor: torch has one type for GPUs and none for the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_ROOM)


_NO_ROOM = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")


def release_memory(device: torch.device) -> None:
    """Gives what was freed back to the device, so that smaller pieces can be cut from it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def make_deterministic() -> None:
    """Asks CUDA for the same bits every time, for the rest of the process; before anything is computed on it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def keep_freed_memory() -> None:
    """Tells glibc to keep freed blocks instead of giving them back to the system.

    A training step frees and asks for the same large tensors again and again, and by default each of them costs page
    faults anew. Elsewhere than on Linux with glibc nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 << 20)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def cpu_threads() -> int:
    """CPU cores that this process may use, or as many as OMP_NUM_THREADS says."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted):
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
