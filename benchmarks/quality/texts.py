"""What the benchmarks that train a model on a text share."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from mamba2_min import files
from mamba2_min.errors import UserError
from mamba2_min.settings import Settings
from mamba2_min.training.metrics import read_metrics
from mamba2_min.training.trainer import Result, Trainer


def parser(
    doc: str, data: str, out: str, device: str = "auto", seeds: Sequence[int] = (0,), image: str = ""
) -> argparse.ArgumentParser:
    """The flags that all have: where the data is (`data` says what), where results go, device, seeds, what to set."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True, metavar="DIR", help=data)
    p.add_argument("--out", type=Path, default=Path("runs") / out, metavar="DIR", help="of the runs (%(default)s)")
    p.add_argument("--results", type=Path, default=harness.RESULTS, metavar="DIR", help="the JSON (%(default)s)")
    if image:
        p.add_argument("--image", type=Path, default=Path("docs/images") / image, metavar="FILE")
    p.add_argument("--device", default=device, help="auto, cpu, cuda or mps (%(default)s)")
    p.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    p.add_argument(
        "--set", nargs="*", default=[], type=harness.assignment, metavar="NAME=VALUE", help="of model or training"
    )
    return p


def write(path: Path, benchmark: str, device: torch.device, runs: list[dict[str, Any]], **more: Any) -> None:
    """The JSON of a benchmark: its runs, where they were made, and what else there is to say."""
    options = harness.Options(device=device.type, threads=torch.get_num_threads())
    about = {"benchmark": benchmark, "machine": harness.machine(options), "versions": harness.versions()}
    files.make_folder(path.parent)
    path.write_text(harness.as_json(about | more | {"runs": runs}))


def chosen(
    model: dict[str, Any], training: Settings, assignments: Sequence[tuple[str, Any]], **usual: Any
) -> tuple[dict[str, Any], Settings]:
    """The values of the model and the settings, with `usual` and then those of --set.

    Raises UserError for what neither can have.
    """
    names = {field.name for field in dataclasses.fields(Settings)}
    if "recipe" in dict(assignments):
        raise UserError("--set cannot name recipe: name the values that it sets")
    values = harness.model_values(model, [(name, value) for name, value in assignments if name not in names])
    with harness.explained():
        changes = usual | {name: value for name, value in assignments if name in names}
        return values, dataclasses.replace(training, **changes)


def trained(trainer: Trainer) -> Result:
    """Trains. Raises UserError where it was stopped, or ended without a finite loss: that is no result to keep."""
    result = trainer.train()
    if result.best is None or result.signal:
        raise UserError("the training was stopped, or ended without a finite loss")
    return result


def is_of(run: dict[str, Any], seed: int, model: dict[str, Any], training: Settings) -> bool:
    """Whether a run of the results was made with these."""
    return run["seed"] == seed and run["model"] == model and Settings(**run["training"]) == training


def validation_by_step(run: Path) -> list[list[float]]:
    """[step, validation perplexity] of each evaluation of a run, from its metrics.jsonl."""
    lines = read_metrics(run / "metrics.jsonl")
    return [[m["step"], round(m["perplexity"], 2)] for m in lines if m["split"] == "validation"]


def say(event: str, values: dict[str, Any]) -> None:
    """What a `Trainer` reports, for the screen of a benchmark."""
    if event == "evaluation":
        star = "  *" if values["best"] else ""
        print(f"step {values['step']:>6,}  validation {values['score']}{star}", flush=True)
    elif event in ("compiled", "graph") and values["why_not"]:
        print(f"not {'compiled' if event == 'compiled' else 'one graph'}: {values['why_not']}", flush=True)
