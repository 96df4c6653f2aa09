"""Commands in processes of their own that do not wait for torch: they are forked from one that has imported it.

Otherwise they are real: a command runs as `__main__`, has its own streams, limits and terminal, and receives signals.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# AdamW imports torch._dynamo, which takes seconds, when it is first made.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["small_runs", "mamba2_min.plots", "mamba2_min.training.runs", "torch._dynamo"])


def fork(target, args=(), kwargs=None):
    """A started process, forked where torch is there."""
    with pytest.MonkeyPatch.context() as patch:  # the server of forks looks for modules there
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    process = context.Process(target=target, args=args, kwargs=kwargs or {})
    process.start()
    return process


def status_of(process, timeout=120):
    """The exit status as a shell would give it: 128 + the signal that ended it, if one did. None: it still runs."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        return None
    return 128 - process.exitcode if process.exitcode < 0 else process.exitcode


class Command:
    """`python WORDS`, where the words begin with a script or with -m and a module's name.

    stdin: what it reads; cwd: its folder (default: the repository's); environment: variables beside its own.
    """

    def __init__(self, *words, stdin="", cwd=ROOT, environment=None):
        self.words = [str(word) for word in words]
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [str(Path(self._folder.name) / name) for name in ("in", "out", "errors")]
        Path(self._streams[0]).write_bytes(stdin if isinstance(stdin, bytes) else stdin.encode())
        self.process = fork(_run_with_files, (self.words, self._streams, str(cwd), environment or {}))

    def wait(self, timeout=120):
        """A CompletedProcess, whose streams are text."""
        status = status_of(self.process, timeout)
        out, errors = (Path(path).read_text(encoding="utf-8") for path in self._streams[1:])
        self._folder.cleanup()
        assert status is not None, f"still running after {timeout} seconds: {errors}"
        return subprocess.CompletedProcess(self.words, status, out, errors)


def command(*words, **options):
    return Command(*words, **options).wait()


def _run_with_files(words, streams, cwd, environment):
    stdin, out, errors = streams
    opened = [os.open(stdin, os.O_RDONLY)]
    opened += [os.open(path, os.O_WRONLY | os.O_CREAT, 0o644) for path in (out, errors)]
    for number, file in enumerate(opened):
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    run(words, environment)


def run(words, environment):
    """Runs a command in this process, whose descriptors 0, 1 and 2 are as it should find them."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # and is heard, also in a background job
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
