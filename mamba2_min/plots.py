"""Plots that are readable on light and dark pages."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg", force=False)
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from mamba2_min.errors import printable
from mamba2_min.files import write_atomically

# Neutral grey on a transparent page: text stays readable whatever lies behind it.
BLUE, ORANGE, GREEN, GREY = "#3b82c4", "#e07b39", "#4c9f70", "#7f8790"
STYLE: dict[Any, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "savefig.dpi": 110,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "font.size": 10,
}

SHARE = LinearSegmentedColormap.from_list("share", [f"{BLUE}00", f"{BLUE}ff"])  # from transparent
_MOST_NAMES = 100  # labels of a confusion matrix that are legible


def plot_loss(metrics: Sequence[dict[str, Any]], path: str | Path, title: str = "") -> None:
    """Draws the training and validation loss with the best marked, and the learning rate below.

    `metrics` are the records of metrics.jsonl (`read_metrics`). The training loss is drawn twice: faintly as it was,
    and clearly as a running mean. The right axis has bits per byte, where the validation was counted in bytes. What
    was trained after the best is shaded. Raises UserError where the file cannot be written.
    """
    train = [m for m in metrics if m["split"] == "train" and _is_number(m["loss"])]
    validation = [m for m in metrics if m["split"] == "validation" and _is_number(m["loss"])]
    with plt.rc_context(STYLE):
        figure, (top, bottom) = plt.subplots(
            2, 1, figsize=(8, 5.2), height_ratios=(4, 1), sharex=True, layout="constrained"
        )
        steps, losses = [m["step"] for m in train], [m["loss"] for m in train]
        top.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.8)
        top.plot(steps, _running_mean(losses), color=BLUE, label="training, running mean")
        tested, scores = [m["step"] for m in validation], [m["loss"] for m in validation]
        top.plot(tested, scores, "o-", color=ORANGE, markersize=3.5, label="validation")
        if validation:
            best = min(validation, key=lambda m: m["loss"])
            top.plot(best["step"], best["loss"], "*", color=GREEN, markersize=14, label=_describe(best))
            if best["step"] < tested[-1]:
                top.axvspan(best["step"], tested[-1], color=ORANGE, alpha=0.12, linewidth=0, label="after the best")
            _add_bits_per_byte(top, best)
        shown = sorted(losses[len(losses) // 50 :] + scores)
        if shown and shown[-1] > shown[0]:  # without the first steps, which would flatten all others
            margin = 0.05 * (shown[-1] - shown[0])
            top.set_ylim(shown[0] - margin, shown[-1] + margin)
        top.set_ylabel("loss, nats per token")
        top.set_title(title, loc="left", fontsize=10)
        top.legend()
        bottom.plot(steps, [m["lr"] for m in train], color=GREY)
        bottom.set_ylabel("learning rate")
        bottom.set_xlabel("step")
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(-3, -3))
        save_figure(figure, path)


def _add_bits_per_byte(axes: Axes, measured: dict[str, Any]) -> None:
    """A right axis in bits per byte: a fixed multiple of nats per token on one validation text."""
    bits, nats = measured.get("bits_per_byte", 0), measured["loss"]
    if not _is_number(bits) or bits <= 0 or nats <= 0:
        return
    ratio = bits / nats
    right = axes.secondary_yaxis("right", functions=(lambda loss: loss * ratio, lambda bits: bits / ratio))
    right.set_ylabel("validation, bits per byte")
    right.spines["right"].set_visible(False)


def plot_confusion(matrix: Sequence[Sequence[int]], names: Sequence[str], path: str | Path, title: str = "") -> None:
    """Draws a confusion matrix as a PNG: a row per true label, a column per given one, the colour its share of the row.

    matrix (n, n) of counts; names: the n labels. Few labels get their counts written, too many no names. Raises
    UserError where the file cannot be written.
    """
    counts = np.asarray(matrix, dtype=float)
    n = len(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(3 + 0.3 * n, 14)
    short = [plain(name if len(name) <= 28 else name[:27] + "…") for name in names]
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axis = plt.subplots(figsize=(side, side), layout="constrained")
        axis.imshow(shares, cmap=SHARE, vmin=0, vmax=1, interpolation="nearest")
        if n <= _MOST_NAMES:
            size = min(9, 600 / n)
            axis.set_xticks(range(n), short, rotation=90 if n > 6 else 0, fontsize=size)
            axis.set_yticks(range(n), short, fontsize=size)
        if n <= 20:
            for row, column in np.argwhere(counts > 0):
                colour = "white" if shares[row, column] > 0.5 else GREY
                axis.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=colour)
        axis.set_xlabel("given")
        axis.set_ylabel("true")
        axis.set_title(title, loc="left", fontsize=10)
        save_figure(figure, path)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a picture as PNG, atomically, and closes it. Raises UserError where it cannot be written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name may have letters that the font lacks, or be longer than its panel
        write_atomically(path, lambda file: figure.savefig(file, format="png"))
    plt.close(figure)


def plain(name: str) -> str:
    """Somebody's words as text for Matplotlib: a dollar sign begins no formula in it, and no character is invisible."""
    return printable(name).replace("$", r"\$")


