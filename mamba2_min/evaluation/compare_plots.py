"""Two pictures of a comparison: a radar of shares from chance to the best, and bars of the figures themselves."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.projections.polar import PolarAxes

from mamba2_min.evaluation.axes import Axis
from mamba2_min.plots import BLUE, GREEN, GREY, ORANGE, STYLE, plain, save_figure

COLOURS = (BLUE, ORANGE, GREEN, "#8e63b5", "#b8860b", "#c0504d", GREY)

Values = Mapping[str, Mapping[str, Any]]  # {run: {measure: value}}


def shares(found: Values, axes: Sequence[Axis]) -> dict[str, list[float]]:
    """{run: its share of the way from chance to the best, axis by axis}."""
    columns = [axis.scaled([values.get(axis.key) for values in found.values()]) for axis in axes]
    return {run: [column[k] for column in columns] for k, run in enumerate(found)}


def radar(found: Values, axes: Sequence[Axis], path: str | Path) -> None:
    """Draws one closed line per run, the centre being chance and the rim the best run of each axis."""
    angles = [2 * math.pi * k / len(axes) for k in range(len(axes))]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.5, 5.6), subplot_kw={"projection": "polar"}, layout="constrained")
        assert isinstance(axis, PolarAxes)
        axis.set_theta_offset(math.pi / 2)
        axis.set_theta_direction(-1)
        for (run, values), colour in zip(shares(found, axes).items(), _colours(len(found)), strict=True):
            axis.plot([*angles, angles[0]], [*values, values[0]], "o-", markersize=3, color=colour, label=plain(run))
            axis.fill(angles, values, color=colour, alpha=0.08)
        axis.set_ylim(0, 1.05)
        axis.set_yticks([0.25, 0.5, 0.75, 1.0], ["", "half way", "", "best"], fontsize=7)
        axis.set_rlabel_position(180 / len(axes))
        axis.set_xticks(angles, [""] * len(axes))
        for angle, measure in zip(angles, axes, strict=True):
            side = math.sin(angle)
            where = "center" if abs(side) < 0.1 else "left" if side > 0 else "right"
            axis.text(angle, 1.14, _wrapped(measure.label), ha=where, va="center", fontsize=8)
        axis.set_title("from chance (centre) to the best of these runs (rim)", fontsize=9, pad=30)
        figure.legend(fontsize=8, loc="outside right upper")
        save_figure(figure, path)


def bars(found: Values, axes: Sequence[Axis], path: str | Path) -> None:
    """Draws a panel per axis with a bar per run, in the measure's own unit; a dashed line is chance."""
    columns = min(3, len(axes))
    rows = -(-len(axes) // columns)
    height = 0.7 + 0.26 * len(found)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            rows, columns, figsize=(3.4 * columns, height * rows), squeeze=False, layout="constrained"
        )
        for panel, axis in zip(panels.flat, axes, strict=False):
            values = [values.get(axis.key) for values in found.values()]
            panel.barh(list(map(plain, found)), [v or 0.0 for v in values], color=_colours(len(found)), height=0.65)
            panel.invert_yaxis()
            panel.grid(axis="y", visible=False)
            panel.set_axisbelow(True)
            better = "more" if axis.more_is_better else "less"
            panel.set_title(f"{axis.label} ({better} is better)", loc="left", fontsize=8)
            panel.tick_params(labelsize=7)
            reach = max([v for v in values if v is not None] + [axis.chance or 0.0]) or 1.0
            panel.set_xlim(0, 1.22 * reach)
            for k, value in enumerate(values):
                panel.text((value or 0.0) + 0.015 * reach, k, axis.text(value), va="center", fontsize=7)
            if axis.chance:
                panel.axvline(axis.chance, color=GREY, linestyle="--", linewidth=0.8)
        for panel in list(panels.flat)[len(axes) :]:
            panel.set_visible(False)
        save_figure(figure, path)


def _wrapped(label: str) -> str:
    return textwrap.fill(label, 15)


def _colours(count: int) -> list[str]:
    return [COLOURS[k % len(COLOURS)] for k in range(count)]
