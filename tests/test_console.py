"""Printing never ends a program: whatever becomes of its terminal, its pipe or its disk, the work goes on."""

import errno
import io
import itertools
import os
import pty
import subprocess
import sys
import threading

import pytest
import torch
from small_runs import ROOT

from mamba2_min import classify, console
from mamba2_min.console import Guarded
from mamba2_min.errors import UserError, run_script

# A program that prints more than a pipe holds, shows a progress bar, and then leaves a file: the proof that it ended.
PROGRAM = """
import sys
from pathlib import Path
from tqdm import tqdm
from mamba2_min import console
console.install("the work goes on")
with tqdm(total=300, mininterval=0, disable=False) as bar:
    for k in range(300):
        tqdm.write("Привет, мир " * 20, file=sys.stdout)
        print("строка", k, flush=True)
        bar.update(1)
Path(sys.argv[1]).write_text(str(type(console.failure()).__name__))
"""


def start(tmp_path, **options):
    environment = {**os.environ, "PYTHONIOENCODING": options.pop("encoding", "utf-8"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "ended")]
    return subprocess.Popen(command, env=environment, **options)


def finished(child, tmp_path):
    """What the program says that stopped its output, after it ended well and without a traceback."""
    errors = child.stderr.read().decode() if child.stderr else ""
    assert child.wait(60) == 0, errors
    assert "Traceback" not in errors and "Exception ignored" not in errors, errors
    return (tmp_path / "ended").read_text(), errors


pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes and terminals as POSIX has them")


def test_the_reader_of_a_pipe_goes_away(tmp_path):
    child = start(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()
    why, errors = finished(child, tmp_path)
    assert why == "BrokenPipeError"
    assert errors.count("note: standard output cannot be written (Broken pipe); the work goes on\n") == 1


def test_both_streams_go_away(tmp_path):
    child = start(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    child.stdout.readline()
    child.stdout.close()
    assert finished(child, tmp_path)[0] == "BrokenPipeError"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("both", [False, True])
def test_a_full_disk(tmp_path, both):
    with open("/dev/full", "wb") as full:
        child = start(tmp_path, stdout=full, stderr=full if both else subprocess.PIPE)
    why, errors = finished(child, tmp_path)
    assert why == "OSError"
    assert both or "note: standard output cannot be written (No space left on device)" in errors


def test_a_terminal_is_closed(tmp_path):
    main, side = pty.openpty()
    child = start(tmp_path, stdout=side, stderr=side, start_new_session=True)
    os.close(side)
    os.read(main, 100)
    os.close(main)
    assert finished(child, tmp_path)[0] == "OSError"


def test_streams_that_were_closed_before_the_start(tmp_path):
    command = f'exec "{sys.executable}" -c "$PROGRAM" "{tmp_path / "ended"}" >&- 2>&-'
    environment = {**os.environ, "PROGRAM": PROGRAM, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, shell=True, env=environment, timeout=60).returncode == 0
    assert (tmp_path / "ended").read_text() == "NoneType"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_letters_that_an_encoding_lacks(tmp_path, encoding):
    child = start(tmp_path, encoding=encoding, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said, errors = child.communicate(timeout=60)
    assert child.returncode == 0 and b"Traceback" not in errors
    assert said.decode("ascii").splitlines()[1] == "".join(f"\\u{ord(c):04x}" for c in "строка") + " 0"


def test_a_stream_that_cannot_keep_up_loses_a_piece_and_goes_on():
    class Slow(io.StringIO):
        def write(self, text):
            if text == "b":
                raise BlockingIOError(11, "Resource temporarily unavailable")
            return super().write(text)

    slow = Slow()
    stream = Guarded(slow)
    for text in "abc":
        assert stream.write(text) == 1
    assert slow.getvalue() == "ac" and stream.failure is None


def test_a_stream_without_reconfigure_or_number(monkeypatch):
    """As in Jupyter."""

    class Cell:
        encoding = "latin-1"

        def __init__(self):
            self.text, self.broken = "", False

        def write(self, text):
            if self.broken:
                raise ValueError("I/O operation on closed file")
            text.encode(self.encoding)
            self.text += text

        def flush(self):
            if self.broken:
                raise OSError("gone")

    cell = Cell()
    monkeypatch.setattr(sys, "stdout", cell)
    console.print("déjà", "vu", sep="-", end="!\n")
    console.print("мир")
    assert cell.text == "déjà-vu!\n\\u043c\\u0438\\u0440\n"
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    console.install("nothing is lost")
    assert isinstance(sys.stdout, Guarded) and sys.stdout.stream is cell and console.failure() is None
    installed = sys.stdout
    console.install()
    assert sys.stdout is installed  # once is enough
    cell.broken = True
    print("lost")
    print("lost too", flush=True)
    assert isinstance(console.failure(), ValueError)
    assert sys.stderr.getvalue().count("cannot be written (I/O operation on closed file); nothing is lost") == 1
    monkeypatch.setattr(sys, "stdout", None)
    console.print("nobody hears it")


def test_other_attributes_are_the_streams_own():
    inner = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    stream = Guarded(inner)
    assert (stream.encoding, stream.isatty(), stream.closed) == ("utf-8", False, False)
    stream.writelines(["a", "b\n"])
    stream.flush()
    assert inner.buffer.getvalue() == b"ab\n"
    with pytest.raises(AttributeError):
        stream.no_such_thing  # noqa: B018


def test_threads_may_print_while_it_fails(tmp_path):
    read, write = os.pipe()
    os.close(read)
    stream = Guarded(os.fdopen(write, "w"))
    threads = [threading.Thread(target=lambda: [stream.write("x" * 1000) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stream.flush()
    assert isinstance(stream.failure, BrokenPipeError)


class Failing(io.StringIO):
    """A stream that takes `room` writes."""

    def __init__(self, room, error):
        super().__init__()
        self.room, self.error = room, error

    def write(self, text):
        if not self.room:
            raise self.error
        self.room -= 1
        return super().write(text)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), BrokenPipeError()], ids=repr)
def test_labels_that_cannot_be_written_end_the_sorting(monkeypatch, error):
    """Also of texts without an end, as in `yes TEXT | … | head`; and nobody takes a part for the whole."""
    monkeypatch.setattr(classify, "load", lambda model, base: (torch.nn.Linear(1, 1), None, ["a"]))
    monkeypatch.setattr(classify, "classify_together", lambda *given: itertools.repeat(("a", 0.5)))
    monkeypatch.setattr(sys, "argv", ["classify", "--model", "x", "--device", "cpu"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys, "stdout", stream := Failing(2, error))
    monkeypatch.setattr(sys, "stderr", said := io.StringIO())
    with pytest.raises(SystemExit) as ended:
        run_script(classify.main)
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    assert ended.value.code == (2 if full else 141)
    assert stream.getvalue() == "a\t0.5000\na\t0.5000\n"
    assert said.getvalue() == ("error: cannot write the labels: No space left on device\n" if full else "")


def test_sorting_without_a_standard_input_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["classify", "--model", "x"])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="standard input is closed"):
        classify.main()
