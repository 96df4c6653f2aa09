"""Typed text in the spelling that a vocabulary knows.

One word may have two spellings: a book has don’t where a keyboard gives don't, and é is one character or two. A
spelling that was not in the training text would be read byte by byte. Only typed text is folded, never documents.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection

_CHUNK = re.compile(r"\s*\S+|\s+")  # a word with the white space before it
_HAS_VARIANTS = re.compile(r"[^\x00-\x7f]|['\"`]|--|\.\.\.")
_STRAIGHT = str.maketrans(
    {
        **dict.fromkeys("‘’‛ʼ′´`", "'"),  # the last three stand where a keyboard has no apostrophe
        **dict.fromkeys("“”„‟″", '"'),
        **dict.fromkeys("\u00a0\u2009\u202f", " "),
        "…": "...",
        "—": "--",
    }
)
_OPENING = re.compile(r"(?<![^\s(\[{—])['\"]+")  # quotes at the start of a word
_TO_OPENING, _TO_CLOSING = str.maketrans("'\"", "‘“"), str.maketrans("'\"", "’”")


def fold(text: str, unknown: Callable[[str], list[str]]) -> str:
    """`text` with each word in its best known spelling, if there is exactly one; otherwise as it was typed.

    unknown(word) gives the parts of a word, with the white space before it, that the vocabulary does not have.
    """
    return "".join(_fold_word(word, unknown) if _HAS_VARIANTS.search(word) else word for word in _CHUNK.findall(text))


def unknown_pieces(cut: Callable[[str], list[str]], words: Collection[str]) -> Callable[[str], list[str]]:
    """The function that `fold` takes, for a vocabulary: `cut` gives the pieces of a text, `words` are those known.

    A single ASCII character is always known, for bytes are tokens; a quote only if a word of the vocabulary has it.
    """

    def unknown(text: str) -> list[str]:
        pieces = [piece for piece in cut(text) if piece not in words]
        return [piece for piece in pieces if len(piece) > 1 or not piece.isascii() or piece in missing]

    missing = {quote for quote in "'\"" if not any(quote in word for word in words)}
    return unknown


def spellings(word: str) -> set[str]:
    """The other ways to write a word: straight or curly quotes, dots and dashes, composed (NFC) or decomposed (NFD)."""
    straight = word.translate(_STRAIGHT)
    curly = straight.replace("...", "…").replace("--", "—")
    opened = _OPENING.sub(lambda quotes: quotes[0].translate(_TO_OPENING), curly)
    forms = {word, straight, curly.translate(_TO_CLOSING), opened.translate(_TO_CLOSING)}
    return {*forms, *(unicodedata.normalize(form, one) for one in forms for form in ("NFC", "NFD"))} - {word}


def _fold_word(word: str, unknown: Callable[[str], list[str]]) -> str:
    def size(spelling: str) -> int:  # of what is unknown, the same in every spelling of it
        return sum(len(unicodedata.normalize("NFD", part.translate(_STRAIGHT))) for part in unknown(spelling))

    least = size(word)
    sizes = {spelling: size(spelling) for spelling in spellings(word)} if least else {}
    best = min(sizes.values(), default=least)
    known = [spelling for spelling in sizes if sizes[spelling] == best]
    return known[0] if best < least and len(known) == 1 else word
