"""What a user can mend: raised anywhere, printed by the scripts as one line, with a non-zero exit and no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """A fault in what the user gave (a path, a flag, a file). Its text is one line that says what to do."""


def run_script(main: Callable[[], int | None]) -> None:
    """Runs a script's `main()` and exits with its status; a UserError becomes one line on stderr and status 2."""
    try:
        status = main()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of a pipe went away: nothing is left to say it to
        sys.stderr.close()
        status = 141
    sys.exit(status or 0)


def printable(text: str, keep: str = "") -> str:
    """`text` with every character that a terminal would act on (C0, C1, ESC, bidi overrides) shown as an escape.

    `keep` lists control characters to leave as they are, such as "\\n\\t" where lines are wanted.
    """
    return "".join(c if c in keep or not _acts_on_a_terminal(c) else c.encode("unicode_escape").decode() for c in text)


def _acts_on_a_terminal(c: str) -> bool:
    code = ord(c)
    return (
        code < 0x20
        or 0x7F <= code < 0xA0
        or 0xD800 <= code < 0xE000  # lone surrogates cannot be printed at all
        or code in (0x200E, 0x200F, 0x2028, 0x2029, 0x061C, 0xFEFF)
        or 0x202A <= code <= 0x202E  # bidirectional embeddings and overrides
        or 0x2066 <= code <= 0x2069
    )
