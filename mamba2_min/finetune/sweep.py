"""A study of learning rates: the loss that each reaches, all weights and LoRA beside each other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from mamba2_min.errors import UserError
from mamba2_min.files import make_folder, save_json
from mamba2_min.finetune.run import finetune
from mamba2_min.finetune.spec import FinetuneSpec
from mamba2_min.training import screen

METHODS = ("full", "lora")


def sweep(spec: FinetuneSpec, rates: list[float], out: str | Path, device: torch.device) -> int:
    """Fine-tunes with each rate and each of METHODS, prints a table, and writes sweep.json and sweep.png."""
    folder = make_folder(out)
    results: list[dict[str, Any]] = []
    screen.show("sweep", f"{len(rates)} rates, {' and '.join(METHODS)}; each run in a folder of {folder}")
    for method in METHODS:
        for rate in sorted(set(rates)):
            try:
                one = FinetuneSpec(
                    dataclasses.replace(spec.finetune, method=method),
                    dataclasses.replace(spec.training, lr=rate, min_lr=min(spec.training.min_lr, rate)),
                )
            except ValueError as error:
                raise UserError(str(error)) from error
            own = make_folder(folder / f"{method}-{rate:g}", follow=False)
            result = finetune(one, own, device, again="", quiet=True)
            if result.reason == "signal":
                screen.show("stopped", "what was finished is in the folder")
                return 128 + result.signal
            best = result.best
            results.append(
                {
                    "method": method,
                    "lr": rate,
                    "loss": best.loss if best else None,
                    "best_step": result.best_step,
                    **({k: v for k, v in best.measures().items() if k != "loss"} if best else {}),
                }
            )
            shown = f"{best.loss:.4f} at step {result.best_step:,}" if best else "no finite loss"
            screen.show(f"{method} {rate:g}", shown)
    save_json(folder / "sweep.json", results)
    plot(results, folder / "sweep.png")
    print()
    print(table(results))
    screen.show("written", f"{folder / 'sweep.json'}, {folder / 'sweep.png'}")
    return 0


def table(results: list[dict[str, Any]]) -> str:
    """A line per rate, a column per method; the best of each method is marked."""
    rates = sorted({r["lr"] for r in results})
    losses = {(r["method"], r["lr"]): r["loss"] for r in results}
    lines = [f"{'learning rate':>14}" + "".join(f"{method:>12}" for method in METHODS)]
    for rate in rates:
        line = f"{rate:>14g}"
        for method in METHODS:
            loss = losses.get((method, rate))
            there = [v for (m, _), v in losses.items() if m == method and v is not None]
            mark = "*" if loss is not None and loss == min(there) else " "
            line += f"{'-' if loss is None else f'{loss:.4f}':>11}{mark}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draws the best validation loss against the learning rate, a curve per method."""
    import matplotlib.pyplot as plt

    from mamba2_min.plots import BLUE, ORANGE, STYLE, save_figure

    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
        for method, colour in zip(METHODS, (BLUE, ORANGE), strict=True):
            points = [(r["lr"], r["loss"]) for r in results if r["method"] == method and r["loss"] is not None]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=colour, label=method)
                axis.plot(*min(points, key=lambda point: point[1]), "*", color=colour, markersize=14)
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(rates := sorted({r["lr"] for r in results}), [f"{rate:g}" for rate in rates])
        axis.set_xlabel("learning rate")
        axis.set_ylabel("best validation loss, nats")
        axis.legend()
        save_figure(figure, path)
