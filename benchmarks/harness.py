"""How everything here is measured.

Time:   all peers live in one process and take turns, round by round, each round beginning with another peer, so that a
        machine that slows down slows all of them. Warm-up rounds are not counted. A speed is the median of the rounds,
        its spread the quartiles, and a ratio the median of each round's own ratio.
Memory: each peer alone, above what its process held before the model was built. On a CPU that is a fresh process. On a
        GPU, whose allocator counts to the byte, it is this one: compilers take half a minute anew in each process.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import platform
import re
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from mamba2_min import devices
from mamba2_min.config import Mamba2Config
from mamba2_min.errors import UserError
from mamba2_min.flags import HelpFormatter

RESULTS = Path(__file__).parent / "results"
OURS = "mamba2_min"  # the peer that the ratios are about
FLOOR = "floor"  # the matrix products alone, a peer like the others
USUAL_PRECISION = {"cpu": "float32", "cuda": "bf16"}

Measurement = dict[str, Any]


class Unavailable(Exception):
    """A peer that cannot be measured here; its text says why."""


@dataclass(frozen=True)
class Options:
    """What every benchmark can be told. Small and picklable: the processes that measure memory get it too."""

    device: str = "cpu"
    threads: int = 2
    precision: str = "float32"  # or "bf16", in the sense of train.py's --precision
    usual_malloc: bool = False
    rounds: int = 7
    warmup: int = 2
    memory: bool = True

    def prepare(self) -> None:
        """Sets this process up as the options say, and otherwise as train.py does: for every peer alike."""
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        if self.device == "cpu" and not self.usual_malloc:
            devices.keep_freed_memory()

    def products(self) -> AbstractContextManager:
        """How float32 matrices are multiplied, forward and backward."""
        return devices.matmul_precision(torch.device(self.device), self.precision)

    def autocast(self) -> AbstractContextManager:
        """What a forward pass runs in."""
        return devices.autocast(torch.device(self.device), self.precision)

    @property
    def operand_dtype(self) -> torch.dtype:
        """What a projection's operands are: with bf16 a GPU has them so, and a CPU rounds them on their way in."""
        return torch.bfloat16 if self.precision == "bf16" and self.device == "cuda" else torch.float32

    @property
    def weight_dtype(self) -> torch.dtype:
        """What weights are kept in where nothing is trained."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def parser(name: str, description: str, peers: Sequence[str]) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has. `peers`: those it compares unless told otherwise."""
    p = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=description, formatter_class=HelpFormatter
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    p.add_argument("--precision", choices=("float32", "bf16"), help="default: float32 on a CPU, bf16 on a GPU")
    p.add_argument("--usual-malloc", action="store_true", help="leave the C library's allocator as it is")
    p.add_argument("--rounds", type=int, default=7, help="rounds that count (default: 7)")
    p.add_argument("--peers", nargs="+", default=list(peers), help=f"default: {' '.join(peers)}")
    p.add_argument("--settings", nargs="+", help="only these (default: all for the device)")
    p.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    p.add_argument("--quick", action="store_true", help="one round of tiny sizes: does it work? Nothing is written")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (default: benchmarks/results)")
    return p


def options(args: argparse.Namespace) -> Options:
    """The options that a parser of `parser` read. Exits with one line where the results could not be written later."""
    if args.out.exists() and not args.out.is_dir():
        sys.exit(f"error: --out {args.out} is a file; it must be a folder")
    return Options(
        device=args.device,
        threads=args.threads,
        precision=args.precision or USUAL_PRECISION[args.device],
        usual_malloc=args.usual_malloc,
        rounds=1 if args.quick else args.rounds,
        warmup=1 if args.quick else Options.warmup,
        memory=not args.no_memory,
    )


