"""Writes the tables and pictures of the README and of docs/ from the JSON in benchmarks/results.

What stands between two lines like these is replaced by the table of benchmarks/results/train_step-cpu.json:

    <!-- benchmark:train_step-cpu -->
    <!-- /benchmark:train_step-cpu -->

Between `<!-- figure:faults-cpu -->` and `<!-- /figure:faults-cpu -->`, within a line, stands its one figure.
`benchmark:decode-cpu/small` takes only the settings whose names begin with "small", and `classification-cpu/sms/` only
the rows of that task. A benchmark over lengths (scan, memory, train_step) also becomes a picture, docs/images/NAME.png,
where one of the documents shows it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import harness, sorting_table
from benchmarks.harness import FLOOR, OURS, Measurement
from mamba2_min.data.findings import counted

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"(<!-- benchmark:(\S+) -->\n).*?(<!-- /benchmark:\2 -->)", re.DOTALL)
_FIGURE = re.compile(r"(<!-- figure:(\S+) -->).*?(<!-- /figure:\2 -->)")

LABELS = {
    OURS: "**mamba2_min**",
    "transformer": "our Transformer, same size",
    "transformer-deep": "our Transformer, same size and depth",
    "transformers-mamba2": "`transformers` Mamba2",
    "transformers-llama": "`transformers` Llama",
    "mamba_ssm": "`mamba_ssm`",
    "mamba_ssm-q128": "`mamba_ssm`, chunks of 128",
    "mamba_ssm-q256": "`mamba_ssm`, chunks of 256",
    "fft": "convolution by FFT",
    "llama.cpp": "llama.cpp",
    "plain-autograd": "plain autograd",
    FLOOR: "matrix products alone",
}
CELL = {  # of a scan: what stands in it, by the figure's name
    "median": "time",
    "kept_bytes": "where there is a backward, what is kept for it",
    "peak_bytes": "peak memory",
}
_SUFFIXES = {"compile": "compiled", "recompute": "recomputed", "bf16state": "state in bf16", "graph": "one CUDA graph"}


def label(peer: str) -> str:
    """A peer's name for readers."""
    base, *suffixes = peer.split("+")
    return ", ".join([LABELS.get(base, base), *(_SUFFIXES.get(suffix, suffix) for suffix in suffixes)])


def describe(result: Measurement) -> str:
    """A setting's sizes for readers."""
    about = result["about"]
    if result["benchmark"] == "scan":
        way = "forward and backward" if about["backward"] else "forward"
        return f"{way}, b {about['b']}, l {about['l']:,}, h {about['h']}"
    model = f"d {about['model']['d_model']}, {about['model']['n_layer']} layers"
    if result["benchmark"] == "llama_cpp":
        return f"{model}, {'reading' if about['written'] == 1 else 'writing'}"
    model += f", b {about['batch']}"
    if result["benchmark"] == "decode":
        return f"{model}, after {about['context']:,} tokens"
    return f"{model}, l {about['length']:,}"


def row_table(results: list[Measurement]) -> str:
    """A row per setting and peer: speed, what our time is compared with, and what is known of the memory."""
    memory = {"state_bytes": "state", "peak_bytes": "peak memory"}
    known = [key for key in memory if any(key in peer for result in results for peer in result["peers"].values())]
    head = ["", "", "tokens/s (quartiles)", "its time / ours", *(memory[key] for key in known)]
    rows = []
    for result in results:
        where = describe(result)
        for name, peer in shown_peers(result):
            if "median" in peer:
                tokens = peer["tokens_per_second"] * peer["median"]
                low, high = (number(tokens / s) for s in reversed(peer["quartiles"]))
                times = harness.ratio(result, name)
                speed = f"{number(peer['tokens_per_second'])} ({low} to {high})"
                cells = [speed, "" if times is None else f"{times:.2f}"]
            else:
                cells = [peer["skipped"], ""]
            rows.append([where, label(name), *cells, *(size(peer.get(key)) for key in known)])
            where = ""
    return markdown(head, rows)


