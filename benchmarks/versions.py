"""This package beside an older checkout of it: a training step and decoding, by turns, each turn in a fresh process.

    python -m benchmarks.versions --before FOLDER

A ratio is the older version's time over this one's, the median over turns: above 1, this version is faster. In both the
optimizer, the sizes and the numbers drawn are the same; "base" has 4 of its 24 layers and a small vocabulary, because
its layers are what is asked about. --processor-time counts the seconds that the processor worked, which other programs
on a busy machine change less; it needs --threads 1, because threads that wait for each other work too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import harness

ROOT = Path(__file__).parent.parent
SMALL = {"vocab_size": 13148, "d_model": 256, "n_layer": 4, "d_state": 64}
BASE = {"vocab_size": 1000, "d_model": 768, "n_layer": 4, "d_state": 128}
SETTINGS: dict[str, dict[str, Any]] = {  # rounds: how often a turn repeats the work after two that do not count
    "train-small-b8-l256": {"work": "train", "config": SMALL, "batch": 8, "length": 256, "rounds": 4},
    "train-base-b1-l1024": {"work": "train", "config": BASE, "batch": 1, "length": 1024, "rounds": 3},
    "decode-small": {"work": "decode", "config": SMALL, "batch": 1, "length": 100, "rounds": 3},
}
TINY = {"vocab_size": 50, "d_model": 32, "n_layer": 1, "d_state": 8, "headdim": 16}
QUICK = {
    "train-tiny": {"work": "train", "config": TINY, "batch": 2, "length": 40, "rounds": 1},
    "decode-tiny": {"work": "decode", "config": TINY, "batch": 1, "length": 5, "rounds": 1},
}

# What a process runs, with one of the two checkouts on its path.
TURN = """
import json, sys, time
import torch
from mamba2_min import devices
from mamba2_min.config import Mamba2Config
try:
    from mamba2_min.models.mamba2 import Mamba2LM
    from mamba2_min.inference import stepping  # registers the fast steps
    from mamba2_min.inference.decoding import lay_out_columns
except ImportError:
    from mamba2_min.model import Mamba2LM
    from mamba2_min.decoding import lay_out_columns
s = json.loads(sys.argv[1])
torch.set_num_threads(s["threads"])
torch.manual_seed(0)
clock = time.process_time if s["processor_time"] else time.perf_counter
devices.keep_freed_memory()
model = Mamba2LM(Mamba2Config(**s["config"]), seed=0)
ids = torch.randint(s["config"]["vocab_size"], (s["batch"], s["length"] + 1))
if s["work"] == "train":
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    def work():
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
else:
    lay_out_columns(model.eval())
    def work():
        for _ in model.generate([1, 2, 3], s["length"], temperature=0):
            pass
seconds = []
for k in range(s["rounds"] + 2):
    began = clock()
    work()
    seconds.append(clock() - began)
print(json.dumps(seconds[2:]))
"""


def turn(checkout: Path, setting: dict[str, Any], threads: int, processor_time: bool = False) -> float:
    """Seconds of one piece of work, the median of a fresh process. Exits with one line where that fails."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
    told = {**setting, "threads": threads, "processor_time": processor_time}
    arguments = [sys.executable, "-c", TURN, json.dumps(told)]
    done = subprocess.run(arguments, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: the package in {checkout} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return statistics.median(json.loads(done.stdout.splitlines()[-1]))


def measure(
    name: str, setting: dict[str, Any], before: Path, turns: int, threads: int, processor_time: bool = False
) -> harness.Measurement:
    """Both versions `turns` times, each of them first in every other turn."""
    seconds: dict[str, list[float]] = {"before": [], "now": []}
    checkouts = {"before": before, "now": ROOT}
    for k, which in itertools.product(range(turns), (0, 1)):
        version = ("before", "now")[(k + which) % 2]
        seconds[version].append(turn(checkouts[version], setting, threads, processor_time))
    ratios = [a / b for a, b in zip(seconds["before"], seconds["now"], strict=True)]
    low, median, high = harness.spread(ratios)
    clock = "processor" if processor_time else "wall"
    about = {"device": "cpu", "precision": "float32", **setting, "clock": clock}
    about |= {"ratio": median, "ratio_quartiles": [low, high]}
    flags = f" --threads {threads} --processor-time" if processor_time else f" --threads {threads}"
    return {
        "benchmark": "versions",
        "setting": name,
        "about": about,
        "machine": harness.machine(harness.Options(threads=threads)),
        "versions": harness.versions(),
        "date": date.today().isoformat(),
        "command": f"python -m benchmarks.versions --before FOLDER --settings {name} --turns {turns}{flags}",
        "peers": {version: harness.timed(values) for version, values in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versions", description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, metavar="FOLDER", help="an older checkout")
    parser.add_argument("--turns", type=int, default=4, metavar="N", help="fresh processes of each version (4)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads (2)")
    parser.add_argument("--processor-time", action="store_true", help="for a busy machine; with --threads 1")
    parser.add_argument("--settings", nargs="+", help="only these (all)")
    parser.add_argument("--quick", action="store_true", help="one turn of tiny sizes; nothing is written")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON (benchmarks/results)")
    args = parser.parse_args()
    if not (args.before / "mamba2_min").is_dir():
        parser.error(f"{args.before} is not a checkout: it has no folder mamba2_min")
    if args.processor_time and args.threads != 1:
        parser.error("--processor-time needs --threads 1")
    for name, setting in harness.choose(QUICK if args.quick else SETTINGS, args).items():
        turns = 1 if args.quick else args.turns
        result = measure(name, setting, args.before.resolve(), turns, args.threads, args.processor_time)
        low, high = result["about"]["ratio_quartiles"]
        medians = ", ".join(f"{version} {1e3 * peer['median']:.4g} ms" for version, peer in result["peers"].items())
        print(f"{name}: {medians}; before / now {result['about']['ratio']:.3f} ({low:.3f} to {high:.3f})", flush=True)
        if not args.quick:
            harness.save(result, args.out)


if __name__ == "__main__":
    main()
