"""Which documents train and which validate: by a hash of each text; where that fails, the largest ones are cut."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mamba2_min.data.documents import RULES, Document
from mamba2_min.data.findings import counted, listed
from mamba2_min.errors import UserError

_BOUNDARIES = (
    re.compile(r"(\n[^\S\n]*\n\s*)"),  # between paragraphs
    re.compile(r"(?<=[.!?…])[\"'”’)]*(\s+)"),  # between sentences
    re.compile(r"(\s+)"),  # between words
)
LARGE_BYTES = 4096  # a smaller document is cut only if it is the only one: its last part would be too short
LARGE_PARTS = 20  # a document of more than 1/20 of all text is large
_NEAR = 100_000  # characters around the cut in which a boundary is searched first


class Split(NamedTuple):
    """Documents to train on, documents to validate with, and lines that say what was done to get there."""

    train: list[Document]
    validation: list[Document]
    notes: list[str]


class Sides(NamedTuple):
    """Which documents go where, by their keys: all that are in neither set are for training."""

    validation: set[str]
    cut: set[str]  # the first part of the text is for training, the last for validation


def split_documents(
    documents: Sequence[Document], val_fraction: float = 0.1, rules: int = RULES, keys: Sequence[str] | None = None
) -> Split:
    """Splits by a hash of each document's text: about `val_fraction` of the text goes to validation.

    A document's side depends only on its text. So adding, renaming or moving a document moves no other, a resumed run
    has the same split, and identical documents are on the same side. `choose_sides` says what happens where that would
    be a bad split, with few documents or very different sizes. `rules` are those of `choose_sides`; `keys` replace the
    keys of documents of which something was left out, so that this moves none.
    Raises UserError for a fraction that is not between 0 and 1, and for a text too short to be cut.
    """
    if not documents:
        raise UserError("no documents to split")
    keys = [document.key for document in documents] if keys is None else keys
    sizes = {key: len(document.text.encode()) for key, document in zip(keys, documents, strict=True)}
    sides, notes = choose_sides(sizes, Counter(keys), val_fraction, rules)
    if len(sizes) == 1:
        documents, keys = documents[:1], keys[:1]  # copies of a single document are one
    train, validation, cuts = [], [], []
    for key, document in zip(keys, documents, strict=True):
        if key in sides.cut:
            head, tail = cut(document, val_fraction)
            train.append(head)
            validation.append(tail)
            cuts.append((document.file, len(tail.text), len(document.text)))
        else:
            (validation if key in sides.validation else train).append(document)
    return Split(train, validation, notes + cut_note(cuts, len(sizes)))


def choose_sides(
    sizes: Mapping[str, int], copies: Mapping[str, int], val_fraction: float = 0.1, rules: int = RULES
) -> tuple[Sides, list[str]]:
    """Which documents validate, and lines that say what was done. `sizes`: the bytes of each text, by its key.

    1. Those validate whose hash, as a fraction of 1, is below `val_fraction`; if none or all are, the smallest alone.
    2. A single text is cut in two.
    3. If 1 gives validation less than half or more than twice the bytes that it should have, the large documents are
       cut, all at the same fraction; the others stay where their hash puts them.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"the validation part must be a fraction between 0 and 1, not {val_fraction}")
    if len(sizes) == 1:
        return Sides(set(), set(sizes)), []
    # The first 60 bits of the hash, as a fraction of 1: uniform, and the same on every machine.
    hashed = {key for key in sizes if int(key[:15], 16) / 16**15 < val_fraction}
    chosen, notes = hashed, []
    if not hashed or len(hashed) == len(sizes):
        chosen = {min(sizes)}
        notes = [f"with {counted(sum(copies.values()), 'document')} the validation part is one document"]
    total = sum(size * copies[key] for key, size in sizes.items())
    share = sum(sizes[key] * copies[key] for key in chosen) / total
    bad = share < val_fraction / 2 or share > min(2 * val_fraction, (1 + val_fraction) / 2)
    large = {key for key, size in sizes.items() if is_large(size, total)}
    if rules > 1 and bad and large:
        return Sides(hashed - large, large), []
    return Sides(chosen, set()), notes


def is_large(size: int, total: int) -> bool:
    """Whether a document of `size` bytes may be cut, in a corpus of `total` bytes."""
    return size >= LARGE_BYTES and size * LARGE_PARTS > total


def cut(document: Document, fraction: float) -> tuple[Document, Document]:
    """Cuts off about the last `fraction` of a document, at a paragraph if one ends near there, a sentence, a word."""
    text = document.text
    wanted = round(len(text) * (1 - fraction))
    near = max(round(len(text) * min(fraction, 1 - fraction) / 2), 40)
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())  # both parts need some text
    start = end = min(max(wanted, first + 1), last - 1)
    for boundary, within in ((boundary, within) for boundary in _BOUNDARIES for within in (min(near, _NEAR), near)):
        spans = [match.span(1) for match in boundary.finditer(text, max(wanted - within, 0), wanted + within)]
        spans = [span for span in spans if first < span[0] and span[1] < last]
        if spans:  # the white space at the cut belongs to neither part
            start, end = min(spans, key=lambda span: abs(span[0] - wanted))
            break
    head, tail = text[:start], text[end:]
    if not head.strip() or not tail.strip():
        raise UserError(f"{document.source} is the only document, and too short to be cut in two")
    return Document(head, document.source), Document(tail, document.source)


def cut_note(cuts: Sequence[tuple[str, int, int]], n_texts: int) -> list[str]:
    """One line on documents that were cut, in a corpus of `n_texts` different texts; none where there are none.

    `cuts`: of each its file, the characters of its last part, and all of its characters.
    """
    if not cuts:
        return []
    parts = [f"{last:,} of {whole:,} characters" for _, last, whole in cuts]
    if n_texts == 1:
        return [f"only one document: its last {parts[0]} are the validation part"]
    named = [f"{file} ({part})" for (file, _, _), part in zip(cuts, parts, strict=True)]
    large = counted(len(cuts), "large document is", "large documents are")
    return [f"{large} cut at a paragraph, and the last part validates: {listed(named, 3)}"]