def length_table(results: list[Measurement]) -> str:
    """A row a length and a column a peer."""
    names = list(dict.fromkeys(name for result in results for name, _ in shown_peers(result) if name != FLOOR))
    rows = []
    for result in results:
        peers = result["peers"]
        rows.append([describe(result), *(length_cell(result["benchmark"], peers.get(name, {})) for name in names)])
    if results[0]["benchmark"] == "scan":
        parts = [text for key, text in CELL.items() if any(key in p for r in results for p in r["peers"].values())]
        meaning = f"Each cell: {'; '.join(parts)}."
    else:
        meaning = "Each cell: tokens per second; peak memory."
    return f"{markdown(['', *map(label, names)], rows)}\n{meaning}\n"


def length_cell(benchmark: str, peer: dict[str, Any]) -> str:
    if "median" not in peer:
        return peer.get("skipped", "").partition(":")[0]
    milliseconds, speed = f"{number(1e3 * peer['median'])} ms", f"{number(peer['tokens_per_second'])}/s"
    cell = [milliseconds if benchmark == "scan" else speed, size(peer.get("kept_bytes")), size(peer.get("peak_bytes"))]
    return "; ".join(filter(None, cell))


def beside_table(results: list[Measurement]) -> str:
    """A row per prompt and peer: the first token, the speed after it, and what the model carries."""
    head = ["", "", "first token", "tokens/s (quartiles)", "our speed / its", "state or cache", "peak memory"]
    rows = []
    for result in results:
        about = result["about"]
        where = f"{result['setting'].partition('-')[0].upper()}, b {about['batch']}, after {about['context']:,} tokens"
        for name, peer in result["peers"].items():
            if "median" in peer:
                tokens = peer["tokens_per_second"] * peer["median"]
                low, high = (number(tokens / s) for s in reversed(peer["quartiles"]))
                times = harness.ratio(result, name)
                one_row = " (one row)" * (peer["first_token_rows"] < about["batch"])
                cells = [
                    f"{number(1e3 * peer['first_token_seconds'])} ms{one_row}",
                    f"{number(peer['tokens_per_second'])} ({low} to {high})",
                    "" if times is None else f"{times:.2f}",
                    size(peer["state_bytes"]),
                    size(peer["peak_bytes"]),
                ]
            else:
                cells = [peer["skipped"], "", "", "", ""]
            rows.append([where, label(name), *cells])
            where = ""
    return markdown(head, rows)


def crossing_table(results: list[Measurement]) -> str:
    """A row per length with each peer's time, forward and then with the backward, and where the lines cross."""
    from benchmarks import scan_lengths

    parts = []
    for backward, title in ((False, "forward"), (True, "forward and backward")):
        series = [r for r in results if r["about"]["backward"] is backward]
        if not series:
            continue
        names = list(series[0]["peers"])
        rows = [[f"{r['about']['l']:,}", *(_milliseconds(r["peers"][name]) for name in names)] for r in series]
        parts.append(markdown([f"tokens, {title}", *map(label, names)], rows))
        parts.append("".join(f"- {found}\n" for found in scan_lengths.crossings(series)))
    return "\n".join(parts)


def _milliseconds(peer: dict[str, Any]) -> str:
    return f"{number(1e3 * peer['median'])} ms" if "median" in peer else peer.get("skipped", "").partition(":")[0]


def fault_table(results: list[Measurement]) -> str:
    """A row an activity and a column a kind of fault: how many of how many were survived."""
    kinds = list(results[0]["peers"])
    rows = [[result["setting"], *(survived([result], kind) for kind in kinds)] for result in results]
    return markdown(["", *kinds], rows)


def survived(results: list[Measurement], *kinds: str) -> str:
    """The faults that were survived, of all kinds or of these."""
    counted = [row for result in results for kind, row in result["peers"].items() if not kinds or kind in kinds]
    return f"{sum(row['survived'] for row in counted)} of {sum(row['faults'] for row in counted)}"


