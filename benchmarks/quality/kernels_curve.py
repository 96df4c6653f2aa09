"""The loss of a short training with our kernels and without any, two seeds each: is the difference that of two seeds?

    python -m benchmarks.quality.kernels_curve --data wikitext-2 --device cuda

Without kernels means the scan of ssd/plain.py and the definitions of convolution, norms and loss in plain PyTorch. With
one seed, weights and batches are the same both ways, so the curves differ by rounding alone. On a CPU "with kernels"
stands for the scan for CPUs. A training that the results hold is left out: a benchmark that was stopped goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import harness
from benchmarks.quality import texts
from mamba2_min import devices, files, ssd
from mamba2_min.config import Mamba2Config
from mamba2_min.data.corpus import Corpus, load_corpus
from mamba2_min.errors import UserError, run_script
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.ops import gpu_kernels
from mamba2_min.settings import Settings
from mamba2_min.training.metrics import read_metrics
from mamba2_min.training.trainer import Trainer

MODEL: dict[str, Any] = {"d_model": 512, "n_layer": 8, "d_state": 128, "chunk_size": 64}
TRAINING = Settings(
    context=512, batch_size=16, eval_every=10**9, save_every=10**9, patience=0, lr=3e-3, weight_decay=0.1, spike=0
)


def parse() -> argparse.Namespace:
    data = "documents, or train.txt and valid.txt"
    parser = texts.parser(__doc__, data, "kernels-curve", seeds=(0, 1), image="kernels-curve.png")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--again", action="store_true", help="measure also what the results hold already")
    return parser.parse_args()


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """The plain scan, and no kernel of ours around it."""
    with ssd.using("plain"), mock.patch.object(gpu_kernels, "has_triton", lambda: False):
        yield


def train(
    corpus: Corpus, how: tuple[dict[str, Any], Settings], args: argparse.Namespace, seed: int, kernels: bool
) -> dict[str, Any]:
    """One training, of a shape with settings; its losses are means of `log_every` steps each.

    Raises UserError where it ends early.
    """
    shape, settings = how[0], dataclasses.replace(how[1], seed=seed)
    folder = args.out / f"seed{seed}-{'kernels' if kernels else 'plain'}"
    model = Mamba2LM(Mamba2Config(vocab_size=len(corpus.tokenizer), **shape), seed)
    begun = time.perf_counter()
    with contextlib.nullcontext() if kernels else without_kernels():
        result = Trainer(model, corpus, settings, folder, devices.pick_device(args.device)).train()
    if result.reason != "max_steps":
        raise UserError(f"the training in {folder} ended by {result.reason}")
    records = read_metrics(folder / "metrics.jsonl")
    return {
        "seed": seed,
        "kernels": kernels,
        "seconds": round(time.perf_counter() - begun, 1),
        "steps": [r["step"] for r in records if r["split"] == "train"],
        "losses": [r["loss"] for r in records if r["split"] == "train"],
        "validation": records[-1]["loss"],
    }


def distances(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Mean differences between the second halves of two curves, in nats: of one seed both ways, and of two seeds."""
    curves = {(run["seed"], run["kernels"]): torch.tensor(run["losses"], dtype=torch.float64) for run in runs}

    def between(one: tuple[int, bool], other: tuple[int, bool]) -> float:
        difference = (curves[one] - curves[other]).abs()
        return float(difference[len(difference) // 2 :].mean())

    seeds = sorted({run["seed"] for run in runs})
    first, second, *_ = seeds
    return {
        "with_and_without": max(between((seed, True), (seed, False)) for seed in seeds),
        "seeds": between((first, False), (second, False)),
    }


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """All losses, and below the difference that the kernels make."""
    import matplotlib.pyplot as plt

    from mamba2_min.plots import BLUE, GREEN, ORANGE, STYLE, save_figure

    with plt.rc_context(STYLE):
        figure, (top, bottom) = plt.subplots(2, figsize=(7, 6), sharex=True, layout="constrained")
        for seed, colour in zip(sorted({run["seed"] for run in runs}), (BLUE, ORANGE, GREEN), strict=False):
            pair = {run["kernels"]: run for run in runs if run["seed"] == seed}
            for kernels, run in pair.items():
                label = f"seed {seed}, {'with' if kernels else 'without'} kernels"
                top.plot(run["steps"], run["losses"], "-" if kernels else "--", color=colour, label=label)
            difference = [a - b for a, b in zip(pair[True]["losses"], pair[False]["losses"], strict=True)]
            bottom.plot(pair[True]["steps"], difference, color=colour, label=f"seed {seed}")
        top.set_ylabel("loss, nats per token")
        bottom.set_ylabel("with less without")
        bottom.set_xlabel("step")
        top.legend()
        bottom.legend()
        files.make_folder(path.parent)
        save_figure(figure, path)


def main() -> int:
    args = parse()
    if len(set(args.seeds)) < 2:
        raise UserError("--seeds needs two seeds, for the difference between two")
    device = devices.pick_device(args.device)
    torch.set_num_threads(devices.cpu_threads(device))
    shape, settings = texts.chosen(MODEL, TRAINING, args.set, max_steps=args.steps)
    part = args.data / "train.txt"
    both = {"val_path": args.data / "valid.txt"} if files.is_file(part) else {}
    corpus = load_corpus(part if both else args.data, 8192, pattern="llama3", **both)
    path = args.results / "quality-kernels_curve.json"
    about = {"model": shape, "training": harness.changed(settings)}
    old = files.load_json(path) if files.is_file(path) and not args.again else {}
    runs = old["runs"] if old and all(old[name] == value for name, value in about.items()) else []
    for seed in args.seeds:
        for kernels in (True, False):
            if any((run["seed"], run["kernels"]) == (seed, kernels) for run in runs):
                continue
            runs.append(train(corpus, (shape, settings), args, seed, kernels))
            told = {name: runs[-1][name] for name in ("seed", "kernels", "seconds", "validation")}
            print(", ".join(f"{name} {value}" for name, value in told.items()), flush=True)
            texts.write(path, "quality.kernels_curve", device, runs, **about)
    found = distances(runs)
    within = found["with_and_without"] <= found["seeds"]
    texts.write(path, "quality.kernels_curve", device, runs, **about, difference=found, within_the_seeds_spread=within)
    plot(runs, args.image)
    print(
        f"mean difference, nats: with and without kernels {found['with_and_without']:.4f}, seeds {found['seeds']:.4f}"
    )
    return 0


if __name__ == "__main__":
    run_script(main)
