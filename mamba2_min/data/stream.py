"""Documents as one stream of numbers, cut into pieces once, before there is a vocabulary.

A piece is a word, a sign or white space (`WordTokenizer.pieces`). Each distinct piece gets a number when it is first
seen, and a document is kept as these numbers. The counts of pieces in the training part decide which of them are words
of the vocabulary; then one table maps the numbers to tokens. So every text is cut into pieces only once, which is the
expensive part, and the text itself is not kept.
"""

from __future__ import annotations

import itertools
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from mamba2_min.data.tokenizer import WordTokenizer, bytes_outside

_END = ""  # the piece after a document
_BLOCK = 1 << 20  # pieces that are looked up at a time
_LENGTH = 1 << 20  # characters of a document that are cut into pieces at a time
# A place at which every pattern begins a new piece, so that a long text may be cut there first.
_BREAK = re.compile(r"(?<=\n)(?=\S)|(?<=\S)(?= \S)")


class Span(NamedTuple):
    """Where a document stands in the stream: pieces `start` to `stop`, its end included.

    `n_bytes`: UTF-8 bytes of the text, and 1 for an end that is a token of its own, as if it were the one byte between
    two documents. `n_words`: as white space separates them.
    """

    start: int
    stop: int
    n_bytes: int
    n_words: int


class _Numbers(dict[str, int]):
    """Numbers for pieces, in the order in which they are first asked for."""

    def __missing__(self, piece: str) -> int:
        self[piece] = number = len(self)
        return number


class PieceStream:
    """Documents as numbers of pieces, as `tokenizer` cuts them; its vocabulary does not matter yet."""

    def __init__(self, tokenizer: WordTokenizer):
        self._cut = tokenizer
        self._numbers = _Numbers({_END: 0})
        self._stream = array("i")
        self._found: tuple[WordTokenizer, tuple[np.ndarray, ...]] | None = None
        self._may_break = not any(re.search(r"\s", word) for word in tokenizer.special_words)

    def add(self, text: str, progress: Callable[[int], object] = lambda characters: None) -> Span:
        """Appends a document. `progress` is called with the characters of each part of it that is done."""
        start, number = len(self._stream), self._numbers.__getitem__
        n_bytes = n_words = 0
        for part in _parts(text) if self._may_break else [text]:
            self._stream.extend(map(number, self._cut.pieces(part, allow_special=True)))
            n_bytes += len(part.encode())
            n_words += len(part.split())
            progress(len(part))
        if not (self._cut.pattern == "whitespace" and text.endswith("\n")):  # there, a line end ends a document too
            self._stream.append(0)
            n_bytes += 1
        return Span(start, len(self._stream), n_bytes, n_words)

    def counts(self, spans: Iterable[Span]) -> dict[str, int]:
        """How often each piece occurs in these documents; without the ends."""
        counts = np.zeros(len(self._numbers), dtype=np.int64)
        for block in self._blocks(spans):
            counts += np.bincount(block, minlength=len(counts))
        return {piece: count for piece, count in zip(self._numbers, counts.tolist(), strict=True) if piece and count}

    def tokens(self, spans: Iterable[Span], tokenizer: WordTokenizer) -> np.ndarray:
        """The documents as ids of a vocabulary that cuts texts in the same way: (l,) int32."""
        spans = list(spans)
        ids, firsts, lengths, _ = self._look_up(tokenizer)
        tokens = np.empty(sum(int(lengths[block].sum()) for block in self._blocks(spans)), dtype=np.int32)
        done = 0
        for block in self._blocks(spans):
            n = lengths[block]
            ends = np.cumsum(n)
            # The position of each token in `ids`: where its piece begins there, and its offset within the piece.
            at = np.repeat(firsts[block] - ends + n, n) + np.arange(ends[-1])
            tokens[done : done + ends[-1]] = ids[at]
            done += int(ends[-1])
        return tokens

    def lengths(self, spans: Iterable[Span], tokenizer: WordTokenizer) -> list[int]:
        """How many tokens each document has."""
        _, _, lengths, _ = self._look_up(tokenizer)
        stream = np.frombuffer(self._stream, dtype=np.int32)
        return [int(lengths[stream[span.start : span.stop]].sum()) for span in spans]

    def outside(self, spans: Iterable[Span], tokenizer: WordTokenizer) -> list[int]:
        """The bytes of each document that are in no word of a vocabulary: spelled byte by byte, or unknown."""
        _, _, _, outside = self._look_up(tokenizer)
        stream = np.frombuffer(self._stream, dtype=np.int32)
        return [int(outside[stream[span.start : span.stop]].sum()) for span in spans]

    def _look_up(self, tokenizer: WordTokenizer) -> tuple[np.ndarray, ...]:
        """The ids of all pieces, joined; and for each piece the position of its first id, how many there are, and its
        bytes that are in no word. Kept for the next call with the same vocabulary and no new pieces."""
        if not self._found or self._found[0] is not tokenizer or len(self._found[1][1]) != len(self._numbers):
            ids = [[tokenizer.eos_id], *map(tokenizer.piece_ids, itertools.islice(self._numbers, 1, None))]
            lengths = np.array([len(each) for each in ids])
            outside = [0, *(bytes_outside(tokenizer, piece) for piece in itertools.islice(self._numbers, 1, None))]
            flat = np.array([i for each in ids for i in each], dtype=np.int32)
            self._found = (tokenizer, (flat, np.cumsum(lengths) - lengths, lengths, np.array(outside)))
        return self._found[1]

    def _blocks(self, spans: Iterable[Span]) -> Iterator[np.ndarray]:
        """The numbers in these spans, one after the other, in arrays that are not too long and not empty."""
        stream = np.frombuffer(self._stream, dtype=np.int32)
        parts, length = [], 0
        for first, last in _joined(spans):
            for start in range(first, last, _BLOCK):
                parts.append(stream[start : min(start + _BLOCK, last)])
                length += len(parts[-1])
                if length >= _BLOCK:
                    yield np.concatenate(parts)
                    parts, length = [], 0
        if parts:
            yield np.concatenate(parts)


def _parts(text: str) -> Iterator[str]:
    """A text in parts of about _LENGTH characters, which have the same pieces as the whole."""
    start = 0
    while match := _BREAK.search(text, start + _LENGTH):
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]


def _joined(spans: Iterable[Span]) -> Iterator[tuple[int, int]]:
    """(start, stop) of spans, adjacent ones merged."""
    first = last = 0
    for span in spans:
        if span.start != last:
            if last > first:
                yield first, last
            first = span.start
        last = span.stop
    if last > first:
        yield first, last
