"""A needle in a book: a name is given, and asked for after more and more words. How far does the state carry it?

    python -m mamba2_min.evaluation.needle --model runs/mine --data book.txt --out needle

Several rows read "The stranger's name was NAME.", each with another name, and then the same book. At each distance a
copy of the state is asked "The stranger's name was". The rows differ in nothing but the name, so that what they answer
differently is what the state still holds of it:

    gain      nats by which a name is likelier in the row that was given it than
              in the others; 0: it is forgotten
    right     the share of rows whose own name gains the most there; by chance
              one in as many as there are names

The state is carried and of one size, so that memory does not grow with the distance. Names that occur in the book are
not used, nor are names that are more than one token.

What it can say: over what distance one line survives what comes after it. What it cannot: what the state holds instead.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba2_min import flags
from mamba2_min.errors import UserError, run_script

if TYPE_CHECKING:
    from torch import Tensor

    from mamba2_min.data.tokenizer import WordTokenizer
    from mamba2_min.models.base import LanguageModel

DISTANCES = [n * 10**k for k in range(1, 5) for n in (1, 2, 5)] + [100_000]  # words
QUESTION = "The stranger's name was"
WINDOW = 1024  # tokens per row and forward pass: memory does not depend on the distance
MOST_BYTES = 1 << 28  # of a book
_ROUNDING = 1e-4  # nats: float32 log-probabilities of rows that read the same differ by less


@dataclass(frozen=True)
class Point:
    """What is left at a distance in words, and its standard error over the trials' rows; `state_bytes` of one row."""

    words: int
    gain: float
    error: float
    right: float
    state_bytes: int


