"""WikiText-2 (arXiv:1609.07843): from a folder with train.txt, valid.txt and test.txt to the test perplexity.

    python -m benchmarks.quality.wikitext2 --data wikitext-2 --device cuda

The published convention: words as white space separates them, a line end is <eos>, and all 33,278 words of the training
part are the vocabulary. Each part is one text that is read once, with everything before a token as its context: no
cache, no dynamic evaluation, nothing learnt from the test part. The model is the one that was best on valid.txt;
test.txt is scored once, at the end. The results keep what was measured before with another seed or other settings.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.quality import texts
from mamba2_min import devices, files
from mamba2_min.config import Mamba2Config
from mamba2_min.data.corpus import load_corpus
from mamba2_min.errors import run_script
from mamba2_min.evaluation.perplexity import evaluate
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.recipes import recipe
from mamba2_min.settings import Settings
from mamba2_min.training.trainer import Trainer

PUBLISHED = {"AWD-LSTM": 65.6, "Mogrifier LSTM": 55.0}  # test perplexity: arXiv:1708.02182, arXiv:1909.01792
WORDS = 33_278
_of_training, _of_model = recipe("many-epochs", 0)
MODEL: dict[str, Any] = {"d_model": 512, "n_layer": 6, "d_state": 64, "chunk_size": 128, **_of_model}
TRAINING = Settings(
    recipe="many-epochs",
    **_of_training
    | {
        "context": 256,
        "batch_size": 32,
        "max_steps": 31_000,  # the schedule; the best validation comes at 18,000
        "eval_every": 1500,
        "patience": 4,
        "save_every": 10**6,
        "graph": True,
    },
)


def parse() -> argparse.Namespace:
    parser = texts.parser(
        __doc__, "holds train.txt, valid.txt, test.txt", "wikitext2", device="cuda", image="wikitext2.png"
    )
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="time limit; the learning rate falls with the clock (none)"
    )
    return parser.parse_args()


def measure(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Trains with one seed, and scores the best model on both parts that it did not learn from."""
    model_values, settings = texts.chosen(MODEL, TRAINING, args.set, seed=seed, max_minutes=args.minutes)
    device = devices.pick_device(args.device)
    how: dict[str, Any] = {"val_path": args.data / "valid.txt", "min_count": 1, "pattern": "whitespace"}
    corpus = load_corpus(args.data / "train.txt", **how)
    test = load_corpus(args.data / "test.txt", tokenizer=corpus.tokenizer, **how)
    if len(corpus.tokenizer) != WORDS:
        print(f"the vocabulary has {len(corpus.tokenizer):,} words, and WikiText-2 has {WORDS:,}: another data set?")
    model = Mamba2LM(Mamba2Config(vocab_size=len(corpus.tokenizer), **model_values), seed=seed)
    out = args.out / f"seed{seed}"
    trainer = Trainer(model, corpus, settings, out, device, report=texts.say)
    begun = time.perf_counter()
    result = texts.trained(trainer)
    minutes = (time.perf_counter() - begun) / 60
    scores = {}
    for name, tokens, size in (
        ("valid", corpus.validation, corpus.validation_bytes),
        ("test", test.train, test.train_bytes),
    ):
        with devices.matmul_precision(device, "float32"):
            score = evaluate(trainer.model, tokens, size, corpus.tokenizer.eos_id)
        scores[name] = {"perplexity": round(score.perplexity, 3), "tokens": score.tokens}
        print(f"seed {seed}: {name} perplexity {score.perplexity:.2f} over {score.tokens:,} tokens", flush=True)
    return {
        "seed": seed,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "minutes": round(minutes, 2),
        "steps": result.step,
        "best_step": result.best_step,
        "validation_by_step": texts.validation_by_step(out),
        "parameters": model.config.num_parameters(),
        "model": model_values,
        "training": harness.changed(settings),
        **scores,
    }


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """The validation perplexity of each run by step; the best run stands out. The legend has the test figures."""
    import matplotlib.pyplot as plt

    from mamba2_min.plots import BLUE, STYLE, save_figure

    shown = sorted((run for run in runs if "validation_by_step" in run), key=lambda run: run["valid"]["perplexity"])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(11, 4.4), layout="constrained")
        colours = plt.get_cmap("turbo")
        for place, run in enumerate(shown):
            first = place == 0
            colour = BLUE if first else colours(0.25 + 0.7 * place / len(shown))
            steps, values = zip(*run["validation_by_step"], strict=True)
            label = f"{described(run)}: test {run['test']['perplexity']:.1f}"
            axes.plot(steps, values, color=colour, linewidth=2.2 if first else 1, label=label, zorder=3 if first else 2)
            best = values.index(min(values))
            axes.plot(steps[best], values[best], "o", color=colour, markersize=4, zorder=4)
        lowest = shown[0]["valid"]["perplexity"]
        axes.set_ylim(0.96 * lowest, 1.6 * lowest)
        axes.set_xlabel("step; a dot is the best one, whose model is kept")
        axes.set_ylabel("validation perplexity, full context")
        figure.legend(loc="outside right upper", fontsize=9)  # in the order of the best validations
        files.make_folder(path.parent)
        save_figure(figure, path)


def described(run: dict[str, Any]) -> str:
    """A run in a few words: its size, and what is on against learning by heart."""
    model, training = run["model"], run["training"]
    noise, optimizer = training.get("input_noise", 0), training.get("optimizer", "")
    parts = [
        f"{run['parameters'] / 1e6:.0f}M",
        f"blocks {model['dropout']:g}" if model["dropout"] else "",
        f"channels {model['variational_dropout']:g}",
        f"noise {noise:g}" if noise else "",
        optimizer,
        f"seed {run['seed']}" if run["seed"] else "",
    ]
    return ", ".join(part for part in parts if part)


def main() -> int:
    args = parse()
    torch.set_num_threads(devices.cpu_threads(devices.pick_device(args.device)))
    torch.backends.cuda.matmul.allow_tf32 = True
    path = args.results / "quality-wikitext2.json"
    runs: list[dict[str, Any]] = files.load_json(path)["runs"] if files.is_file(path) else []
    for seed in args.seeds:
        new = measure(args, seed)
        training = Settings(**new["training"])
        runs = [run for run in runs if not texts.is_of(run, seed, new["model"], training)] + [new]
        texts.write(path, "quality.wikitext2", devices.pick_device(args.device), runs, published=PUBLISHED)
    plot(runs, args.image)
    return 0


if __name__ == "__main__":
    run_script(main)
