"""Induction heads (Mamba, arXiv:2312.00752, section 4.1.2): trained at length 256, tested from 64 to 1,048,576.

    python -m benchmarks.quality.induction_heads --device cuda

A marker stands once among random tokens, and again at the end: which token followed it? The paper's task and size:
vocabulary 16, two layers, d_model 64, trained at 256 (and before that, to get started, at 32). Long rows are drawn and
read in pieces with the state carried, so that memory does not depend on the length.

Two models differ in one term of the loss. Once all answers at 256 are right, nothing tells a model to let time stand
still at the other tokens, and a dt of a thousandth that is harmless for 256 tokens is not for a million. In "still" a
small cost then has dt fall until it makes no difference, but for one token of each row (`synthetic.StepSizes`).
Products are float32: in bf16 no model of ours answered rows of 65,536 tokens. On one CPU thread a row takes three
quarters of an hour, half of it the test.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality import synthetic
from benchmarks.quality.synthetic import Plan, Row, Stage
from mamba2_min import devices
from mamba2_min.errors import run_script
from mamba2_min.evaluation.recall import induction_heads
from mamba2_min.models.base import LanguageModel

PUBLISHED = {"Mamba": {str(1 << k): 1.0 for k in range(6, 21)}}  # accuracy by length: arXiv:2312.00752, table 2
VOCABULARY = 16
TRAINED_AT = 256
TESTED_AT = [1 << k for k in range(6, 21)]
PIECE = 1 << 14  # tokens of a row that are read at a time
TEST_ROWS = 64
STILL = 0.01  # nats: the weight of that cost
MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "n_layer": 2,
    "d_state": 16,
    "headdim": 64,
    "tie_embeddings": False,
}
PLAN = Plan(steps=6000, minutes=30.0, lr=1e-2, eps=1e-6)


def stage(length: int, batch: int = 16, still: float = 0.0) -> Stage:
    draw = partial(induction_heads, batch, length, vocab_size=VOCABULARY)
    return Stage(f"l {length}" + (" still" if still else ""), draw, 1, still)


def rows(batch: int = 16) -> list[Row]:
    stages = [stage(32, batch), stage(TRAINED_AT, batch)]
    about = {"trained_at": TRAINED_AT, "vocabulary": VOCABULARY}
    return [
        Row(
            "mamba2 d64 still", MODEL, [*stages, stage(TRAINED_AT, batch, STILL)], PLAN, about=about | {"still": STILL}
        ),
        Row("mamba2 d64 plain", MODEL, stages, PLAN, about=about),
    ]


def pieces(rows: int, length: int, answer: Tensor, generator: torch.Generator, piece: int = PIECE) -> Iterator[Tensor]:
    """The rows (rows, length) of `induction_heads` with this `answer` (rows, 1), a piece of their tokens at a time."""
    device, marker = generator.device, VOCABULARY - 1
    place = torch.randint(0, length - 2, (rows, 1), generator=generator, device=device)
    for start in range(0, length, piece):
        at = torch.arange(start, min(length, start + piece), device=device)
        ids = torch.randint(0, marker, (rows, len(at)), generator=generator, device=device)
        ids = torch.where(at == place + 1, answer, ids)
        yield ids.masked_fill((at == place) | (at == length - 1), marker)


@torch.no_grad()
def accuracy(model: LanguageModel, length: int, rows: int, seed: int, precision: str, piece: int = PIECE) -> float:
    """The share of rows of this length whose answer is right, each read from an empty state."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(synthetic.TEST_SEED + seed)
    answer = torch.randint(0, VOCABULARY - 1, (rows, 1), generator=generator, device=device)
    state, hidden = None, None
    with devices.matmul_precision(device, precision), devices.autocast(device, precision):
        for ids in pieces(rows, length, answer, generator, piece):
            hidden, state = model.hidden(ids, state)
        assert hidden is not None
        found = model.lm_head(hidden[:, -1])[:, :VOCABULARY].argmax(-1, keepdim=True)
    return (found == answer).double().mean().item()


def measure(model: LanguageModel, row: Row, seed: int, precision: str) -> dict[str, Any]:
    by_length = {}
    for length in TESTED_AT:
        by_length[str(length)] = accuracy(model, length, TEST_ROWS, seed, precision)
        print(f"{row.name}  l {length:>9,}: {by_length[str(length)]:.2%}", flush=True)
    return {"test_rows": TEST_ROWS, "by_length": by_length, "accuracy": min(by_length.values())}


def main() -> int:
    parser = synthetic.parser(__doc__)
    parser.set_defaults(precision="float32")
    synthetic.run("induction-heads", parser.parse_args(), rows(), PUBLISHED, measure)
    return 0


if __name__ == "__main__":
    run_script(main)
