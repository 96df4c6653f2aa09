"""Selective copying (Mamba, arXiv:2312.00752, section 4.1.1): 16 letters among 4,080 blanks, to be said in order.

    python -m benchmarks.quality.selective_copying --device cuda --minutes 2

The paper's task and size: length 4096, vocabulary 16, 16 letters, two layers, d_model 64. Training begins with two
letters in eight tokens, and both grow; the test is at 4096 alone, on rows that training has not seen.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.quality import synthetic
from benchmarks.quality.synthetic import Plan, Row, Stage
from mamba2_min.errors import run_script
from mamba2_min.evaluation.recall import selective_copying
from mamba2_min.models.base import LanguageModel

PUBLISHED = {"Mamba": 0.998, "S6 without gate": 0.970, "S4": 0.183}  # accuracy: arXiv:2312.00752, table 1
LETTERS, VOCABULARY = 16, 16
# Length and letters of each stage. With 16 letters from the start a model learns to tell early from late, and no more.
LADDER = [(8, 2), (12, 4), (20, 8), (28, 12), (36, 16), *((1 << k, 16) for k in range(6, 13))]
TOKENS = 1 << 15  # a step's, at every length
MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "n_layer": 2,
    "d_state": 64,
    "headdim": 16,
    "tie_embeddings": False,
}
PLAN = Plan(steps=30_000, minutes=1.8, lr=1e-2, advance=0.95, enough=0.9999)
TEST_BATCHES = 128


def stage(length: int, letters: int = LETTERS, tokens: int | None = None) -> Stage:
    """Rows of this length, at most 256 of them."""
    draw = partial(
        selective_copying, min(256, max(1, (tokens or TOKENS) // length)), length, letters, vocab_size=VOCABULARY
    )
    return Stage(f"l {length}, {letters} letters", draw, letters)


def rows() -> list[Row]:
    stages = [stage(length, letters) for length, letters in LADDER]
    about = {"length": LADDER[-1][0], "letters": LETTERS, "vocabulary": VOCABULARY}
    return [Row("mamba2 d64", MODEL, stages, PLAN, about=about)]


def measure(model: LanguageModel, row: Row, seed: int, precision: str) -> dict[str, Any]:
    return synthetic.test(model, row.stages[-1], seed, TEST_BATCHES, precision)


def main() -> int:
    synthetic.run("selective-copying", synthetic.parser(__doc__).parse_args(), rows(), PUBLISHED, measure)
    return 0


if __name__ == "__main__":
    run_script(main)