def _describe(best: dict[str, Any]) -> str:
    text = f"best: {best['loss']:.3f} at step {best['step']:,}"
    return f"{text} ({best['bits_per_byte']:.3f} bits per byte)" if "bits_per_byte" in best else text


def _running_mean(values: Sequence[float]) -> np.ndarray:
    """The mean of a thirtieth of the curve around each value, as much before it as after it: so it does not lag."""
    at = np.arange(len(values))
    reach = np.minimum(round(len(values) / 60), np.minimum(at, at[::-1]))
    sums = np.concatenate(([0.0], np.cumsum(values)))
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


CARD, INK = "#f4f2ec", "#454b54"  # an opaque sheet: the same picture on a light and on a dark page
DIVERGING = LinearSegmentedColormap.from_list("diverging", ["#1f5c99", BLUE, CARD, ORANGE, "#a04a14"])


def use_notebook_style() -> None:
    """Sets the defaults of every later figure of a notebook: these colours on an opaque sheet.

    Call it after `%matplotlib inline`, which resets them.
    """
    sheet: dict[Any, Any] = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), CARD)
    ink: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    )
    plt.rcParams.update({**STYLE, **sheet, **ink})
    plt.rcParams.update(
        {
            "figure.dpi": 88,
            "figure.constrained_layout.use": True,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, "#8e63b5", GREY]),
            "image.interpolation": "nearest",
        }
    )


def draw_matrix(axes: Axes, matrix: Any, title: str = "", limit: float | None = None) -> AxesImage:
    """Draws a matrix (rows, columns), a tensor or array, as coloured cells: orange above zero, blue below, nan empty.

    `limit` is the value of the full colour; None is the largest absolute value.
    """
    matrix = np.asarray(matrix, dtype=float)
    if limit is None:
        limit = float(np.nanmax(np.abs(matrix))) or 1.0
    image = axes.imshow(matrix, cmap=DIVERGING, vmin=-limit, vmax=limit)
    axes.set_title(title)
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_linewidth(0.6)
    return image


def draw_chunks(axes: Axes, length: int, chunk_size: int) -> None:
    """Rules lines between the chunks of a matrix (length, length) that `draw_matrix` drew."""
    for edge in range(chunk_size, length, chunk_size):
        axes.axhline(edge - 0.5, color=INK, linewidth=0.8)
        axes.axvline(edge - 0.5, color=INK, linewidth=0.8)


def label_tokens(axes: Axes, words: Sequence[str], rows: bool = False) -> None:
    """Labels each column, or with `rows` each row, with a word; spaces are trimmed, a line end is ¶."""
    shown = [word.replace("\n", "¶").strip() or "␣" for word in words]
    if rows:
        axes.set_yticks(range(len(shown)), shown, fontsize=8)
    else:
        axes.set_xticks(range(len(shown)), shown, fontsize=8, rotation=60, ha="right", rotation_mode="anchor")
