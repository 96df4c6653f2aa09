"""Text at a terminal: made harmless, wrapped at words, typed and pasted."""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
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


def styled(text: str, style: str, stream: Any = None) -> str:
    """`text` in a style, where `stream` (sys.stdout), to which it goes, is a terminal that has styles."""
    plain = not _obeys(sys.stdout if stream is None else stream) or os.environ.get("NO_COLOR")
    return text if plain or not (text and style) else f"{style}{text}\033[0m"


def remark(text: str = "", indent: int = 0) -> None:
    """Prints what the program itself says, in grey: line by line, so that no style goes on over a line's end.

    A line that is longer than the terminal goes on after `indent` spaces.
    """
    for long in text.split("\n"):
        for line in wrapped(long, "", " " * indent).split("\n"):
            print(styled(line, DIM))


def wrapped(text: str, first: str, rest: str, stream: Any = None) -> str:
    """`first` and one line of text, broken between words where the terminal ends; later lines begin with `rest`.

    `stream` (sys.stdout) is where it will be written. Where that is no terminal, nothing is broken.
    """
    columns = _columns(stream)
    if not columns or len(first) + len(text) < columns:
        return first + text
    width = max(columns - 1, max(len(first), len(rest)) + 10)
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _obeys(stream: Any) -> bool:
    """Whether a stream is a terminal that knows escape sequences."""
    return is_terminal(stream) and os.environ.get("TERM") != "dumb"


class Status:
    """A line that tells what is being done, and goes when that is over; nothing where there is no terminal."""

    def __init__(self) -> None:
        self._shown = False

    def __enter__(self) -> Status:
        return self

    def __call__(self, text: str) -> None:
        """Shows `text` in the place of what was there."""
        columns = _columns()
        if columns and _obeys(sys.stdout):
            self._shown = True
            _put("\r\033[K" + styled(text[: columns - 1], DIM))

    def __exit__(self, *exception: object) -> None:
        if self._shown:
            _put("\r\033[K")


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


def _columns(stream: Any = None) -> int:
    """The width of the terminal behind `stream` (sys.stdout); 0 where it has none."""
    try:
        return os.get_terminal_size((sys.stdout if stream is None else stream).fileno()).columns
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
    Tab completes a line to one of `lines`, where the terminal marks pastes: in a paste, a tab is a tab.
    """

    def __init__(self, lines: Sequence[str] = ()):
        self.lines = lines

    def __enter__(self) -> LineEditor:
        self._readline, self._marks_pastes = None, False
        with contextlib.suppress(ImportError):
            import readline

            self._readline = readline
            self._marks_pastes = "libedit" not in (readline.__doc__ or "") and os.environ.get("TERM", "dumb") != "dumb"
            if self._marks_pastes:
                readline.parse_and_bind("set enable-bracketed-paste on")
                readline.parse_and_bind("tab: complete")
                readline.set_completer_delims("")  # a line is completed as a whole
                readline.set_completer(self._completion)
            with contextlib.suppress(OSError):
                readline.read_history_file(_history_file())
            readline.set_history_length(1000)
        return self

    def _completion(self, typed: str, number: int) -> str | None:
        """The line with this number among those that begin as it was typed; what it returns is readline's protocol."""
        fitting = [line for line in self.lines if line.startswith(typed) and (typed or not line.startswith("/"))]
        return fitting[number] if number < len(fitting) else None

    def __exit__(self, *exception: object) -> None:
        if self._readline:
            self._readline.set_completer(None)
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
