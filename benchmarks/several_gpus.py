"""Several processes beside one: the tokens per second of a training, and of one long text that they share.

    python -m benchmarks.several_gpus --device cuda --processes 2      starts the processes itself, one a GPU
    python -m benchmarks.several_gpus                                  two of one thread beside one of two threads

    step, step-graph,           the base model, 8 windows of 2,048 tokens a process: as train.py takes its steps, with
    step-compile, step-shard    --graph, with --compile, and several with --shard. On a CPU the same batch for either
    text                        one text of 262,144 tokens with --context-parallel, beside the longest that one GPU
                                takes with --recompute

What is timed is `Trainer.train` from step to step, on random tokens. Either side starts anew in each round, by turns. A
part that fails or exceeds its limit is left out; the others are written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, peers
from benchmarks.harness import MemoryMeter, Options
from mamba2_min.config import Mamba2Config
from mamba2_min.data.corpus import Corpus
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.settings import Settings
from mamba2_min.training import distributed
from mamba2_min.training.trainer import Trainer

# Of a model: windows a process and their length; the text that processes share, and lengths for one, longest first.
SHAPES: dict[str, dict[str, Any]] = {
    "base": {"batch": 8, "length": 2048, "text": 262_144, "alone": [3 * 2**18, 5 * 2**17, 2**19, 2**18, 2**17]},
    "small": {"batch": 8, "length": 256, "text": 16_384, "alone": [16_384]},
    "tiny": {"batch": 2, "length": 48, "text": 512, "alone": [512, 256]},
}
STEPS: dict[str, dict[str, Any]] = {
    "step": {},
    "step-graph": {"graph": True},
    "step-compile": {"compile": True},
    "step-shard": {},
}
PARTS = (*STEPS, "text")
USUAL = {"cuda": PARTS, "cpu": ("step",)}
WARM_UP = 4
_ERROR = re.compile(r"(\[rank\d+\]: )?(error|[\w.]*Error): ")


class Enough(Exception):
    """So many steps were timed."""


def work(job: dict[str, Any]) -> None:
    """One of the processes: trains as the job says. The first writes seconds, peaks and reports to a file."""
    options = Options(device=job["device"], threads=job["threads"], precision=job["precision"])
    options.prepare()
    device = distributed.local_device(torch.device(options.device))
    config = peers.MODELS[job["shape"]]
    with distributed.joined(device, job["stretches"], job["sharded"]) as team, tempfile.TemporaryDirectory() as folder:
        meter = MemoryMeter(options.device)
        words = WordTokenizer([f"word{k}" for k in range(config.vocab_size - 257)])
        tokens = torch.randint(config.vocab_size, (4 * job["batch"] * job["length"],), dtype=torch.int32)
        corpus = Corpus(words, tokens, tokens[:1000], len(tokens), 1000, 1, 1, 1, 1)
        settings = Settings(
            context=job["length"],
            batch_size=job["batch"],
            micro_batch=-(-job["batch"] // team.divides),
            precision=options.precision,
            carry_state=False,
            max_steps=10**6,
            eval_every=10**6,
            save_every=10**6,
            spike=0.0,
            **job["settings"],
        )
        reports: list[dict[str, Any]] = []
        times: list[float] = []

        def report(event: str, values: dict[str, Any]) -> None:
            if event != "step":
                reports.append({"event": event, **values})
                return
            times.append(time.perf_counter())
            if len(times) == WARM_UP:
                meter.start()
            if len(times) > WARM_UP + job["steps"]:
                raise Enough

        trainer = Trainer(Mamba2LM(config, seed=0), corpus, settings, folder, device, report=report)
        with contextlib.suppress(Enough):
            trainer.train()
        peaks = [int(peak) for (peak,) in team.agree(meter.peak())]
        if team.leads:
            between = [b - a for a, b in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False)]
            Path(job["result"]).write_text(json.dumps({"seconds": between, "peaks": peaks, "reports": reports}))


def launch(job: dict[str, Any], processes: int, until: float) -> dict[str, Any]:
    """What `work` wrote, of so many processes; or {"skipped": why not}. `until`: by time.monotonic()."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.several_gpus", "--work", json.dumps(job | {"result": str(result)})]
        running, said = [], []
        for rank in range(processes):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": job["threads"]}
            environment = os.environ | {name: str(value) for name, value in place.items()}
            said.append(Path(folder) / f"{rank}.txt")
            with said[-1].open("w") as errors:
                running.append(subprocess.Popen(command, env=environment, stderr=errors, start_new_session=True))
        try:
            while any(one.poll() is None for one in running):
                if any(one.poll() for one in running):
                    time.sleep(5)  # for the others to say what they have to
                    break
                if time.monotonic() > until:
                    return {"skipped": "it exceeded its time limit"}
                time.sleep(0.1)
        finally:
            for one in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(one.pid, signal.SIGKILL)
                one.wait()
        if result.exists() and not any(one.returncode for one in running):
            return json.loads(result.read_text())
        failed = [text for text, one in zip(said, running, strict=True) if one.returncode]
        lines = [line for text in failed for line in text.read_text().splitlines() if line.strip()]
        errors = [line for line in lines if _ERROR.match(line) and "another process" not in line]
        return {"skipped": (errors or lines or ["it ended without a word"])[-1][:300]}


