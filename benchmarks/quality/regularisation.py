"""What each technique against learning by heart brings: a recipe, and the same with one thing changed, by seeds.

    python -m benchmarks.quality.regularisation --data wikitext-2 --device cuda

A small model (d 256, 4 layers) reads the first quarter of WikiText-2 a few dozen times: about as often, for its size,
as the model of `wikitext2` reads all of it. Words that are not in this quarter are <unk>, as the data set's rare words
are, so perplexities compare with one another alone. A row's figure is the test perplexity of the model that was best on
the validation text. Rows that the results hold with the same settings are left out; --again measures them anew. The
picture shows the figure of each seed, and the validation perplexity of each row on the way.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.quality import texts
from mamba2_min import devices, files
from mamba2_min.config import Mamba2Config
from mamba2_min.data.corpus import Corpus, load_corpus
from mamba2_min.errors import UserError, run_script
from mamba2_min.evaluation.perplexity import evaluate
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.settings import Settings
from mamba2_min.training.trainer import Trainer

SHARE = 4  # one article of so many
UNKNOWN = "<unk>"
MODEL: dict[str, Any] = {
    "d_model": 256,
    "n_layer": 4,
    "d_state": 64,
    "dropout": 0.4,
    "embedding_dropout": 0.1,
    "variational_dropout": 0.4,
}
TRAINING = Settings(
    context=256,
    batch_size=16,
    max_steps=4000,
    eval_every=250,
    save_every=10**6,
    patience=0,
    lr=3e-3,
    weight_decay=1.0,
    beta2=0.99,
    carry_state=True,
    ema_decay=0.998,
    graph=True,
)
NOTHING: dict[str, Any] = {
    "dropout": 0.0,
    "embedding_dropout": 0.0,
    "variational_dropout": 0.0,
    "ema_decay": 0.0,
    "weight_decay": 0.1,
}
ROWS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "no dropout of blocks": {"dropout": 0.0},
    "no dropout of channels": {"variational_dropout": 0.0},
    "no dropout of words": {"embedding_dropout": 0.0},
    "weight decay 0.1 for 1.0": {"weight_decay": 0.1},
    "no average of weights": {"ema_decay": 0.0},
    "state from zero in each window": {"carry_state": False},
    "none of them": NOTHING | {"carry_state": False},
    "with noise 0.15": {"input_noise": 0.15},
    "with Muon": {"optimizer": "muon"},
}
RESULTS = "quality-regularisation.json"


def parse() -> argparse.Namespace:
    parts = "holds train.txt, valid.txt, test.txt"
    parser = texts.parser(__doc__, parts, "regularisation", seeds=(0, 1, 2), image="regularisation.png")
    add = parser.add_argument
    add("--only", nargs="+", metavar="TEXT", help=f"rows whose name contains one of these: {', '.join(ROWS)}")
    add("--again", action="store_true", help="measure also what the results hold already")
    add("--share", type=int, default=SHARE, metavar="N", help="train on one article of N, the first ones (%(default)s)")
    return parser.parse_args()


def cut(data: Path, share: int, out: Path) -> Path:
    """A folder with the first articles of train.txt, one of `share`, and the other files in the words of these."""
    found = {part: files.read_text(data / f"{part}.txt", 1 << 28) for part in ("train", "valid", "test")}
    lines = found["train"].splitlines(keepends=True)
    titles = [k for k, line in enumerate(lines) if line.startswith(" = ") and not line.startswith(" = = ")]
    if len(titles) < share:
        raise UserError(f"{data / 'train.txt'} has {len(titles)} articles (titles: ' = Title = '), and {share} are few")
    found["train"] = "".join(lines[: titles[len(titles) // share]])
    words = set(found["train"].split())
    files.make_folder(out)
    for part, text in found.items():
        known = (" ".join(word if word in words else UNKNOWN for word in line.split()) for line in text.splitlines())
        (out / f"{part}.txt").write_text("\n".join(known) + "\n", encoding="utf-8")
    return out


def asked(name: str, seed: int, args: argparse.Namespace) -> tuple[dict[str, Any], Settings]:
    """The model's shape and the settings of a row. Raises UserError for what cannot be set."""
    return texts.chosen(MODEL, TRAINING, [*ROWS[name].items(), *args.set], seed=seed)