def single_names(tokenizer: WordTokenizer, book: str, count: int) -> dict[str, int]:
    """{name: its token} for at most `count` names that are one token and do not occur in `book`.

    Raises UserError where there are fewer than two.
    """
    from mamba2_min.datagen.lists import read_list

    in_book = set(re.findall(r"\w+", book))
    found = {}
    for name in read_list("names"):
        ids = tokenizer.encode(" " + name)
        if len(ids) == 1 and name not in in_book and ids[0] != tokenizer.unk_id:
            found[name] = ids[0]
    if len(found) < 2:
        raise UserError("the model's vocabulary has fewer than two names that do not occur in the book")
    step = max(1, len(found) // count)
    return dict(list(found.items())[::step][:count])


def stretches(book: str, distances: Sequence[int], skip: int) -> list[str]:
    """The book's text from the word `skip` on, cut after each of `distances` words, as far as it has so many."""
    ends = [match.end() for match in re.finditer(r"\S+", book)]
    edges = [skip, *(skip + d for d in distances if skip + d <= len(ends))]
    places = [ends[edge - 1] if edge else 0 for edge in edges]
    return [book[a:b] for a, b in pairwise(places)]


def carry(
    model: LanguageModel, tokenizer: WordTokenizer, names: dict[str, int], parts: Sequence[str]
) -> list[tuple[Tensor, int]]:
    """After each of `parts`: log-probabilities (rows, names), row r having been given name r, and the state's bytes."""
    import torch

    device, tokens = model.ids_device, torch.tensor(list(names.values()))
    question = tokenizer.encode("\n\n" + QUESTION)
    rows = [
        [tokenizer.eos_id, *tokenizer.encode(QUESTION), name, *tokenizer.encode(".\n\n")] for name in names.values()
    ]
    found = []
    with torch.inference_mode():
        state = _read(model, torch.tensor(rows, device=device), None)
        for part in parts:
            ids = torch.tensor(tokenizer.encode(part), device=device).expand(len(rows), -1)
            state = _read(model, ids, state)
            asked = torch.tensor(question, device=device).expand(len(rows), -1)
            logits, _ = model.prefill(asked, state.clone())
            found.append((logits.float().log_softmax(-1)[:, tokens.to(device)].cpu(), state.nbytes // len(rows)))
    return found


def _read(model: LanguageModel, ids: Tensor, state: Any) -> Any:
    for start in range(0, ids.shape[1], WINDOW):
        _, state = model.hidden(ids[:, start : start + WINDOW], state)
    return state


def gains(logs: Tensor) -> Tensor:
    """(rows,): the log-probability of name r in row r, minus its mean in the other rows; logs (rows, names), square."""
    n = len(logs)
    own = logs.diagonal()
    return own - (logs.sum(0) - own) / (n - 1)


def right(logs: Tensor) -> Tensor:
    """(rows,): 1 where a row's own name stands out most, against how likely each is in all rows, and 0 where not.

    Names that stand out alike, to within rounding, share the point: where all is forgotten, a row gets 1 / names.
    """
    lead = logs - logs.mean(0)
    top = lead >= lead.max(1, keepdim=True).values - _ROUNDING
    return top.diagonal() / top.sum(1)


def measure(
    model: LanguageModel,
    tokenizer: WordTokenizer,
    book: str,
    distances: Sequence[int] = DISTANCES,
    count: int = 8,
    trials: int = 2,
) -> list[Point]:
    """A point per distance for which the book has the words. Each trial begins at another place of the book.

    Raises UserError for a book with fewer words than the shortest distance.
    """
    import torch

    names = single_names(tokenizer, book, count)
    n_words = len(book.split())
    distances = sorted(d for d in distances if d <= n_words)
    if not distances:
        raise UserError(f"the book has {n_words:,} words, fewer than the shortest distance")
    room = n_words - distances[-1]
    logs: list[list[Tensor]] = [[] for _ in distances]
    sizes = [0] * len(distances)
    for trial in range(trials):
        parts = stretches(book, distances, room * trial // max(1, trials))
        for k, (found, size) in enumerate(carry(model, tokenizer, names, parts)):
            logs[k].append(found)
            sizes[k] = size
    points = []
    for words, tables, size in zip(distances, logs, sizes, strict=True):
        gain = torch.cat([gains(t) for t in tables]).double()
        error = float(gain.std() / math.sqrt(len(gain)))
        hits = torch.cat([right(t) for t in tables]).double().mean()
        points.append(Point(words, float(gain.mean()), error, float(hits), size))
    return points


def table(points: Sequence[Point], chance: float) -> str:
    lines = [f"{'words between':>13}  {'gain, nats':>16}  {'right':>6}  {'state':>12}"]
    for p in points:
        gain = f"{round(p.gain, 4) + 0:>7.4f} ± {p.error:>6.4f}"  # + 0: no negative zero
        lines.append(f"{p.words:>13,}  {gain}  {p.right:>6.0%}  {p.state_bytes:>6,} bytes")
    return "\n".join([*lines, f"{'by chance':>13}  {0:>7.4f}{'':9}  {chance:>6.0%}"])


def plot(points: Sequence[Point], chance: float, path: Path) -> None:
    """Draws gain and the share that is right against the distance."""
    import matplotlib.pyplot as plt

    from mamba2_min.plots import BLUE, GREY, ORANGE, STYLE, save_figure

    words = [p.words for p in points]
    with plt.rc_context(STYLE):
        figure, (left, right_panel) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        left.errorbar(words, [p.gain for p in points], [p.error for p in points], fmt="o-", color=BLUE, capsize=2)
        left.axhline(0, color=GREY, linestyle="--", linewidth=0.8)
        left.set_title("nats by which the given name is likelier", loc="left", fontsize=10)
        right_panel.plot(words, [p.right for p in points], "o-", color=ORANGE)
        right_panel.axhline(chance, color=GREY, linestyle="--", linewidth=0.8)
        right_panel.text(words[0], chance + 0.02, "chance", fontsize=8)
        right_panel.set_ylim(0, 1.05)
        right_panel.set_title("share of rows that know their name", loc="left", fontsize=10)
        for panel in (left, right_panel):
            panel.set_xscale("log")
            panel.set_xlabel("words of the book between name and question")
        save_figure(figure, path)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mamba2_min.evaluation.needle", description=__doc__, formatter_class=flags.HelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a run's folder")
    add("--data", required=True, metavar="FILE", help="a book, as plain text in UTF-8")
    add("--max-words", type=int, default=100_000, metavar="N", help="the longest distance (%(default)s)")
    add("--names", type=int, default=8, metavar="N", help="rows, each with a name (%(default)s)")
    add("--trials", type=int, default=2, metavar="N", help="places of the book at which to begin (%(default)s)")
    add(
        "--out", type=flags.folder, default="needle", metavar="DIR", help="for needle.json and needle.png (%(default)s)"
    )
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps (%(default)s)")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    flags.check_integers(args, max_words=1, names=2, trials=1)
    from mamba2_min import devices, files
    from mamba2_min.evaluation.load import load_run

    book = files.read_text(args.data, MOST_BYTES)
    model, tokenizer = load_run(args.model, devices.pick_device(args.device))
    distances = [d for d in DISTANCES if d <= args.max_words] or [args.max_words]
    points = measure(model, tokenizer, book, distances, args.names, args.trials)
    chance = 1 / len(single_names(tokenizer, book, args.names))
    out = files.make_folder(args.out)
    print(table(points, chance))
    files.save_json(out / "needle.json", {"chance": chance, "points": [asdict(p) for p in points]})
    plot(points, chance, out / "needle.png")
    print(f"\nwritten: {out / 'needle.json'}, {out / 'needle.png'}")
    return 0


if __name__ == "__main__":
    run_script(main)