TABLES: dict[str, Callable[[list[Measurement]], str]] = {
    "train_step": row_table,
    "decode": row_table,
    "llama_cpp": row_table,
    "scan": length_table,
    "memory": length_table,
    "beside_transformer": beside_table,
    "scan_lengths": crossing_table,
    "faults": fault_table,
}
FIGURES: dict[str, Callable[[list[Measurement]], str]] = {"faults": survived}


def shown_peers(result: Measurement) -> Iterable[tuple[str, dict[str, Any]]]:
    """The peers that were measured, or could have been but for their own needs."""
    return [
        (name, peer)
        for name, peer in result["peers"].items()
        if "median" in peer or peer.get("skipped", "").startswith(("out of memory", "too long"))
    ]


def number(value: float) -> str:
    """Three significant digits, thousands separated."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def size(count: int | None) -> str:
    """Bytes for readers; nothing for None."""
    if count is None:
        return ""
    return f"{number(count / 1e9)} GB" if count >= 1e9 else f"{number(count / 1e6)} MB"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def caption(results: list[Measurement]) -> str:
    """Where, when and how the results were measured; one line for each way."""
    lines = {}
    for result in results:
        machine, about = result["machine"], result["about"]
        rounds = max(len(peer.get("seconds", ())) for peer in result["peers"].values())
        what = machine.get("gpu") or f"{machine['cpu']}, {counted(machine['threads'], 'thread')}"
        how = f"median of {rounds} rounds; " if rounds else ""
        lines[
            f"*{what}; torch {result['versions']['torch']}, {about['precision']}; {how}"
            f"{result['date']}; `{result['command']}`*"
        ] = None
    return "\n\n".join(lines) + "\n"


def block(name: str, folder: Path) -> str | None:
    """What belongs between the markers of `name`; None where there are no results for it."""
    stem, _, prefix = name.partition("/")
    if stem.startswith("classification-"):
        return sorting_block(folder / f"{stem}.json", prefix)
    results = [r for r in harness.load(folder / f"{stem}.json") if r["setting"].startswith(prefix)]
    if not results:
        return None
    return f"\n{TABLES[results[0]['benchmark']](results)}\n{caption(results)}\n"


def sorting_block(path: Path, prefix: str) -> str | None:
    """The block of benchmarks/classification.py, whose results are rows of their own kind."""
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    rows = [row for row in result["rows"] if row["row"].startswith(prefix)]
    return f"\n{sorting_table.table(rows)}\n{sorting_table.caption(result)}\n" if rows else None


def rewrite(text: str, folder: Path) -> tuple[str, list[str]]:
    """A document with its blocks renewed, and the names of those that stay as they are for want of results."""
    missing = []

    def renew(match: re.Match[str]) -> str:
        content = block(match[2], folder)
        if content is None:
            missing.append(match[2])
            return match[0]
        return match[1] + content + match[3]

    def renew_figure(match: re.Match[str]) -> str:
        results = harness.load(folder / f"{match[2]}.json")
        if not results:
            missing.append(match[2])
            return match[0]
        return match[1] + FIGURES[results[0]["benchmark"]](results) + match[3]

    return _FIGURE.sub(renew_figure, _BLOCK.sub(renew, text)), missing


def plot(results: list[Measurement], path: Path) -> bool:
    """Draws time and memory against length; False, and no picture, where the results are not a series of lengths."""
    import matplotlib.pyplot as plt

    from mamba2_min.plots import GREY, STYLE

    length, unit = ("l", "tokens") if results[0]["benchmark"] == "scan" else ("length", "tokens of context")
    series = sorted((r for r in results if r["about"].get("backward", True)), key=lambda r: r["about"][length])
    names = [name for name, _ in shown_peers(series[0])] if series else []
    lengths = [r["about"][length] for r in series]
    if len(lengths) < 3 or len({without(r["about"], length) for r in series}) > 1:
        return False
    panels = [("median", 1, "seconds"), ("peak_bytes", 1e9, "peak memory, GB")]
    if any("kept_bytes" in peer for _, peer in shown_peers(series[0])):
        panels.insert(1, ("kept_bytes", 1e9, "kept for the backward, GB"))
    colours = colours_of(names)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), layout="constrained")
        for axis, (field, unit_size, title) in zip(axes, panels, strict=True):
            for name in names:
                points = [
                    (r["about"][length], r["peers"][name][field] / unit_size)
                    for r in series
                    if field in r["peers"].get(name, {})
                ]
                if points:
                    style = {"linestyle": "--"} if name == FLOOR else {"marker": "o", "markersize": 3}
                    axis.plot(*zip(*points, strict=True), label=plain(name), color=colours.get(name, GREY), **style)
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [f"{l:,}" for l in lengths], fontsize=8)
            axis.set_yscale("log")
            axis.set_xlabel(unit)
            axis.set_title(title, loc="left", fontsize=10)
        axes[0].legend(fontsize=8)
        save_picture(figure, path)
    return True


def plot_rates(results: list[Measurement], path: Path) -> bool:
    """Draws tokens per second against the length of a text, of the model that was measured at most lengths; False, and
    no picture, for fewer than three lengths."""
    import matplotlib.pyplot as plt

    from mamba2_min.plots import STYLE

    by_model: dict[str, list[Measurement]] = {}
    for r in sorted(results, key=lambda r: r["about"]["length"]):
        by_model.setdefault(repr(r["about"]["model"]), []).append(r)
    series = max(by_model.values(), key=len)
    lengths = [r["about"]["length"] for r in series]
    if len(lengths) < 3:
        return False
    names = [name for name, _ in shown_peers(series[0])]
    colours = colours_of(names)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
        for name in names:
            points = [
                (r["about"]["length"], r["peers"][name]["tokens_per_second"] / 1e3)
                for r in series
                if "median" in r["peers"].get(name, {})
            ]
            if len(points) > 2:
                style = {"linestyle": "--"} if name == FLOOR else {"marker": "o"}
                axis.plot(*zip(*points, strict=True), label=plain(name), color=colours[name], **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{l:,}" for l in lengths])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("tokens of a text")
        axis.set_ylabel("thousand tokens a second")
        axis.legend()
        save_picture(figure, path)
    return True


# The picture of a benchmark's results, where one of the documents shows it.
PICTURES = {"scan": plot, "memory": plot, "train_step": plot_rates}


def colours_of(names: list[str]) -> dict[str, str]:
    """A colour for each peer."""
    from mamba2_min.plots import BLUE, GREEN, GREY, ORANGE

    colours = (BLUE, ORANGE, GREEN, "#8e63b5", "#b8860b", "#c0504d")
    return dict.fromkeys(names, GREY) | dict(zip(names, colours, strict=False)) | {FLOOR: GREY}


def save_picture(figure: Any, path: Path) -> None:
    """Writes the same picture for the same numbers, and closes it."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def without(about: dict[str, Any], field: str) -> str:
    return repr(sorted((key, value) for key, value in about.items() if key != field))