def entry(rounds: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """A peer's entry from its rounds, each what `launch` gave: of all their steps."""
    skipped = [one["skipped"] for one in rounds if "skipped" in one]
    if skipped or not rounds:
        return {"skipped": (skipped or ["not reached"])[0]}
    found = harness.timed([s for one in rounds for s in one["seconds"]], 1, tokens)
    found["peak_bytes"] = max(peak for one in rounds for peak in one["peaks"])
    found["reports"] = rounds[0]["reports"]
    return found


def times_as_fast(many: list[dict[str, Any]], alone: list[dict[str, Any]], tokens: tuple[int, int]) -> float | None:
    """Tokens per second of the many over those of one: the median of the rounds' own ratios."""
    ratios = [
        tokens[0] / statistics.median(a["seconds"]) * statistics.median(b["seconds"]) / tokens[1]
        for a, b in zip(many, alone, strict=False)
        if "seconds" in a and "seconds" in b
    ]
    return statistics.median(ratios) if ratios else None


def measure_steps(part: str, args: argparse.Namespace, options: Options, until: float) -> harness.Measurement:
    """Steps of one process and of several, by turns. On GPUs each has its own windows, on a CPU they share them."""
    shape, on_gpu = SHAPES[args.shape], options.device == "cuda"
    batches = [shape["batch"], shape["batch"] * args.processes if on_gpu else shape["batch"]]
    threads = [options.threads, max(1, options.threads // args.processes)]
    sides: list[list[dict[str, Any]]] = [[], []]
    for k in range(options.rounds):
        for side in (0, 1) if k % 2 == 0 else (1, 0):
            job = job_of(args, options, batches[side], shape["length"], STEPS[part]) | {"threads": threads[side]}
            job["sharded"] = part == "step-shard" and side == 1
            sides[side].append(launch(job, (1, args.processes)[side], until))
        if any("skipped" in one[-1] for one in sides):
            break
    tokens = [batch * shape["length"] for batch in batches]
    names = [f"{n} process{'es' if n > 1 else ''}" for n in (1, args.processes)]
    about = {"batches": batches, "length": shape["length"], "threads": threads, **STEPS[part]}
    about["times_as_fast"] = times_as_fast(sides[1], sides[0], (tokens[1], tokens[0]))
    entries = {name: entry(rounds, n) for name, rounds, n in zip(names, sides, tokens, strict=True)}
    return finished(f"{part}-{args.shape}-{args.processes}", args, about, options, entries)


def measure_text(args: argparse.Namespace, options: Options, until: float) -> harness.Measurement:
    """A step of one text that the processes share, without and with --recompute; and of the longest for one GPU."""
    shape, entries = SHAPES[args.shape], {}
    for settings in ({}, {"recompute": True}):
        job = job_of(args, options, 1, shape["text"], settings) | {"stretches": args.processes, "steps": 4}
        name = f"{args.processes} processes, {shape['text']:,} tokens{', --recompute' if settings else ''}"
        entries[name] = entry([launch(job, args.processes, until)], shape["text"])
    for length in shape["alone"]:
        job = job_of(args, options, 1, length, {"recompute": True}) | {"steps": 4}
        name = f"1 process, {length:,} tokens, --recompute"
        entries[name] = entry([launch(job, 1, until)], length)
        if "seconds" in entries[name]:
            break
    speeds = {name: one["tokens_per_second"] for name, one in entries.items() if "seconds" in one}
    many = [speed for name, speed in speeds.items() if not name.startswith("1 ")]
    alone = [speed for name, speed in speeds.items() if name.startswith("1 ")]
    about = {"text": shape["text"], "times_as_fast": max(many) / alone[0] if many and alone else None}
    return finished(f"text-{args.shape}-{args.processes}", args, about, options, entries)


def job_of(args: argparse.Namespace, options: Options, batch: int, length: int, settings: dict[str, Any]) -> dict:
    return {
        "device": options.device,
        "precision": options.precision,
        "threads": options.threads,
        "shape": args.shape,
        "batch": batch,
        "length": length,
        "stretches": 1,
        "sharded": False,
        "steps": args.steps,
        "settings": settings,
    }


def finished(
    setting: str, args: argparse.Namespace, about: dict[str, Any], options: Options, entries: dict[str, Any]
) -> harness.Measurement:
    config: Mamba2Config = peers.MODELS[args.shape]
    about |= {"processes": args.processes, "model": config.to_dict()}
    return harness.measurement("several_gpus", setting, about, options, entries)


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.several_gpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--work", help=argparse.SUPPRESS)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--processes", type=int, default=2, help="beside one (default: 2)")
    p.add_argument("--shape", choices=SHAPES, help="default: base on GPUs, small on a CPU")
    p.add_argument("--only", nargs="+", choices=PARTS, help="default: all on GPUs, step on a CPU")
    p.add_argument("--threads", type=int, default=2, help="CPU threads in all (default: 2)")
    p.add_argument("--precision", choices=("float32", "bf16"), help="default: float32 on a CPU, bf16 on a GPU")
    p.add_argument("--rounds", type=int, help="starts of either side (default: 2 on GPUs, 7 on a CPU)")
    p.add_argument("--steps", type=int, default=20, help="timed steps in a round (default: 20)")
    p.add_argument("--limit", type=float, default=300, help="seconds for each part (default: 300)")
    p.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON (benchmarks/results)")
    args = p.parse_args()
    if args.work:
        work(json.loads(args.work))
        return
    if args.device == "cuda" and torch.cuda.device_count() < args.processes:
        raise UserError(f"{args.processes} processes need as many GPUs, and there are {torch.cuda.device_count()}")
    args.shape = args.shape or {"cuda": "base", "cpu": "small"}[args.device]
    options = Options(
        device=args.device,
        threads=args.threads,
        precision=args.precision or harness.USUAL_PRECISION[args.device],
        rounds=args.rounds or {"cuda": 2, "cpu": 7}[args.device],
    )
    for part in args.only or USUAL[args.device]:
        until = time.monotonic() + args.limit
        result = measure_text(args, options, until) if part == "text" else measure_steps(part, args, options, until)
        harness.show(result)
        fast = result["about"]["times_as_fast"]
        print(f"  {args.processes} are {fast:.3f} times as fast as one" if fast else "  no ratio")
        print(f"  -> {harness.save(result, args.out).name}", flush=True)


if __name__ == "__main__":
    from mamba2_min.errors import run_script

    run_script(main)