def choose(settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The settings that --settings names. Exits with one line for an unknown one."""
    unknown = set(args.settings or ()) - settings.keys()
    if unknown:
        sys.exit(f"error: no setting {', '.join(sorted(unknown))}; there are {', '.join(settings)}")
    return {name: settings[name] for name in args.settings or settings}


def take_turns(works: dict[str, Callable[[], Any]], options: Options) -> dict[str, list[float]]:
    """Seconds that each work took in each round. Every work runs once a round; warm-up rounds are dropped."""
    names = list(works)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with options.products():
        for i in range(options.warmup + options.rounds):
            gc.collect()
            first = i % max(1, len(names))
            for name in names[first:] + names[:first]:
                options.synchronize()
                started = time.perf_counter()
                works[name]()
                options.synchronize()
                if i >= options.warmup:
                    seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def ratio(measurement: Measurement, slower: str, faster: str = OURS) -> float | None:
    """How many times as long `slower` takes as `faster`: the median over rounds. None where either was not measured."""
    pair = [measurement["peers"].get(name, {}).get("seconds") for name in (slower, faster)]
    if not all(pair):
        return None
    return statistics.median(a / b for a, b in zip(*pair, strict=True))


def timed(seconds: Sequence[float], things: int = 1, tokens: int | None = None) -> dict[str, Any]:
    """What the rounds' seconds say of one of the `things` things, of `tokens` tokens, that a round does."""
    each = [s / things for s in seconds]
    low, median, high = spread(each)
    entry = {"seconds": each, "median": median, "quartiles": [low, high]}
    if tokens is not None:
        entry["tokens_per_second"] = tokens / median
    return entry


class MemoryMeter:
    """Peak memory of this process (of the GPU, on one) above what it held when the meter was made, in bytes."""

    def __init__(self, device: str):
        self._device = device
        self._before = self._held()

    def start(self) -> None:
        """Forgets earlier peaks. Only Linux can, for a CPU; elsewhere the highest of all is reported."""
        gc.collect()
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with suppress(OSError):
            release_free_memory()
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now

    def peak(self) -> int:
        if self._device == "cuda":
            return torch.cuda.max_memory_allocated() - self._before
        return self._resident("VmHWM") - self._before

    def _held(self) -> int:
        gc.collect()
        if self._device == "cuda":
            return torch.cuda.memory_allocated()
        release_free_memory()
        return self._resident("VmRSS")

    @staticmethod
    def _resident(field: str) -> int:
        status = Path("/proc/self/status")
        if status.exists():
            return 1024 * int(re.search(rf"{field}:\s+(\d+)", status.read_text())[1])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def release_free_memory() -> None:
    """Gives the heap's free pages back to the system, where the C library can (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def compare(
    names: Sequence[str],
    setting: Any,
    options: Options,
    peak: Callable[[str, Any, Options], int],
    prepare: Callable[[str, Any, Options], tuple[Callable[[], Any], dict[str, Any]]],
    things: int = 1,
    tokens: int | None = None,
) -> dict[str, dict[str, Any]]:
    """An entry for each name: memory, time and what else is known of it; or "skipped", with the reason.

    peak(name, setting, options): bytes, measured alone. prepare(name, setting, options): the work of one round, which
    is `things` things (steps, tokens a row) of `tokens` tokens each, and facts for the entry. Both may raise
    Unavailable. The floor's memory is not asked for.
    """
    entries: dict[str, dict[str, Any]] = {name: {} for name in names}
    works = {}
    if options.memory:
        alone = in_this_process if options.device == "cuda" else in_fresh_process
        for name in names:
            if name != FLOOR:
                with _noting(entries[name]):
                    entries[name]["peak_bytes"] = alone(_prepared, peak, name, setting, options)
                forget(options)
    for name in names:
        if "skipped" not in entries[name]:
            with _noting(entries[name]):
                works[name], facts = prepare(name, setting, options)
                entries[name] |= facts
    for name, seconds in take_turns(works, options).items():
        entries[name] |= timed(seconds, things, tokens)
    works.clear()
    forget(options)
    return entries


def forget(options: Options) -> None:
    """Frees unused memory, and compiled code: after too many shapes a compiler would not compile the next."""
    torch.compiler.reset()
    devices.release_memory(torch.device(options.device))


def _prepared(peak: Callable[[str, Any, Options], int], name: str, setting: Any, options: Options) -> int:
    options.prepare()
    try:
        with options.products():
            return peak(name, setting, options)
    except (Unavailable, MemoryError):
        raise
    except Exception as error:  # as text: a compiler's errors cannot be sent to another process
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


@contextmanager
def _noting(entry: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except Unavailable as reason:
        entry["skipped"] = str(reason)


def pool(workers: int) -> ProcessPoolExecutor:
    """Fresh processes, which end when this one does, however it ends."""
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_end_with, initargs=(os.getpid(),))


def _end_with(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a process of its own. Raises Unavailable where that runs out of memory."""
    with pool(1) as fresh:
        try:
            return in_this_process(fresh.submit(function, *args).result)
        except BrokenProcessPool:  # the system stopped it
            raise Unavailable("out of memory") from None


def in_this_process(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args). Raises Unavailable where that runs out of memory."""
    try:
        return function(*args)
    except (MemoryError, RuntimeError) as error:
        if devices.is_out_of_memory(error):
            raise Unavailable("out of memory") from None
        raise


def measurement(benchmark: str, setting: str, about: dict[str, Any], options: Options, peers: dict) -> Measurement:
    """One result, complete in itself: what was measured, where, when, how to do it again, and what came out."""
    return {
        "benchmark": benchmark,
        "setting": setting,
        "about": about | {"device": options.device, "precision": options.precision},
        "machine": machine(options),
        "versions": versions(),
        "date": date.today().isoformat(),
        "command": command(benchmark),
        "peers": peers,
    }


def machine(options: Options) -> dict[str, Any]:
    """What the figures depend on, and nothing that tells one machine of a kind from another."""
    about = {
        "cpu": _cpu_name(),
        "architecture": platform.machine(),
        "threads": options.threads,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": platform.system(),
    }
    if options.device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        about |= {"gpu": gpu.name, "gpu_memory_gb": round(gpu.total_memory / 1e9)}
    return about


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or "unknown"


def versions() -> dict[str, str]:
    """Of Python and of every package that a peer may come from."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "mamba_ssm", "causal_conv1d", "triton"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def command(benchmark: str) -> str:
    """The command line, without the folder that --out names."""
    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word == "--out":
            next(words, None)
        elif not word.startswith("--out="):
            kept.append(word)
    return " ".join(["python -m benchmarks." + benchmark, *kept])


def save(result: Measurement, folder: Path) -> Path:
    """Puts a measurement into folder/BENCHMARK-DEVICE.json, in the place of an older one of the same setting.

    Where the precision is not the device's usual one, it is part of the file's name.
    """
    device, precision = result["about"]["device"], result["about"]["precision"]
    unusual = "" if precision == USUAL_PRECISION[device] else f"-{precision}"
    path = folder / f"{result['benchmark']}-{device}{unusual}.json"
    kept = [old for old in load(path) if old["setting"] != result["setting"]]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(sorted([*kept, result], key=_by_numbers)))
    return path


