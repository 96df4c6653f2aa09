"""Errors that a user can fix: raised anywhere, printed by the scripts as one line, with status 2 and no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from mamba2_min import console
from mamba2_min.printable import printable

__all__ = ["UserError", "output_status", "printable", "run_script"]

LONGEST_MESSAGE = 2000  # characters: a message may quote megabytes


class UserError(Exception):
    """An error in what the user gave: a path, a flag, a file. Its message is one line that says what to do."""


def run_script(main: Callable[[], int | None]) -> None:
    """Runs a script's `main()` and exits with its status; a UserError becomes one line on stderr and status 2.

    Output that cannot be written (a closed terminal, a full disk) costs the output and never ends the script.
    """
    console.install()
    try:
        status = main()
    except UserError as error:
        print(f"error: {printable(shortened(str(error)))}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of the pipe is gone: nobody would see a message
        status = 141
    sys.exit(status or 0)


def output_status(what: str) -> int:
    """The status of a script whose output is its result: 0, or 141, as SIGPIPE's, if the reader of its pipe is gone.

    Raises UserError that says why `what` could not be written.
    """
    failure = console.failure()
    if failure and not isinstance(failure, BrokenPipeError):
        raise UserError(f"cannot write {what}: {getattr(failure, 'strerror', None) or failure}")
    return 141 if failure else 0


def shortened(text: str, most: int = LONGEST_MESSAGE) -> str:
    """`text`; if it is longer than `most`, without a part in the middle, because the end often says what to do."""
    return text if len(text) <= most else f"{text[: most * 3 // 4]} … {text[len(text) - most // 4 :]}"