def measure(name: str, seed: int, corpus: Corpus, test: Corpus, args: argparse.Namespace) -> dict[str, Any]:
    """Trains a row with a seed, and scores the best model on the test text."""
    device = devices.pick_device(args.device)
    values, settings = asked(name, seed, args)
    out = args.out / f"{name.replace(' ', '-')}-{seed}"
    model = Mamba2LM(Mamba2Config(vocab_size=len(corpus.tokenizer), **values), seed=seed)
    trainer = Trainer(model, corpus, settings, out, device)
    begun = time.perf_counter()
    result = texts.trained(trainer)
    seconds = time.perf_counter() - begun
    with devices.matmul_precision(device, "float32"):
        score = evaluate(trainer.model, test.train, test.train_bytes, corpus.tokenizer.eos_id)
    print(f"{name}, seed {seed}: test perplexity {score.perplexity:.2f}, best at step {result.best_step}", flush=True)
    return {
        "name": name,
        "seed": seed,
        "seconds": round(seconds, 1),
        "steps": result.step,
        "best_step": result.best_step,
        "validation": round(result.best.perplexity, 3),
        "test": round(score.perplexity, 3),
        "validation_by_step": texts.validation_by_step(out),
        "parameters": model.config.num_parameters(),
        "model": values,
        "training": harness.changed(settings),
    }


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Left, the figures of all seeds, a line for each row; right, the mean validation perplexity on the way."""
    import matplotlib.pyplot as plt

    from mamba2_min.plots import BLUE, GREEN, GREY, ORANGE, STYLE, save_figure

    names = [name for name in ROWS if any(run["name"] == name for run in runs)]
    shown = {
        "the recipe": BLUE,
        "no dropout of blocks": GREEN,
        "state from zero in each window": ORANGE,
        "with noise 0.15": "#8e63b5",
        "none of them": "#c0504d",
    }
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        for place, name in enumerate(reversed(names)):
            found = [run["test"] for run in runs if run["name"] == name]
            colour = shown.get(name, GREY)
            left.plot(found, [place] * len(found), "o", color=colour, alpha=0.7, markersize=5)
            left.plot([statistics.mean(found)] * 2, [place - 0.3, place + 0.3], color=colour)
        left.set_yticks(range(len(names)), reversed(names))
        left.set_xlabel("test perplexity of the best model; one dot a seed")
        for name in names:
            ways = [run["validation_by_step"] for run in runs if run["name"] == name]
            steps = [step for step, _ in min(ways, key=len)]
            means = [statistics.mean(way[k][1] for way in ways) for k in range(len(steps))]
            emphasis = {"linewidth": 2, "label": name} if name in shown else {"linewidth": 0.8, "alpha": 0.6}
            right.plot(steps, means, color=shown.get(name, GREY), **emphasis)
        best = min(value for run in runs for _, value in run["validation_by_step"])
        right.set_ylim(0.97 * best, 2 * best)
        right.set_xlabel("step")
        right.set_ylabel("validation perplexity")
        right.legend()
        files.make_folder(path.parent)
        save_figure(figure, path)


def main() -> int:
    args = parse()
    chosen_rows = [name for name in ROWS if not args.only or any(text in name for text in args.only)]
    if not chosen_rows:
        raise UserError(f"no row's name contains {' or '.join(args.only)}; there are {', '.join(ROWS)}")
    for name in chosen_rows:  # what cannot be is told before anything is read
        asked(name, args.seeds[0], args)
    device = devices.pick_device(args.device)
    torch.set_num_threads(devices.cpu_threads(device))
    torch.backends.cuda.matmul.allow_tf32 = True
    path = args.results / RESULTS
    runs: list[dict[str, Any]] = files.load_json(path)["runs"] if files.is_file(path) else []
    folder = cut(args.data, args.share, args.out / "data")
    how: dict[str, Any] = {"min_count": 1, "pattern": "whitespace"}
    corpus = load_corpus(folder / "train.txt", val_path=folder / "valid.txt", **how)
    test = load_corpus(folder / "test.txt", val_path=folder / "valid.txt", tokenizer=corpus.tokenizer, **how)
    about = {"train": len(corpus.train), "words": len(corpus.tokenizer), "test": len(test.train)}
    print(f"{about['train']:,} words to train on, {about['words']:,} different ones", flush=True)
    for seed in args.seeds:
        for name in chosen_rows:
            values, settings = asked(name, seed, args)
            before = [run for run in runs if (run["name"], run["seed"]) == (name, seed)]
            if any(texts.is_of(run, seed, values, settings) for run in before) and not args.again:
                continue
            row = measure(name, seed, corpus, test, args)
            runs = [run for run in runs if run not in before] + [row]
            runs.sort(key=lambda run: (list(ROWS).index(run["name"]), run["seed"]))
            texts.write(path, "quality.regularisation", device, runs, tokens=about)
    plot(runs, args.image)
    return 0


if __name__ == "__main__":
    run_script(main)
