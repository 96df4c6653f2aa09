"""Text that is safe to show: an escape takes the place of every character that would change a screen invisibly.

The rules go by Unicode property:

    category Cc Cf Cs Co Zl Zp    shown as an escape such as \\u202e: control and format characters, surrogates,
                                  private use, line and paragraph separators
    category Cn                   noncharacters and unassigned code points too; those reserved for pictographs and
                                  ideographs stay, since a newer Unicode may have assigned them
    Default_Ignorable             shown as an escape: tags, variation selectors, blank Hangul letters, and all else that
                                  has no glyph of its own
    category M, conjoining jamo   at most MOST_MARKS follow each other; the rest of the heap is cut
    Prepended_Concatenation_Mark  stay, though of category Cf: signs that enclose numbers, as in Arabic

What ordinary writing needs stays where it has a meaning, one at a time: joiners after a letter of a script that joins
its letters or after an emoji, a zero-width space in scripts without spaces, a variation selector after an emoji, an
ideograph, a mathematical sign or a Mongolian letter, and the three flags that are spelled in tags.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

MOST_MARKS = 8  # Hebrew, Burmese and Tibetan reach six

_PLAIN, _MARK, _HIDDEN, _DEPENDS = range(4)
_HIDDEN_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
# Default_Ignorable_Code_Point, from the Unicode Character Database; `unicodedata` does not offer it.
_IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_PREPENDED = re.compile("[\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd]")
_RESERVED = re.compile("[\U0001f000-\U0001faff\U00020000-\U0003fffd]")
_CONJOINING_JAMO = re.compile("[\u1161-\u11ff\ud7b0-\ud7fb]")  # vowels and finals: drawn onto what is before them

_ZWSP, _ZWNJ, _ZWJ, _MVS = "\u200b", "\u200c", "\u200d", "\u180e"
_TEXT_STYLE, _EMOJI_STYLE, _KEYCAP, _BLACK_FLAG = "\ufe0e", "\ufe0f", "\u20e3", "\U0001f3f4"
_FLAGS = tuple("".join(chr(0xE0000 + ord(c)) for c in name + "\x7f") for name in ("gbeng", "gbsct", "gbwls"))
_FLAG_END = "\U000e007f"
_OTHER_EMOJI = "\u203c\u2049\u3030\u303d"  # emoji that are punctuation by category
# Scripts that join their letters, and scripts that are written without spaces, by the first word of a letter's name.
_JOINING = frozenset(
    re.findall(
        r"\w+",
        "ARABIC SYRIAC THAANA MANDAIC NKO MONGOLIAN DEVANAGARI BENGALI GURMUKHI GUJARATI ORIYA TAMIL TELUGU KANNADA"
        " MALAYALAM SINHALA TIBETAN MYANMAR KHMER BALINESE JAVANESE SUNDANESE CHAKMA MEETEI TAI LEPCHA LIMBU ADLAM",
    )
)
_WITHOUT_SPACES = {"THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "TAI", "NEW"}
_MAY_DEPEND = re.compile(f"[{_ZWSP}{_ZWNJ}{_ZWJ}{_MVS}\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0020-\U000e01ef]")


def printable(text: str, keep: str = "") -> str:
    """`text` with an escape for every character that would change a screen invisibly; see the top of this file.

    `keep` lists control characters to leave as they are, such as "\\n\\t" where lines are wanted.
    """
    return Printer(keep).feed(text)


def visible(text: str, keep: str = "\n\t") -> str:
    """As `printable`, but these characters are left out."""
    return Printer(keep, lambda c: "").feed(text)


def one_line(text: object, most: int = 200) -> str:
    """`text` on one line of at most `most` characters, for messages that quote what somebody else wrote."""
    line = " ".join(visible(str(text)[: 20 * most], keep="\n\t").split())
    return line if len(line) <= most else line[: most - 1] + "…"


def without_invisible(text: str) -> str:
    """`text` without any character that has no glyph of its own, wherever it stands; white space stays."""
    text = _IGNORABLE.sub("", text)
    if "".join(text.split()).isprintable():
        return text
    return "".join(c for c in text if c.isspace() or _kind(c) != _HIDDEN)


_ESCAPE_SEQUENCE = re.compile(
    r"\x9b[0-?]*[ -/]*[@-~]|\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])"
)
_LINE_END = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def folded(text: str) -> str:
    """`text` as a file should hold it: every line end is \\n, no other control characters than tabs, valid Unicode.

    A terminal's control sequence (ESC [ ... letter, ESC ] ... BEL) is removed as a whole.
    """
    text = _CONTROL.sub("", _LINE_END.sub("\n", _ESCAPE_SEQUENCE.sub("", text)))
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


class Printer:
    """Makes a text printable piece by piece, as a model writes it. What is kept depends on the characters before."""

    def __init__(self, keep: str = "", hide: Callable[[str], str] | None = None):
        """keep: control characters that stay. hide: what to show in place of a hidden character (its escape)."""
        self._keep, self._common = keep, _common(keep)
        self._hide = hide or (lambda c: c.encode("unicode_escape").decode())
        self._last = ""  # the last character that was let through
        self._marks = 0  # how many of the last ones were marks

    def feed(self, text: str) -> str:
        """The next piece of the text, made printable."""
        if self._common.fullmatch(text):  # most texts, in a hundredth of the time
            self._last, self._marks = text[-1:] or self._last, 0 if text else self._marks
            return text
        pieces, at = [], 0
        while at < len(text):
            piece, read = self._next(text, at)
            pieces.append(piece)
            at += read
        return "".join(pieces)

    def _next(self, text: str, at: int) -> tuple[str, int]:
        """What to show for the character at `at`, and how many characters that takes from the text."""
        c = text[at]
        kind = _PLAIN if c in self._keep else _kind(c)
        if kind == _MARK:
            self._marks += 1
            if self._marks > MOST_MARKS:
                return "", 1
        elif kind == _DEPENDS:
            if self._last == _BLACK_FLAG and text.startswith(_FLAGS, at):
                c = text[at : at + len(_FLAGS[0])]
            elif not _fits(self._last, c, text[at + 1 : at + 2]):
                kind = _HIDDEN
        if kind == _PLAIN:
            self._marks = 0
        if kind != _HIDDEN:
            self._last = c[-1]
            return c, len(c)
        shown = self._hide(c)
        if shown:
            self._last, self._marks = shown[-1], 0
        return shown, 1


@lru_cache
def _common(keep: str) -> re.Pattern[str]:
    """Matches texts that consist of common letters and signs, and of `keep`: no marks, nothing invisible."""
    return re.compile(
        f"[{re.escape(keep)}\x20-\x7e\xa0-\xac\xae-\u02ff\u0400-\u0482\u048a-\u052f\u2010-\u2027\u2030-\u205e\u20a0-\u20bf"
        "\u3001-\u3029\u3041-\u3096\u30a0-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff01-\uff5e]*"
    )


@lru_cache(maxsize=1 << 16)
def _kind(c: str) -> int:
    if _MAY_DEPEND.match(c):
        return _DEPENDS
    if _IGNORABLE.match(c):
        return _HIDDEN
    category = unicodedata.category(c)
    if category in _HIDDEN_CATEGORIES:
        reserved = category == "Cn" and _RESERVED.match(c) and ord(c) & 0xFFFE != 0xFFFE
        return _PLAIN if reserved or _PREPENDED.match(c) else _HIDDEN
    return _MARK if category[0] == "M" or _CONJOINING_JAMO.match(c) else _PLAIN


def _fits(last: str, c: str, following: str) -> bool:
    """Whether an invisible character has a meaning after `last`."""
    if not last:
        return False
    category, script = unicodedata.category(last), unicodedata.name(last, "").partition(" ")[0]
    emoji = category in ("So", "Cn") or last in _OTHER_EMOJI or "\U0001f3fb" <= last <= "\U0001f3ff"  # skin tones
    letter = category[0] in "LM"
    if c in (_ZWJ, _ZWNJ):
        joins = letter and script in _JOINING
        return joins or (c == _ZWJ and (emoji or last in (_EMOJI_STYLE, _KEYCAP) or last == _FLAG_END))
    if c == _ZWSP:
        return letter and script in _WITHOUT_SPACES
    if c == _MVS or "\u180b" <= c <= "\u180f":
        return letter and script == "MONGOLIAN"
    if c in (_TEXT_STYLE, _EMOJI_STYLE):
        return emoji or category == "Sm" or (following == _KEYCAP and last in "0123456789#*")
    if c == "\ufe00" and (category == "Sm" or script == "MYANMAR"):
        return True
    return script == "CJK" and letter and (c <= "\ufe02" or c >= "\U000e0100")
