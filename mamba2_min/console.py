"""Printing that never ends a program: a closed terminal, a full disk or a missing letter costs only the output.

`install()` puts a `Guarded` stream in the place of sys.stdout and sys.stderr, so that every `print`, traceback and
progress bar of the process passes through it. `console.print` does the same for one line, with nothing installed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any


class Guarded:
    """A text stream whose `write` and `flush` never raise. Everything else is the stream's own.

    A character that the stream's encoding lacks is written as its escape (\\u0436). After the first lasting error (a
    broken pipe, a closed terminal, a full disk), nothing more is written, and `failure` is that error; before, None.
    `note`: a line that is written to sys.stderr when that happens to another stream.
    """

    def __init__(self, stream: Any, note: str = ""):
        self.stream, self.note = stream, note
        self.failure: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        if self.failure is None:
            try:
                try:
                    self.stream.write(text)
                except UnicodeEncodeError as error:
                    encoding = error.encoding
                    self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self._fail(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.failure is None:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        if isinstance(error, BlockingIOError):  # a terminal that cannot keep up loses a piece
            return
        self.failure = error
        with contextlib.suppress(OSError, ValueError, AttributeError):
            # What is left in the buffer would fail again, loudly, when Python closes the stream.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)
        if self.note and self is not sys.stderr:
            reason = getattr(error, "strerror", None) or error
            print(f"note: standard output cannot be written ({reason}); {self.note}", file=sys.stderr)


def install(note: str = "") -> None:
    """Guards sys.stdout and sys.stderr for the rest of the process. A missing stream is replaced by a silent one.

    `note` is printed on standard error when standard output fails, such as "the training goes on".
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Guarded):
            if stream is None:  # closed by the shell, or a program without a console
                stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            stream = Guarded(stream)
            setattr(sys, name, stream)
        stream.note = note or stream.note


def silence() -> None:
    """Nothing more is written to sys.stdout: another process has the screen."""
    sys.stdout = Guarded(open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def failure() -> Exception | None:
    """The error that silenced sys.stdout; None if there was none, or nothing is installed."""
    return sys.stdout.failure if isinstance(sys.stdout, Guarded) else None


def print(*values: object, sep: str = " ", end: str = "\n", file: Any = None) -> None:
    """The built-in `print` to `file` (sys.stdout) and a flush; it never raises for what a stream cannot do."""
    stream = sys.stdout if file is None else file
    if stream is None:
        return
    if not isinstance(stream, Guarded):
        stream = Guarded(stream)
    stream.write(sep.join(map(str, values)) + end)
    stream.flush()
