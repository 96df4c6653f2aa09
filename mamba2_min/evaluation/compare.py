"""Compares runs: a table, a radar chart and bars.

    python -m mamba2_min.evaluation.compare runs/a runs/b runs/c --data my_documents --out comparison

    bits per byte   of documents that none of the runs was trained on: each from
                    an empty state, and all with the state carried on
    distinct        of three-word phrases in sampled texts, the share that is new
    loop-free       the share of a greedy text outside of its longest loop
    closure         the share of sampled texts that end by themselves
    induction       which word followed the marker the last time?
    association     pairs of words, then a first one: which was the second?
    speed, memory   words are written one by one; the weights and the state

The documents are those of --data that each run kept for validation, by the settings in its folder; --all takes all. A
run that was trained on them gets figures that mean nothing.

In the radar an axis runs from chance (the centre) to the best of the runs (the rim); what is within three standard
errors of chance counts as chance. A radar misleads: its area depends on the order of the axes, and the rim says nothing
of how good the best is. The bars show the figures themselves.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba2_min import flags
from mamba2_min.errors import UserError, run_script
from mamba2_min.evaluation.axes import GAMES, Axis, axes_for

if TYPE_CHECKING:
    from mamba2_min.data.documents import Document
    from mamba2_min.data.tokenizer import WordTokenizer
    from mamba2_min.models.base import LanguageModel

GAME_WORDS = 64  # the games of recall are played with so many of the words that all runs know


def bits_per_byte(model: LanguageModel, tokenizer: WordTokenizer, documents: Sequence[Document]) -> dict[str, float]:
    """Bits per byte with an empty state before each document ("reset"), with the state carried, and tokens read/s.

    Both count every token of every document, and its end, as one byte.
    """
    import torch

    from mamba2_min.evaluation.perplexity import evaluate

    streams = [torch.tensor([*tokenizer.encode(d.text), tokenizer.eos_id], dtype=torch.int32) for d in documents]
    sizes = [len(d.text.encode()) + 1 for d in documents]
    started = time.perf_counter()
    scores = [evaluate(model, s, n, tokenizer.eos_id) for s, n in zip(streams, sizes, strict=True)]
    seconds = time.perf_counter() - started
    carried = evaluate(model, torch.cat(streams), sum(sizes), tokenizer.eos_id)
    return {
        "reset": sum(s.nats for s in scores) / math.log(2) / sum(sizes),
        "carried": carried.bits_per_byte,
        "read": carried.tokens / seconds,
    }


def byte_entropy(documents: Sequence[Document]) -> float:
    """Bits per byte of a model that knows how often each byte comes in these documents, and nothing else."""
    counts = Counter(b for d in documents for b in d.text.encode())
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values())


def writing(
    model: LanguageModel, tokenizer: WordTokenizer, prompts: Sequence[str], max_tokens: int, temperature: float
) -> dict[str, float]:
    """What the texts are like that a model writes for `prompts`, and tokens written per second.

    Sampled at `temperature` with seeds 0, 1, ...: distinct phrases and closure. Greedily: loops.
    """
    from mamba2_min.evaluation.repetition import distinct, longest_loop

    found: dict[str, list[float]] = {"distinct": [], "closure": [], "loop": [], "loop_free": []}
    tokens, seconds = 0, 0.0
    for seed, prompt in enumerate(prompts):
        ids = [tokenizer.eos_id, *tokenizer.encode(prompt)]
        for heat in (temperature, 0.0):
            started = time.perf_counter()
            stops = [tokenizer.eos_id]
            text = list(model.generate(ids, max_tokens, temperature=heat, seed=seed, stop_ids=stops))
            seconds += time.perf_counter() - started
            tokens += len(text)
            words = tokenizer.decode(text).split()
            if heat:
                found["distinct"].append(distinct(words, 3))
                found["closure"].append(float(len(text) < max_tokens))
            else:
                loop = longest_loop(words)
                found["loop"].append(loop)
                found["loop_free"].append(1 - loop / max(1, len(words)))
    return {**{name: sum(v) / len(v) for name, v in found.items()}, "write": tokens / max(seconds, 1e-9)}


def game_words(tokenizers: Sequence[WordTokenizer]) -> list[list[int]]:
    """The ids, in each tokenizer, of the most frequent lower-case words that are one token in all of them."""
    spelled = [{t.token_bytes(i): i for i in range(len(t))} for t in tokenizers]
    plain = [w for w in spelled[0] if w[:1] == b" " and w[1:].isalpha() and w.islower() and len(w) > 3]
    common = [word for word in plain if all(word in other for other in spelled)]
    return [[s[word] for word in common[:GAME_WORDS]] for s in spelled]


def play(model: LanguageModel, words: Sequence[int], batch: int = GAMES, seed: int = 0) -> dict[str, float]:
    """Accuracy in two games of recall.py, 16 symbols each, with `words` for symbols, newly dealt for every row.

    Only the possible answers are compared, so a guess is right once in 15 times (induction) or in 8 (association).
    """
    import torch

    from mamba2_min.evaluation.recall import associative_recall, induction_heads
    from mamba2_min.ops.loss import IGNORE

    generator = torch.Generator().manual_seed(seed)
    games = {
        "induction": (induction_heads(batch, 48, generator), range(15)),
        "association": (associative_recall(batch, 32, 4, generator, vocab_size=16), range(8, 16)),
    }
    device, accuracy = model.ids_device, {}
    for name, ((ids, targets), answers) in games.items():
        dealt = torch.stack([torch.randperm(len(words), generator=generator)[:16] for _ in range(batch)])
        table = torch.tensor(words)[dealt]  # (batch, 16): the word of each symbol
        with torch.no_grad():
            logits = model(table.gather(1, ids).to(device))[0].cpu()
        row, place = (targets != IGNORE).nonzero(as_tuple=True)
        allowed = table[row][:, list(answers)]
        chosen = logits[row, place].gather(1, allowed).argmax(1) + answers[0]
        accuracy[name] = (chosen == targets[row, place]).double().mean().item()
    return accuracy


def measure(runs: Sequence[str], documents: Sequence[Document], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """{run: {measure: value}} of every run. A game is None where the runs share too few words."""
    import torch

    from mamba2_min import devices
    from mamba2_min.evaluation.load import load_run
    from mamba2_min.evaluation.referee import PROMPTS, read_prompts

    device = devices.pick_device(args.device)
    prompts = read_prompts(args.prompts or PROMPTS)[: args.texts]
    loaded = {run: load_run(run, device) for run in runs}
    words = game_words([tokenizer for _, tokenizer in loaded.values()])
    found: dict[str, dict[str, Any]] = {}
    for (run, (model, tokenizer)), own in zip(loaded.items(), words, strict=True):
        print(f"{run} ...", flush=True)
        _, state = model.prefill(torch.tensor([[tokenizer.eos_id]], device=model.ids_device))
        games = play(model, own) if len(own) >= 16 else {"induction": None, "association": None}
        found[run] = {
            **bits_per_byte(model, tokenizer, documents),
            **writing(model, tokenizer, prompts, args.max_tokens, args.temperature),
            **games,
            "parameters": sum(p.numel() for p in model.parameters()),
            "memory": (sum(p.nbytes for p in model.parameters()) + state.nbytes) / 1e6,
        }
    return found


def table(found: dict[str, dict[str, Any]], axes: Sequence[Axis]) -> str:
    """A line per measure, a column per run."""
    width = max(12, *(len(shown(run)) for run in found)) + 2
    lines = [f"{'':<34}{'chance':>8}" + "".join(f"{shown(run):>{width}}" for run in found)]
    for axis in axes:
        cells = [axis.text(values.get(axis.key)) for values in found.values()]
        chance = "" if axis.chance is None else axis.text(axis.chance)
        lines.append(f"{axis.label:<34}{chance:>8}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def shown(run: str) -> str:
    """A run's name for a column: the last part of its path."""
    return Path(run).name or run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mamba2_min.evaluation.compare", description=__doc__, formatter_class=flags.HelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders of runs")
    add("--data", default="training_data", metavar="DIR|FILE", help="documents; their validation part is read")
    add("--all", action="store_true", help="read all documents of --data, not their validation part")
    add("--limit", type=int, default=100, metavar="N", help="documents that are read (%(default)s)")
    add("--texts", type=int, default=10, metavar="N", help="texts that each run writes, twice (%(default)s)")
    add("--max-tokens", type=int, default=800, metavar="N", help="of a text (%(default)s)")
    add("--temperature", type=float, default=0.7, metavar="X", help="of the sampled texts (%(default)s)")
    add("--prompts", type=Path, metavar="FILE", help="beginnings of texts, one per line (20 bundled ones)")
    add(
        "--out",
        type=flags.folder,
        default="comparison",
        metavar="DIR",
        help="for compare.json, radar.png, bars.png (%(default)s)",
    )
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps (%(default)s)")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    flags.check_integers(args, limit=1, texts=1, max_tokens=1)
    if not 0 < args.temperature <= 100:
        raise UserError("--temperature must be above 0, and at most 100: texts are sampled")
    names = [shown(run) for run in args.runs]
    if len(set(names)) < len(names):
        raise UserError("two of the runs have the same name; the last part of each path must differ")
    from mamba2_min.data.documents import read_documents
    from mamba2_min.evaluation import compare_plots
    from mamba2_min.evaluation.held_out import held_out
    from mamba2_min.files import make_folder, save_json

    out = make_folder(args.out)
    documents = (read_documents(args.data) if args.all else held_out(args.runs, args.data))[: args.limit]
    found = measure(args.runs, documents, args)
    axes = axes_for(byte_entropy(documents))
    print(f"\n{len(documents)} documents of {args.data}; {args.texts} texts of at most {args.max_tokens} tokens\n")
    print(table(found, axes))
    chances = {axis.key: axis.chance for axis in axes}
    save_json(out / "compare.json", {"documents": len(documents), "chance": chances, "runs": found})
    shown_runs = {shown(run): values for run, values in found.items()}
    compare_plots.radar(shown_runs, axes, out / "radar.png")
    compare_plots.bars(shown_runs, axes, out / "bars.png")
    print(f"\nwritten: {out / 'compare.json'}, {out / 'radar.png'}, {out / 'bars.png'}")
    return 0


if __name__ == "__main__":
    run_script(main)
