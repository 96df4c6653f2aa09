"""Bytes to text: by a mark, as UTF-8, in a named encoding; and what a file that is none of these may be."""

from __future__ import annotations

import codecs
import re
from typing import NamedTuple

from mamba2_min.errors import UserError

_MARKS = (  # the mark of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_BEGINNINGS = (
    (b"%PDF-", "a PDF"),
    (b"PK\x03\x04", "a ZIP archive, such as EPUB or DOCX"),
    (b"\xd0\xcf\x11\xe0", "an old Office document"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"SQLite format 3\0", "a database"),
)
_SAMPLE = 1 << 16  # bytes that are looked at to say what a file is
_ASCII_TEXT = bytes(code for code in range(127) if code >= 32 or code in b"\t\n\v\f\r")
_CONTROLS = bytes(code for code in range(32) if code not in b"\t\n\v\f\r\x1b")
_USUAL = re.compile("[\\s -~\u00a0-\u05ff\u2010-\u2027\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff00-\uffef]")
_UNDEFINED = b"\x81\x8d\x8f\x90\x9d"  # in Windows-1252


class Guess(NamedTuple):
    """What a file seems to be: `name` for people, and the Python `codec` that would read it, "" where there is none.

    `is_text` is False for what no encoding would turn into text.
    """

    name: str
    codec: str = ""
    is_text: bool = True


class Undecodable(Exception):
    """A file is not in the expected encoding. The message says at which byte; `guess` says what it may be."""

    def __init__(self, reason: str, guess: Guess):
        super().__init__(reason)
        self.guess = guess


def check_encoding(name: str) -> None:
    """Raises UserError unless Python knows an encoding of text by this name."""
    try:
        "a".encode(name)
        b"a".decode(name, errors="replace")
    except (LookupError, ValueError) as error:
        raise UserError(
            f"there is no encoding {name!r}; common ones are cp1252, cp1251, latin-1, utf-16-le, shift_jis, gb18030"
        ) from error


def decode(content: bytes, encoding: str | None = None, partial: bool = False) -> str:
    """The text of a file. With `partial` the bytes may end within a character, which is left out.

    A byte-order mark decides. Without one, valid UTF-8 is UTF-8, and anything else is `encoding`. Raises Undecodable if
    it is neither, and for valid UTF-8 that is clearly UTF-16 without its mark or not text: a PDF may consist of ASCII
    characters only, and in `encoding` any bytes may be text.
    """
    if guess := _by_beginning(content):
        raise Undecodable(f"it begins with {content[:5]!r}", guess)
    for mark, codec in _MARKS:
        if content.startswith(mark):
            return decode_as(content, codec, partial, len(mark))
    try:
        text = decode_as(content, "utf-8", partial)
        # Seven-bit data is always valid UTF-8: UTF-16 in Latin letters, and the escapes of ISO-2022.
        if encoding and ("\x1b" in text or ("\0" in text and _not_text(content))):
            text = decode_as(content, encoding, partial)
    except Undecodable:
        if not encoding:
            raise
        text = decode_as(content, encoding, partial)
    if "\0" in text and (guess := _not_text(content)):
        raise Undecodable("it has zero bytes between its letters", guess)
    return text


def decode_as(content: bytes, codec: str, partial: bool = False, start: int = 0) -> str:
    """The text of the bytes from `start` on, in one encoding. Raises Undecodable."""
    text = memoryview(content)[start:]
    try:
        return str(text, codec)
    except UnicodeDecodeError as error:
        if partial and error.start >= len(text) - 4:
            return str(text[: error.start], codec)
        at = start + error.start
        raise Undecodable(f"byte 0x{content[at]:02X} at offset {at:,}", identify(content)) from None


def advice(guess: Guess) -> str:
    """What a file seems to be, and what its owner can do."""
    if guess.codec:
        return f"{guess.name} (add --encoding {guess.codec}, or save as UTF-8)"
    return f"{guess.name} ({'save as UTF-8' if guess.is_text else 'convert to text'}, or take out of the folder)"


def identify(content: bytes) -> Guess:
    """What a file that is not UTF-8 may be, from its bytes."""
    return _by_beginning(content) or _not_text(content) or _damaged(content) or _eight_bit(content)


def _by_beginning(content: bytes) -> Guess | None:
    return next((Guess(name, is_text=False) for beginning, name in _BEGINNINGS if content.startswith(beginning)), None)


def _not_text(content: bytes) -> Guess | None:
    """UTF-16 or UTF-32 without a mark, recognised by its zero bytes, or a file that is not text."""
    sample = content[:_SAMPLE]
    zeros = [sample[k::4].count(0) for k in range(4)]
    quarter, half, total = max(len(sample) // 4, 1), max(len(sample) // 2, 1), sum(zeros)
    for places, order in (((2, 3), "little"), ((0, 1), "big")):
        if len(sample) >= 8 and min(zeros[k] for k in places) > 0.95 * quarter and total < 0.9 * len(sample):
            return Guess(f"UTF-32 ({order}-endian) without a mark", f"utf-32-{order[0]}e")
    # Few zero bytes are UTF-16 only beside bytes that ASCII text does not have; otherwise they are stray NULs.
    foreign = len(sample.translate(None, _ASCII_TEXT)) - total > 0.05 * len(sample)
    for places, order in (((1, 3), "little"), ((0, 2), "big")):
        here = sum(zeros[k] for k in places)
        if here >= 0.95 * total and (here > 0.3 * half or (foreign and here > max(8, 0.02 * half))):
            return Guess(f"UTF-16 ({order}-endian) without a mark", f"utf-16-{order[0]}e")
    if len(sample) - len(sample.translate(None, _CONTROLS)) <= 0.05 * len(sample):
        return None
    if not foreign:
        return Guess("a binary file", is_text=False) if total > 0.3 * len(sample) else None
    for order in ("little", "big"):  # in Chinese, few characters have a zero byte
        text = sample[: half * 2].decode(f"utf-16-{order[0]}e", errors="replace")
        if sum(bool(_USUAL.match(char)) for char in text) > 0.9 * len(text):
            return Guess(f"UTF-16 ({order}-endian) without a mark", f"utf-16-{order[0]}e")
    return Guess("a binary file", is_text=False)


def _damaged(content: bytes) -> Guess | None:
    """UTF-8 with a few bad bytes: most of its multi-byte characters are valid."""
    text = content[:_SAMPLE].decode("utf-8", errors="replace")
    bad = text.count("\ufffd")
    return Guess("damaged UTF-8") if sum(char > "\x7f" for char in text) > 3 * bad else None


def _eight_bit(content: bytes) -> Guess:
    """An encoding of one byte per letter, guessed from how many letters are not ASCII, and which."""
    sample = content[:_SAMPLE]
    high = [byte for byte in sample if byte >= 0x80]
    if len(high) < 0.3 * len(sample):
        if any(byte in sample for byte in _UNDEFINED):
            return Guess("an encoding other than UTF-8")
        return Guess("Windows-1252", "cp1252")
    letters = sum(byte >= 0xC0 for byte in high)
    if letters > 0.95 * len(high):  # small letters are the frequent ones
        small = sum(byte >= 0xE0 for byte in high)
        return Guess("Windows-1251", "cp1251") if small > letters / 2 else Guess("KOI8-R", "koi8-r")
    return Guess("an encoding other than UTF-8, such as Shift-JIS or GB18030")
