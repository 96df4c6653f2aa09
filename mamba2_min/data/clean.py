"""What is removed from a file before it is trained on: control characters, front matter, pictures in base64.

Everything else of a text stays as it is, to the last space.
"""

from __future__ import annotations

import re

LONG = 1000  # characters without white space: not a word, but it may be the user's text, so it is only reported

_SLICE = 1 << 20  # characters that are searched at a time

_CONTROL = re.compile(
    r"""
      \x1b\[[0-?]*[ -/]*[@-~]                  # a terminal's colours and cursor movements
    | \x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?       # its titles and links
    | [^\n]\x08                                # a letter typed over, as in pages of a manual
    | [\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]
    | [\ud800-\udfff]                          # half of a character, from JSON with a broken escape
    """,
    re.VERBOSE,
)
_ANY_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# What bytes 0x80 to 0x9f mean in Windows-1252. As characters they come from text that was decoded as Latin-1.
_WINDOWS = {value: bytes([value]).decode("cp1252", errors="ignore") for value in range(0x80, 0xA0)}

_YAML_LINE = r"(?:[\w\"'][^\n:]*:(?:[ \t][^\n]*)?|[ \t]+[^\n]*|-(?:[ \t][^\n]*)?|\#[^\n]*|[\]}][^\n]*|[ \t]*)\n"
_FRONT_MATTER = re.compile(
    rf"""
      ---[ \t]*\n (?=(?:[ \t]*\n|\#[^\n]*\n)*[\w"'][^\n:]*:) (?:{_YAML_LINE})*? (?:---|\.\.\.)[ \t]*(?:\n|\Z)
    | \+\+\+[ \t]*\n (?=[^\n]*=|[ \t]*\[|\#) (?:[^\n]*\n)*? \+\+\+[ \t]*(?:\n|\Z)       # TOML
    """,
    re.VERBOSE,
)

_LETTERS = r"[A-Za-z0-9+/]"  # the alphabet of base64
_DATA = (
    rf"data:[\w.+-]{{1,40}}/[\w.+-]{{1,80}}(?:;[\w.=+-]{{1,80}}){{0,5}};base64,[A-Za-z0-9+/=_%-]*"
    rf"(?:\s+{_LETTERS}{{60,}}={{0,2}})*(?:\s+{_LETTERS}+={{1,2}})?"
)
_PICTURE = re.compile(
    rf"""
      !\[[^\]\n]{{0,500}}\]\(\s*<?{_DATA}>?(?:\s+"[^"\n]{{0,500}}")?\s*\)      # ![a picture](data:...)
    | ^[ ]{{0,3}}\[[^\]\n]{{1,500}}\]:[ \t]*<?{_DATA}>?[ \t]*\n?                # [a picture]: <data:...>
    | <img\b[^>]{{0,500}}?{_DATA}[^>]{{0,500}}>
    | {_DATA}
    """,
    re.VERBOSE | re.MULTILINE,
)
# The rest of a block, which is no word: it has digits or signs.
_LAST_LINE = rf"[ \t>]*(?=[^\n]*[0-9+/=])(?:{_LETTERS}{{4}})*{_LETTERS}{{0,3}}={{0,2}}[ \t]*$"
_BASE64 = re.compile(
    rf"""
      (?<![\w+/-])[\w+/-]{{500,}}={{0,2}}                                       # on one line
    | (?:^[ \t>]*{_LETTERS}{{60,100}}[ \t]*\n){{5,}}(?:{_LAST_LINE})?
    """,
    re.VERBOSE | re.MULTILINE | re.ASCII,
)
_UNBROKEN = re.compile(rf"[!-~]{{{LONG},}}")


def fold_controls(text: str) -> tuple[str, int]:
    """`text` without control characters, and how many places were changed.

    Line ends of every system become "\\n". A form feed becomes an empty line, a vertical tab a line end, and
    U+0080 to U+009F the signs that they are in Windows-1252. Line ends and tabs stay; the others are dropped.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not _ANY_CONTROL.search(text):
        return text, 0
    pages = text.split("\f")
    text = "\n\n".join([*(page.rstrip(" \t\n") for page in pages[:-1]), pages[-1]])
    text, count = _CONTROL.subn(_folded, text)
    return text, count + len(pages) - 1


def _folded(match: re.Match[str]) -> str:
    found = match[0]
    if len(found) > 1:
        return ""
    if found == "\v":
        return "\n"
    code = ord(found)
    return "\ufffd" if code >= 0xD800 else _WINDOWS.get(code, "")


def strip_front_matter(text: str) -> str:
    """`text` without the block of YAML or TOML that a note may begin with. A line of dashes alone is no such block."""
    if not text.startswith(("---", "+++")):
        return text
    block = _FRONT_MATTER.match(text)
    return text[block.end() :] if block else text


def drop_base64(text: str) -> tuple[str, int, int]:
    """`text` without data in base64, such as pasted pictures; how many there were, and their characters.

    Recognised are `data:` addresses, with the Markdown or HTML around them, and what has capitals, small letters and
    digits in 500 characters without a space or in five full lines.
    """
    count = size = 0

    def drop(match: re.Match[str]) -> str:
        nonlocal count, size
        found = match[0]
        if "base64," not in found and not all(re.search(kind, found) for kind in ("[A-Z]", "[a-z]", "[0-9]")):
            return found
        count, size = count + 1, size + len(found)
        return ""

    if "base64," in text:
        text = _PICTURE.sub(drop, text)
    return _BASE64.sub(drop, text), count, size


def longest_string(text: str) -> int:
    """The length of the longest string without white space, up to LONG: beyond that it may be more."""
    return max(
        max(map(len, text[start : start + _SLICE + LONG].split()), default=0)
        for start in range(0, max(len(text), 1), _SLICE)
    )


def count_unbroken(text: str) -> int:
    """How many strings of LONG or more ASCII characters without white space are in `text`."""
    return len(_UNBROKEN.findall(text))
