"""Where the work runs and in what precision, and how much memory is free there."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from mamba2_min.errors import UserError
from mamba2_min.settings import PRECISIONS


def pick_device(name: str = "auto") -> torch.device:
    """The device of this name; "auto" is the first available of cuda, mps, cpu. Raises UserError for any other."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, there in available.items() if there))
    kind = name.split(":")[0]
    if kind not in available:
        raise UserError(f"unknown device {name!r}; choose auto, cpu, cuda or mps")
    if not available[kind]:
        raise UserError(f"this machine has no {kind} device that torch can use; try --device cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{name!r} is not a device; only a number may follow the name, as in cuda:1") from error
    if kind == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"there is no {name}: this machine has {torch.cuda.device_count()}, counted from 0")
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """The precision of this name; "auto" is bf16 where the hardware multiplies it, and float32 elsewhere.

    That is on GPUs from compute capability 8.0 on (a T4, 7.5, only emulates it, slowly) and on CPUs with AMX.
    """
    if name not in PRECISIONS:
        raise UserError(f"unknown precision {name!r}; choose {', '.join(PRECISIONS)}")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bf16" if device.type == "cpu" and has_amx() else "float32"


def has_amx() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware; without it, bf16 is slower than float32."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context of a forward pass: on a GPU, projections and their results are bf16; states and sums stay float32."""
    if precision == "float32" or device.type == "cpu":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@contextlib.contextmanager
def matmul_precision(device: torch.device, precision: str) -> Iterator[None]:
    """The context of forward and backward pass: how the operands of float32 matrix products are rounded.

    With "bf16" a CPU rounds them to bf16, and everything else stays float32; a GPU rounds what autocast leaves in
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
    """Bytes that can still be allocated on the device, or None where the system does not tell."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_memory()


def free_host_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still allocate, or None where the system does not tell.

    It is what Linux calls available, or less if a container or another control group has a limit. Page cache counts as
    free: the kernel gives it up when memory is needed. `root` is where proc and sys are mounted.
    """
    try:
        lines = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    for folder, (limit, used, cache) in _control_groups(root):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit here
            room = int((folder / limit).read_text()) - int((folder / used).read_text())
            free = min(free, room + _cached(folder / "memory.stat", cache))
    return max(free, 0)


# Of each version of control groups: the files of the limit and of what is used, and the cache in memory.stat.
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable"))


def _control_groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, tuple[str, ...]]]]:
    """The folder of each control group that may limit this process's memory, its own and those around it."""
    mounts = {"": (root / "sys/fs/cgroup", _V2), "memory": (root / "sys/fs/cgroup/memory", _V1)}
    for mount, files in mounts.values():
        yield mount, files
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:  # "0::/user.slice" or "4:memory:/docker/7c2"
        controllers, _, path = line.partition(":")[2].partition(":")
        for controller in controllers.split(","):
            if controller in mounts:
                mount, files = mounts[controller]
                inner = Path(path.strip("/"))
                yield from ((mount / part, files) for part in (inner, *inner.parents) if part != Path("."))


def _cached(statistics: Path, names: tuple[str, ...]) -> int:
    with contextlib.suppress(OSError, ValueError):
        lines = [line.split() for line in statistics.read_text().splitlines()]
        return sum(int(line[1]) for line in lines if len(line) == 2 and line[0] in names)
    return 0


def size(n_bytes: float) -> str:
    """A number of bytes for people: 4.2 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            return f"{n_bytes:.0f} {unit}" if n_bytes >= 100 or unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    raise AssertionError("unreachable")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out. torch has a type for that on GPUs; on a CPU only the text tells."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_ROOM)


_NO_ROOM = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")


def release_memory(device: torch.device) -> None:
    """Returns freed blocks to the device, so that they can be split."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def make_deterministic() -> None:
    """Makes CUDA compute the same bits every time, for the rest of the process. Call it before CUDA is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def keep_freed_memory() -> None:
    """Makes glibc keep freed blocks instead of returning them to the system. Does nothing without glibc.

    Every training step frees and allocates the same large tensors, and by default each costs new page faults.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 << 20)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def cpu_threads(device: torch.device | None = None) -> int:
    """The value of OMP_NUM_THREADS, or the number of CPU cores that this process may use; on a GPU, 1.

    What remains for the CPU is then so little that threads would only wait for each other: on cores that others use
    too, ten times as long as the work takes.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and len(wanted) < 5 and int(wanted):  # no machine starts more
        return int(wanted)
    if device and device.type != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
