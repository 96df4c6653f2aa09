"""What it costs that a run survives a kill: the time of a save, beside that of the steps between two saves.

With the default --save-every and --eval-every each save is the most expensive one: everything needed to resume, with
metrics.jsonl flushed before and the file read back afterwards, and the best model.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, peers
from benchmarks.harness import Options
from mamba2_min.checkpoints import checkpoint
from mamba2_min.config import Mamba2Config
from mamba2_min.data.corpus import Corpus
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.settings import Settings
from mamba2_min.training.trainer import Trainer

SETTINGS = {"small": peers.SMALL}
QUICK = {"tiny": peers.TINY}
STEPS = 5  # per round


def trainer_of(config: Mamba2Config, options: Options, out: Path) -> Trainer:
    """A trainer with the default settings, on random tokens: the cost of a step does not depend on them."""
    words = WordTokenizer([f"word{k}" for k in range(config.vocab_size - 257)])
    tokens = torch.randint(config.vocab_size, (100_000,), dtype=torch.int32)
    corpus = Corpus(words, tokens, tokens[:1000], len(tokens), 1000, 1, 1, 1, 1)
    settings = Settings(precision=options.precision, max_steps=10**6, spike=0.0)
    return Trainer(Mamba2LM(config, seed=0), corpus, settings, out, options.device)


def measure(name: str, config: Mamba2Config, options: Options) -> harness.Measurement:
    """Times steps and saves by turns, and computes the share of a training's time that saves take."""
    with tempfile.TemporaryDirectory() as folder, options.products():
        trainer = trainer_of(config, options, Path(folder))
        lines = itertools.count()

        def steps() -> None:
            for _ in range(STEPS):
                trainer._step()

        def save() -> None:
            trainer.log.append(step=next(lines), split="validation", loss=1.0)
            trainer.save()
            checkpoint.save_model(trainer.out, config, trainer.model.state_dict())

        seconds = harness.take_turns({"step": steps, "save": save}, options)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.pt"))
    between = Settings().save_every / STEPS
    shares = [s / (s + between * t) for s, t in zip(seconds["save"], seconds["step"], strict=True)]
    low, share, high = harness.spread(shares)
    about: dict[str, Any] = {
        "batch": Settings().batch_size,
        "length": Settings().context,
        "save_every": Settings().save_every,
        "bytes": size,
        "share": share,
        "share_quartiles": [low, high],
        "model": config.to_dict(),
    }
    entries = {"step": harness.timed(seconds["step"], STEPS), "save": harness.timed(seconds["save"])}
    return harness.measurement("save_cost", name, about, options, entries)


def summary(about: dict[str, Any]) -> str:
    return f"saving takes {100 * about['share']:.2f}% of the time, with a save every {about['save_every']} steps"


if __name__ == "__main__":
    harness.main_of("save_cost", __doc__, (SETTINGS, QUICK), measure, summary)
