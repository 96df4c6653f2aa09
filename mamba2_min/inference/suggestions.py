"""How a text may begin: the first words of documents that a run was trained on."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

from mamba2_min import files
from mamba2_min.checkpoints import checkpoint
from mamba2_min.data.documents import Reader
from mamba2_min.data.tokenizer import WordTokenizer, bytes_outside
from mamba2_min.errors import UserError

_READ = 300  # documents: a large corpus is not read to its end for three lines
_WORDS = 6


def suggested_prompts(folder: str | Path, tokenizer: WordTokenizer, count: int = 3) -> list[str]:
    """The beginnings of some documents of a run, other ones each time; none where its documents are not there."""
    try:
        data = files.load_json(Path(folder) / checkpoint.SETTINGS)["data"]
        documents = islice(iter(Reader(data["data"], encoding=data.get("encoding"))), _READ)
        found = {beginning(document.text, tokenizer) for document in documents} - {""}
    except (UserError, KeyError, TypeError, ValueError):
        return []
    return random.sample(sorted(found), min(count, len(found)))


def beginning(text: str, tokenizer: WordTokenizer) -> str:
    """The first words of a document's text, after its request if it answers one; "" if they are no good example."""
    text = text.partition("<start>")[2] or text
    lines = (line.strip() for line in text.splitlines())
    first = next((line for line in lines if line and not line.startswith(("#", "|", "-", "*", ">", "```"))), "")
    words = first.split()[:_WORDS]
    while words and not words[-1][-1].isalpha():  # what ends in a comma or a full stop leaves less to go on
        words.pop()
    chosen = " ".join(words)
    known = chosen.isprintable() and not any(bytes_outside(tokenizer, piece) for piece in tokenizer.pieces(chosen))
    return chosen if len(words) > 2 and len(chosen) < 60 and known else ""