def plain(peer: str) -> str:
    """A label without Markdown."""
    return re.sub(r"[*`]", "", label(peer))


def main() -> int:
    """The status to exit with: 1 where --check finds a table out of date."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.seed_table", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--results", type=Path, default=harness.RESULTS)
    p.add_argument("--documents", type=Path, nargs="+", help="default: README.md and docs/*.md")
    p.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    p.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is out of date")
    args = p.parse_args()
    documents = args.documents or [d for d in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if d.exists()]

    stale, shown = [], ""
    for document in documents:
        text = document.read_text(encoding="utf-8")
        new, missing = rewrite(text, args.results)
        shown += new
        for name in missing:
            print(f"{document.name}: no results for {name}; left as it is")
        if new != text:
            stale.append(document.name)
            if not args.check:
                document.write_text(new, encoding="utf-8")
    print(("out of date: " if args.check else "written: ") + (", ".join(stale) or "nothing"))
    if args.check:
        return 1 if stale else 0
    for path in sorted(args.results.glob("*.json")):
        results, image = harness.load(path), args.images / f"{path.stem}.png"
        if image.name not in shown or not isinstance(results, list) or not results:
            continue
        picture = PICTURES.get(results[0]["benchmark"])
        if picture and picture(results, image):
            print(f"drawn: {image.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
