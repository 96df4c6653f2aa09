"""The table of benchmarks/classification.py for readers: a row for each task, model and method."""

from __future__ import annotations

from typing import Any

from benchmarks.classification import MODELS

TASKS = {
    "banking77": "BANKING77",
    "banking77-10": "BANKING77, 10 texts a label",
    "sms": "SMS spam",
    "sms-book": "SMS spam, the book's split",
}
NAMES = {
    "mamba2": "Mamba-2",
    "mamba2-two": "two Mamba-2",
    "mamba2-words": "Mamba-2, no spelling",
    "mamba2-mean": "Mamba-2, head on the mean",
    "mamba2-last": "Mamba-2, head on the last",
    "gpt-neo": "GPT-Neo",
    "gpt-neo-words": "GPT-Neo, no spelling",
    "tfidf-default": "TF-IDF, words",
    "tfidf-best": "TF-IDF, words and letters",
}
METHODS = {
    "-": "",
    "scratch": "from scratch",
    "full": "all weights",
    "lora": "LoRA",
    "lora-seen": "LoRA and rows",
    "state": "first state",
}


def table(rows: list[dict[str, Any]]) -> str:
    """The mean over the seeds; the lowest and highest beside it where there are several."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "accuracy" in row:  # a pretraining has none
            groups.setdefault(row["row"].rpartition("/")[0], []).append(row)
    head = ["", "", "accuracy, %", "spam F1", "trained parameters", "minutes", "seeds"]
    lines, before = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"], ""
    for name in sorted(groups, key=_order):
        task, model, method = name.split("/")
        some = groups[name]
        trained = f"{some[0]['trained_parameters']:,}" if "trained_parameters" in some[0] else ""
        cells = [
            TASKS[task] if task != before else "",
            f"{NAMES[model]}, {METHODS[method]}".rstrip(", ") + ("*" if chosen(some[0]) else ""),
            spread([100 * row["accuracy"] for row in some], 1),
            spread([row["spam_f1"] for row in some if "spam_f1" in row], 3),
            trained,
            f"{sum(row['seconds'] for row in some) / len(some) / 60:.1f}",
            str(len(some)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        before = task
    note = "\n\\* with the weights of the lowest validation loss; the others are those of the last step.\n"
    return "\n".join(lines) + "\n" + (note if any(chosen(row) for some in groups.values() for row in some) else "")


def chosen(row: dict[str, Any]) -> bool:
    """Whether a row is of the time when the weights of the lowest validation loss were tested."""
    return "epochs" in row and row.get("weights") != "last"


def _order(name: str) -> tuple[int, int, int]:
    task, model, method = name.split("/")
    models = ("tfidf-default", "tfidf-best", *MODELS)
    return list(TASKS).index(task), models.index(model), list(METHODS).index(method)


def spread(values: list[float], digits: int) -> str:
    """ "91.8 (91.2 to 92.4)", or "91.8" of one value, or nothing of none."""
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else mean


def caption(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    what = machine.get("gpu") or f"{machine['cpu']}, threads of a row: {machine['threads']}"
    packages = f"torch {versions['torch']}, transformers {versions['transformers']}"
    return f"*{what}; {packages}; `python -m benchmarks.classification --data DIR`*\n"
