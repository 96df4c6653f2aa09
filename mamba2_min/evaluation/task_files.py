"""Tasks for the harness, made from documents: offline, and about texts that a small model can know.

    cloze             a passage without its last word; the word is to be likelier than anything else (as in LAMBADA)
    multiple choice   a passage and four sentences, of which one really comes next (as in HellaSwag)
    perplexity        whole documents, every token given all before it

Only documents of the validation part are used: a model that was trained on the others has not seen these.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mamba2_min.data.documents import Document
from mamba2_min.files import make_folder, write_atomically

_SENTENCE = re.compile(r"[^.!?\n]+[.!?]+[\"'”’)]*")
_LAST_WORD = re.compile(r"^(.*\S)( [A-Za-z]{4,})([.!?]+[\"'”’)]*)$", re.DOTALL)


def sentences(text: str) -> list[str]:
    """The sentences of a text, without white space at their ends; what is no sentence is left out."""
    return [s for found in _SENTENCE.findall(text) if len((s := found.strip()).split()) > 2]


def cloze(documents: Sequence[Document], limit: int, seed: int = 0) -> list[dict[str, Any]]:
    """{"text", "word"}: a passage up to its last word, and that word, which occurs in the passage before."""
    items = []
    for document in _shuffled(documents, seed):
        found = sentences(document.text)
        for k in range(3, len(found)):
            match = _LAST_WORD.match(" ".join(found[max(0, k - 4) : k + 1]))
            if match and re.search(rf"\b{match[2].strip()}\b", match[1]):
                items.append({"text": match[1], "word": match[2]})
    return _shuffled(items, seed)[:limit]


def multiple_choice(documents: Sequence[Document], limit: int, seed: int = 0) -> list[dict[str, Any]]:
    """{"context", "choices", "label"}: three sentences, and which of four comes next; the wrong ones are of others."""
    drawn = random.Random(seed)
    by_document = {d.key: found for d in documents if len(found := sentences(d.text)) >= 5}
    items = []
    for document in _shuffled(documents, seed):
        found = by_document.get(document.key, [])
        others = [s for key, there in by_document.items() if key != document.key for s in there]
        for k in range(3, len(found), 4):
            if len(others) < 3:
                break
            choices = [" " + found[k], *(" " + s for s in drawn.sample(others, 3))]
            order = drawn.sample(range(4), 4)
            shown = [choices[i] for i in order]
            items.append({"context": " ".join(found[k - 3 : k]), "choices": shown, "label": order.index(0)})
    return _shuffled(items, seed)[:limit]


def _shuffled(items: Sequence[Any], seed: int) -> list[Any]:
    return random.Random(seed).sample(list(items), len(items))


def write_items(path: Path, items: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object per line. Raises UserError where that cannot be done."""
    make_folder(path.parent)
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    write_atomically(path, lambda file: file.write(text.encode()))
