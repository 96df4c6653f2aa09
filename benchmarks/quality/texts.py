"""What the benchmarks that train a model on a text share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from benchmarks import harness
from mamba2_min.settings import Settings


def chosen(
    model: dict[str, Any], training: Settings, assignments: Sequence[tuple[str, Any]], **usual: Any
) -> tuple[dict[str, Any], Settings]:
    """The values of the model and the settings, with `usual` and then those of --set.

    Raises UserError for what neither can have.
    """
    names = {field.name for field in dataclasses.fields(Settings)}
    values = harness.model_values(model, [(name, value) for name, value in assignments if name not in names])
    with harness.explained():
        changes = usual | {name: value for name, value in assignments if name in names}
        return values, dataclasses.replace(training, **changes)


def say(event: str, values: dict[str, Any]) -> None:
    """What a `Trainer` reports, for the screen of a benchmark."""
    if event == "evaluation":
        star = "  *" if values["best"] else ""
        print(f"step {values['step']:>6,}  validation {values['score']}{star}", flush=True)
    elif event in ("compiled", "graph") and values["why_not"]:
        print(f"not {'compiled' if event == 'compiled' else 'one graph'}: {values['why_not']}", flush=True)
