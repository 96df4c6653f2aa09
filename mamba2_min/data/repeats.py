"""Paragraphs that several documents have word for word: a licence, a header, a signature.

If they are on both sides of a split, validation looks better than it is; and a model memorizes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from mamba2_min.data.findings import counted

DOCUMENTS = 3  # a paragraph in this many documents is a repeat
LENGTH = 40  # characters; shorter ones, such as "Chapter 3", repeat in any text

_EMPTY_LINE = re.compile(r"\n[^\S\n]*\n\s*")
_LINE_END = re.compile("\n")


class Repeats:
    """Counts the paragraphs of documents. One that is in DOCUMENTS of them or more is a repeat.

    A paragraph ends at an empty line; in a document without one, at each line end. Of a paragraph only a hash is kept.
    """

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}  # documents that have a paragraph, by its hash
        self._repeated: dict[int, tuple[int, str]] = {}  # bytes and beginning of those that are repeats

    def add(self, text: str) -> None:
        seen, here = self._seen, set()
        for paragraph in _paragraphs(text):
            if len(paragraph) < LENGTH or (at := hash(paragraph)) in here:
                continue
            here.add(at)
            seen[at] = count = seen.get(at, 0) + 1
            if count == DOCUMENTS:
                self._repeated[at] = (len(paragraph.encode()), paragraph[:40])

    def without(self, text: str) -> str:
        """`text` without its repeats."""
        if not any(self._is_repeat(paragraph) for paragraph in _paragraphs(text)):
            return text
        sign = "\n\n" if _EMPTY_LINE.search(text) else "\n"
        return sign.join(paragraph for paragraph in _paragraphs(text) if not self._is_repeat(paragraph))

    def notes(self, dropped: bool) -> list[str]:
        """One line on what was found; none where nothing was."""
        if not self._repeated:
            return []
        places = {at: self._seen[at] for at in self._repeated}
        size = sum(places[at] * n_bytes for at, (n_bytes, _) in self._repeated.items())
        most = max(places, key=lambda at: (places[at], self._repeated[at]))
        example = f'"{" ".join(self._repeated[most][1].split())}..." in {places[most]:,}'
        done = "left out" if dropped else "--drop-repeats leaves them out"
        found = counted(len(places), "paragraph")
        return [f"{found} in {DOCUMENTS} or more documents each, {size:,} bytes, such as {example}: {done}"]

    def _is_repeat(self, paragraph: str) -> bool:
        return len(paragraph) >= LENGTH and hash(paragraph) in self._repeated


def _paragraphs(text: str) -> Iterator[str]:
    """The paragraphs, one at a time: a text may take a good part of the memory."""
    end = _EMPTY_LINE if _EMPTY_LINE.search(text) else _LINE_END
    start = 0
    for match in end.finditer(text):
        yield text[start : match.start()].strip()
        start = match.end()
    yield text[start:].strip()
