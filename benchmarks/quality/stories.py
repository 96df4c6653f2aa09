"""A thousand stories by a local LLM, in ten minutes on two cores: bits per byte of the held-out tenth, by optimizer.

    python -m benchmarks.quality.stories --data llama-stories --minutes 10

The model is the preset "small", with a vocabulary of 8,192 words and bytes. Each held-out story is scored from an empty
state, as `run.py` would begin one. "adamw" has the settings of `train.py`; "muon" what was found best for it. A row of
the same recipe, vocabulary, seed and minutes that is in the results is replaced.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks import harness
from benchmarks.quality import texts
from mamba2_min import devices, files
from mamba2_min.config import Mamba2Config
from mamba2_min.data.corpus import load_corpus
from mamba2_min.errors import run_script
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.settings import PRESETS, Settings
from mamba2_min.training.trainer import Trainer

VOCABULARY = 8192
RECIPES: dict[str, list[tuple[str, Any]]] = {
    "adamw": [],
    "muon": [("optimizer", "muon"), ("lr", 1e-2), ("weight_decay", 0.5), ("dropout", 0.05)],
}
# The time is the limit, and the learning rate falls with it: without evaluations that nobody reads.
TRAINING = Settings(max_steps=10**6, eval_every=250, save_every=10**6, patience=0)
RESULTS = "quality-stories.json"


def parse() -> argparse.Namespace:
    parser = texts.parser(__doc__, "a folder of documents", "stories-benchmark", device="cpu")
    add = parser.add_argument
    add("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    add("--minutes", type=float, default=10.0, help="of each training (%(default)s)")
    add("--vocab-size", type=int, default=VOCABULARY, metavar="N", help="tokens at most (%(default)s)")
    add("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    return parser.parse_args()


def measure(args: argparse.Namespace, recipe: str, seed: int, device: torch.device) -> dict[str, Any]:
    """Trains once, and returns what came of it."""
    changes = [*RECIPES[recipe], *args.set]
    values, settings = texts.chosen(PRESETS["small"], TRAINING, changes, seed=seed, max_minutes=args.minutes)
    corpus = load_corpus(args.data, args.vocab_size, pattern="llama3")
    model = Mamba2LM(Mamba2Config(len(corpus.tokenizer), **values), seed=seed)
    trainer = Trainer(model, corpus, settings, args.out / f"{recipe}-{seed}", device, report=texts.say)
    begun = time.perf_counter()
    result = texts.trained(trainer)
    minutes = (time.perf_counter() - begun) / 60
    measures = {name: round(value, 4) for name, value in result.best.measures().items()}
    print(f"{recipe}, seed {seed}: {measures['bits_per_byte']} bits per byte, {result.step:,} steps", flush=True)
    return {
        "recipe": recipe,
        "seed": seed,
        "asked_minutes": args.minutes,
        "minutes": round(minutes, 2),
        "steps": result.step,
        "best_step": result.best_step,
        "tokens_per_second": round(result.step * settings.batch_size * settings.context / (60 * minutes)),
        "vocabulary": model.config.vocab_size,
        "parameters": model.config.num_parameters(),
        **measures,
        "model": values,
        "training": harness.changed(settings),
        "set": dict(args.set),
    }


def main() -> int:
    args = parse()
    device = devices.pick_device(args.device)
    torch.set_num_threads(args.threads)
    path = args.results / RESULTS
    for seed in args.seeds:
        for recipe in args.recipes:
            row = measure(args, recipe, seed, device)
            old = files.load_json(path)["runs"] if files.is_file(path) else []
            runs = [one for one in old if any(one[name] != row[name] for name in _NAMES)]
            runs = sorted([*runs, row], key=lambda one: [str(one[name]) for name in _NAMES])
            texts.write(path, "quality.stories", device, runs)
    return 0


_NAMES = ("recipe", "set", "asked_minutes", "seed", "vocabulary")  # what tells one row from another

if __name__ == "__main__":
    run_script(main)
