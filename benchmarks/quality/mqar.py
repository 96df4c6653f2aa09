"""Multi-query associative recall (Zoology, arXiv:2312.04927; Mamba-2, arXiv:2405.21060, figure 8), beside attention.

    python -m benchmarks.quality.mqar --device cuda --minutes 5

Pairs of key and value, then each key again: which value has it? Vocabulary 8192, two layers, d_model 32 to 256. It is
the Mamba-2 paper's harder form: as many pairs as fit, a quarter of the length, and random tokens where Zoology has
zeros (`--fill zeros`). As there, training passes from few pairs to many; here the rows grow with them. Each
Transformer (models/transformer.py) has the width, the layers and nearly the parameters of the Mamba-2 with n 64.

The rows that tell most come first, so that a short time limit is well spent.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.quality import synthetic
from benchmarks.quality.synthetic import Plan, Row, Stage
from mamba2_min.errors import run_script
from mamba2_min.evaluation.recall import associative_recall
from mamba2_min.models.base import LanguageModel

# Read off the figure, at a length of 1024 with 256 pairs: arXiv:2405.21060, figure 8.
PUBLISHED = {"Mamba-2, n 16": "0.75 to 1.0 by d_model", "Mamba-2, n 256": "at or above attention"}
VOCABULARY = 8192
TOKENS = 1 << 15  # a step's, at every length
TEST_BATCHES = 16
RATES = {32: 1e-2, 64: 8e-3, 128: 4e-3, 256: 3e-3}  # peak learning rate by d_model

# Length, d_model, d_state (0: the Transformer), minutes at most.
TABLE = [
    (1024, 256, 256, 1.0),
    (1024, 256, 0, 0.5),
    (1024, 256, 64, 0.5),
    (1024, 256, 16, 0.5),
    (1024, 128, 256, 0.5),
    (1024, 128, 0, 0.4),
    (1024, 64, 256, 0.4),
    (1024, 64, 0, 0.4),
    (256, 64, 256, 0.3),
    (256, 64, 64, 0.3),
    (256, 64, 16, 0.3),
    (256, 64, 0, 0.3),
    (256, 32, 256, 0.3),
    (256, 32, 16, 0.3),
    (256, 32, 0, 0.3),
    (256, 128, 16, 0.3),
    (1024, 128, 64, 0.4),
    (1024, 128, 16, 0.4),
    (1024, 64, 64, 0.4),
    (1024, 64, 16, 0.4),
    (1024, 32, 256, 0.4),
    (1024, 32, 16, 0.4),
    (1024, 32, 0, 0.4),
]


def stage(length: int, random_fill: bool, vocabulary: int = VOCABULARY, tokens: int | None = None) -> Stage:
    """A quarter of the length in pairs, in at most 256 rows."""
    pairs = length // 4
    draw = partial(
        associative_recall,
        max(1, (tokens or TOKENS) // length),
        length,
        pairs,
        vocab_size=vocabulary,
        random_fill=random_fill,
    )
    return Stage(f"l {length}, {pairs} pairs", draw, pairs)


def row(length: int, d_model: int, d_state: int, minutes: float, random_fill: bool = True) -> Row:
    lengths = [size for size in (32, 64, 128, 256, 512, 1024) if size <= length]
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": d_model,
        "n_layer": 2,
        "d_state": d_state or 64,
        "headdim": 64,
    }
    who = f"mamba2 d{d_model} n{d_state}" if d_state else f"transformer d{d_model}"
    return Row(
        f"l{length} {who}" + ("" if random_fill else " zeros"),
        shape,
        [stage(size, random_fill) for size in lengths],
        Plan(steps=40_000, minutes=minutes, lr=RATES[d_model], advance=0.9, enough=0.9995),
        transformer=not d_state,
        about={"length": length, "pairs": length // 4, "vocabulary": VOCABULARY, "random_fill": random_fill},
    )


def measure(model: LanguageModel, row: Row, seed: int, precision: str) -> dict[str, Any]:
    return synthetic.test(model, row.stages[-1], seed, TEST_BATCHES, precision)


def main() -> int:
    parser = synthetic.parser(__doc__)
    parser.add_argument("--fill", choices=("random", "zeros"), default="random", help="between the questions")
    args = parser.parse_args()
    synthetic.run("mqar", args, [row(*line, args.fill == "random") for line in TABLE], PUBLISHED, measure)
    return 0


if __name__ == "__main__":
    run_script(main)