def assignment(text: str) -> tuple[str, Any]:
    """NAME=VALUE of a command line: for argparse, which makes one line of the error.

    The value is as JSON has it, or a word without quotes, as in optimizer=muon.
    """
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        if value.replace("-", "_").isidentifier():
            return name, value
        expected = "NAME=VALUE with a value such as 64, 0.1, true or a word"
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}") from None


@contextmanager
def explained() -> Iterator[None]:
    """A context in which the ValueError of a config or of settings becomes a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


def model_values(usual: dict[str, Any], assignments: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The values of a Mamba2Config but for vocab_size, which the text gives: the usual ones with those of --set.

    Raises UserError for a name or a value that no Mamba-2 has.
    """
    values = usual | dict(assignments)
    if "vocab_size" in values:
        raise UserError("--set cannot name vocab_size, which the text gives")
    with explained():
        Mamba2Config(vocab_size=1, **values)
    return values


def changed(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that do not have their default values."""
    usual = dataclasses.asdict(type(settings)())
    return {name: value for name, value in dataclasses.asdict(settings).items() if value != usual[name]}


def as_json(results: Any) -> str:
    """Indented JSON in which a list of plain values is one line."""
    text = json.dumps(results, indent=1)
    return re.sub(r"\[[^][{}]*\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n"


def _by_numbers(result: Measurement) -> list[str | int]:
    """Sorts l512 before l4096."""
    parts = re.split(r"(\d+)", result["setting"])  # text and numbers by turns
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def load(path: Path) -> list[Measurement]:
    """The measurements in a file; none where there is no file."""
    return json.loads(path.read_text()) if path.exists() else []


def main_of(
    benchmark: str,
    doc: str | None,
    settings: tuple[dict[str, Any], dict[str, Any]],
    measure: Callable[[str, Any, Options], Measurement],
    summary: Callable[[dict[str, Any]], str],
) -> None:
    """The command line of a benchmark without peers: measures each of the settings (usual, --quick) and sums it up."""
    args = parser(benchmark, doc, ()).parse_args()
    chosen = options(args)
    chosen.prepare()
    for name, setting in choose(settings[1 if args.quick else 0], args).items():
        result = measure(name, setting, chosen)
        finish(result, args)
        print(f"  {summary(result['about'])}")


def show(result: Measurement) -> None:
    """Prints a measurement as a table."""
    print(f"\n{result['benchmark']}  {result['setting']}  {result['about']['device']} {result['about']['precision']}")
    print(f"  {'':24} {'ms':>10} {'quartiles':>17} {'tokens/s':>12} {'x ours':>8} {'peak MB':>9}")
    for name, peer in result["peers"].items():
        if "seconds" not in peer:
            print(f"  {name:24} {peer.get('skipped', '')}")
            continue
        low, high = (f"{1e3 * s:.4g}" for s in peer["quartiles"])
        speed = f"{peer['tokens_per_second']:,.0f}" if "tokens_per_second" in peer else ""
        times = ratio(result, name)
        memory = f"{peer['peak_bytes'] / 1e6:,.0f}" if peer.get("peak_bytes") else ""
        print(
            f"  {name:24} {1e3 * peer['median']:10.4g} {low:>8} {high:>8} {speed:>12} "
            f"{'' if times is None else f'{times:.2f}':>8} {memory:>9}"
        )


def finish(result: Measurement, args: argparse.Namespace) -> None:
    """Shows a measurement and, unless --quick, writes it."""
    show(result)
    if not args.quick:
        print(f"  -> {save(result, args.out).name}")
