"""Sorts texts with a fine-tuned model: a text per line in, its label, a tab and the probability out.

python -m mamba2_min.classify --model runs/spam < texts.txt
echo "You have won a prize" | python -m mamba2_min.classify --model runs/spam
python -m mamba2_min.classify --model runs/one runs/other < texts.txt

Several models that were trained apart err apart: the mean of their probabilities is right more often.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mamba2_min import console
from mamba2_min.errors import UserError, output_status, printable, run_script
from mamba2_min.flags import HelpFormatter

if TYPE_CHECKING:
    from mamba2_min.data.tokenizer import WordTokenizer
    from mamba2_min.finetune.classifier import Classifier

    Sorters = Sequence[tuple[Classifier, WordTokenizer]]

_BATCH = 32


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mamba2_min.classify", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--model",
        required=True,
        nargs="+",
        metavar="DIR",
        help="the folder of a fine-tuning with --task classify; of several, the mean of their probabilities counts",
    )
    parser.add_argument("--base", metavar="DIR", help="the base of an adapter, where it has moved")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps (%(default)s)")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    console.install()
    if sys.stdin is None:
        raise UserError("standard input is closed, and there the texts are read, one per line")
    from mamba2_min import devices

    device = devices.pick_device(args.device)
    sorters = load_all(args.model, args.base)
    for classifier, _ in sorters[0]:
        classifier.to(device)
    lines = (line.rstrip("\n") for line in _lines(sys.stdin.buffer))
    escape = printable if sys.stdout.isatty() else str
    for name, probability in classify_together(*sorters, lines):
        console.print(f"{escape(name)}\t{probability:.4f}")
        if console.failure():  # nobody gets the rest
            break
    return output_status("the labels")


def load(folder: str | Path, base: str | Path | None = None) -> tuple[Classifier, WordTokenizer, list[str]]:
    """The classifier in a folder, its tokenizer and its labels' names. Raises UserError."""
    from mamba2_min import files
    from mamba2_min.checkpoints import checkpoint
    from mamba2_min.finetune import adapter, labels
    from mamba2_min.finetune.classifier import POOLS, Classifier
    from mamba2_min.finetune.sorting import ClassifierFiles
    from mamba2_min.finetune.spelling import Spelling
    from mamba2_min.models.mamba2 import Mamba2LM
    from mamba2_min.training.task import ModelFiles

    folder = Path(folder)
    if not files.is_file(folder / labels.LABELS):
        raise UserError(
            f"{folder} holds no {labels.LABELS}: it is not the folder of a fine-tuning with --task classify"
        )
    about = files.load_json(folder / labels.LABELS)
    names, pool = (about.get("labels"), about.get("pool")) if isinstance(about, dict) else (None, None)
    good = isinstance(names, list) and len(names) > 1 and all(isinstance(n, str) and n for n in names)
    spelling = about.get("spelling", 0) if isinstance(about, dict) else 0
    possible = isinstance(spelling, int) and not isinstance(spelling, bool) and 0 <= spelling <= 1 << 20
    if not isinstance(names, list) or not good or pool not in POOLS or not possible or spelling == 1:
        raise UserError(f"{folder / labels.LABELS} does not name at least two labels, a pool and a spelling")
    if files.is_file(folder / adapter.CONFIG):
        model, source = adapter.load_base(folder, base)
        model = adapter.load_adapter(folder, model)
    else:
        model, source = Mamba2LM.from_pretrained(folder), str(folder)
    beside = folder if files.is_file(folder / checkpoint.TOKENIZER) else source
    tokenizer = checkpoint.load_tokenizer(beside, model.config.vocab_size)
    parts = Spelling(tokenizer, model.config.d_model, spelling) if spelling else None
    classifier = Classifier(model, len(names), str(pool), spelling=parts)
    ClassifierFiles(ModelFiles(), names, str(pool), spelling).load_head(folder, classifier)
    return classifier.eval(), tokenizer, names


def load_all(folders: Sequence[str | Path], base: str | Path | None = None) -> tuple[Sorters, list[str]]:
    """The classifiers in several folders with their tokenizers, and the labels' names. Raises UserError."""
    found = [load(folder, base) for folder in folders]
    names = found[0][2]
    other = next((folder for folder, one in zip(folders, found, strict=True) if one[2] != names), None)
    if other is not None:
        raise UserError(f"{other} has other labels than {folders[0]}: their probabilities have no mean")
    return [(classifier, tokenizer) for classifier, tokenizer, _ in found], names


def classify(
    classifier: Classifier, tokenizer: WordTokenizer, names: list[str], texts: Iterable[str]
) -> Iterator[tuple[str, float]]:
    """The likeliest label of each text and its probability. Raises UserError for a text that is empty or not text."""
    return classify_together([(classifier, tokenizer)], names, texts)


def classify_together(sorters: Sorters, names: list[str], texts: Iterable[str]) -> Iterator[tuple[str, float]]:
    """As `classify`, by the mean of the probabilities of several classifiers of the same labels."""
    import itertools

    import torch

    from mamba2_min.finetune.labels import Sample, encode
    from mamba2_min.finetune.sorting import pad

    numbered = enumerate(texts, 1)
    while part := list(itertools.islice(numbered, 1 if sys.stdin.isatty() else _BATCH)):
        for number, text in part:
            if not text.strip():
                raise UserError(f"line {number} is empty: there is nothing to sort")
        total = torch.zeros(len(part), len(names))
        for classifier, tokenizer in sorters:
            device = next(classifier.parameters()).device
            ids = [[tokenizer.eos_id, *encode(text.strip(), tokenizer, f"line {number}")] for number, text in part]
            input_ids, _, seq_idx = (t.to(device) for t in pad([Sample(torch.tensor(row), 0) for row in ids]))
            with torch.inference_mode():
                total += classifier(input_ids, seq_idx >= 0).float().softmax(-1).cpu()
        probabilities = total / len(sorters)
        for row in probabilities:
            best = int(row.argmax())
            yield names[best], float(row[best])


def _lines(stream: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"line {number} is not UTF-8 text") from error


if __name__ == "__main__":
    run_script(main)
