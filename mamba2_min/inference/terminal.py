"""Text at a terminal: made harmless, wrapped at words, typed and pasted."""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import unicodedata
from pathlib import Path
from typing import Any

from mamba2_min.printable import Printer

BOLD, DIM = "\033[1m", "\033[2m"
_LONG_WORD = 40  # characters: a word that grows beyond them is shown as it comes
# A line can be broken between any two of these: a line end, white space, a sign of a script without spaces, a word.
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_PIECE = re.compile(rf"\n|[^\S\n]+|[{_IDEOGRAPH}]|[^\s{_IDEOGRAPH}]+")


def is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()


def styled(text: str, style: str) -> str:
    """`text` in a style, where standard output is a terminal that has styles."""
    plain = not is_terminal(sys.stdout) or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return text if plain or not (text and style) else f"{style}{text}\033[0m"


class WrappedText:
    """Writes a text to the terminal as it grows, and breaks its lines between words instead of at the edge.

    A word is held back until its end is known. Control characters are written as escapes.
    """

    def __init__(self) -> None:
        self._printer = Printer(keep="\n\t")  # one for all pieces: what stays depends on what was before
        self._column = 0
        self._space = self._word = ""  # what is held back: white space and the word after it

    def write(self, text: str, style: str = "") -> None:
        columns, ready = _columns(), ""
        for piece in _PIECE.findall(self._printer.feed(text)):
            alone = piece.isspace() or _IDEOGRAPHS.match(piece)
            if alone or len(self._word) > _LONG_WORD:
                ready += self._release_word(columns)
            if piece == "\n":
                ready, self._space, self._column = ready + self._space + piece, "", 0
            elif piece.isspace():
                self._space += piece
            else:
                self._word += piece
        if style or not columns:
            ready += self._release_word(columns)
        _put(styled(ready, style))

    def finish(self) -> None:
        """Writes what was held back."""
        _put(self._release_word(_columns()) + self._space)
        self._space = ""

    def _release_word(self, columns: int) -> str:
        """The word, if there is one, after its white space, or after a line end if it would cross the edge."""
        if not self._word:
            return ""
        width = _width(self._word)
        end = self._column + _width(self._space) + width
        space, self._space, word, self._word = self._space, "", self._word, ""
        if columns and self._column and end > columns >= width:
            self._column = width
            return "\n" + word
        self._column = (end - 1) % columns + 1 if columns else end
        return space + word


_IDEOGRAPHS = re.compile(f"[{_IDEOGRAPH}]")


def _put(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _columns() -> int:
    """The terminal's width, or 0 where it has none."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError, AttributeError):
        return 0


def _width(text: str) -> int:
    """The columns that `text` takes."""
    return sum(
        0 if unicodedata.combining(c) else 8 if c == "\t" else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


class LineEditor:
    """Reads prompts with arrow keys and a history that is kept between sessions, where the system supports them.

    Several lines that are pasted are one prompt. The terminal marks what is pasted where it can (bracketed paste), and
    the line editor puts it together. Without such marks, lines that arrive at the same moment belong together.
    """

    def __enter__(self) -> LineEditor:
        self._readline, self._marks_pastes = None, False
        with contextlib.suppress(ImportError):
            import readline

            self._readline = readline
            self._marks_pastes = "libedit" not in (readline.__doc__ or "") and os.environ.get("TERM", "dumb") != "dumb"
            if self._marks_pastes:
                readline.parse_and_bind("set enable-bracketed-paste on")
            with contextlib.suppress(OSError):
                readline.read_history_file(_history_file())
            readline.set_history_length(1000)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._readline:
            with contextlib.suppress(OSError):
                file = _history_file()
                file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._readline.write_history_file(file)

    def read(self, prompt: str) -> str:
        """What is typed or pasted up to Enter, with line ends within a paste. Raises EOFError at the end of input."""
        lines = [input(prompt)]
        if not self._marks_pastes and not lines[0].startswith("/"):  # commands may well be typed ahead
            while _input_waits():
                lines.append(input())
        return "\n".join(lines)


def _history_file() -> Path:
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(home, "mamba2-min", "history")


def _input_waits() -> bool:
    if os.name != "posix" or not is_terminal(sys.stdin):
        return False
    try:
        return bool(select.select([sys.stdin], [], [], 0.05)[0])
    except (OSError, ValueError):
        return False
