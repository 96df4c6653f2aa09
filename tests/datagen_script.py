"""Runs data_generator.py within the tests' own process: the same as a process of its own, and much faster."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from unittest import mock

import data_generator
from mamba2_min.errors import run_script


def call(*args: object, **environment: str) -> subprocess.CompletedProcess:
    """The exit status and what was printed, as of `python data_generator.py ARGS`."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(sys, "argv", ["data_generator.py", *map(str, args)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = None
        try:
            run_script(data_generator.main)
        except SystemExit as end:
            status = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())
