"""Records a session at a terminal as an animated picture: python -m benchmarks.record --model mine

Four commands run as they are, one after the other, at a terminal of 80 columns: the data generator, the two of
`make demo`, and the completer in a dialogue. What they write is kept with its time. Their waits are shortened in the
picture, and how long each took is told beside it. The data generator needs an Ollama server with --model;
`--without-generator` leaves that command out. The picture is an SVG that moves in every browser and follows the page's
light or dark; the last frame alone is what a reader sees who asked for less motion.
"""

from __future__ import annotations

import argparse
import codecs
import fcntl
import html
import os
import pty
import re
import select
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mamba2_min.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
COLUMNS, ROWS = 80, 24
_LONGEST = 14.0  # seconds in the picture that a command may take
_PAUSE = 1.2  # seconds in the picture in which nothing happens, at most
_TYPING = 2.0  # seconds in the picture that a command line takes to type, at most
_CONTROL = re.compile(r"\x1b\[([?\d;]*)([@-~])|\x1b\][^\x07]*\x07|\x1b[=>]")


@dataclass
class Cells:
    """What a terminal shows: `rows` of (character, style), where a style is "", "b" (bold) or "d" (dim)."""

    columns: int = COLUMNS
    height: int = ROWS
    rows: list[list[tuple[str, str]]] = field(default_factory=lambda: [[]])
    row: int = 0
    column: int = 0
    style: str = ""

    def feed(self, text: str) -> None:
        """Does what `text` asks a terminal for: of control sequences what readline, tqdm and this project use."""
        at = 0
        while at < len(text):
            if found := _CONTROL.match(text, at):
                self._obey(found[1] or "", found[2] or "")
                at = found.end()
                continue
            c = text[at]
            at += 1
            if c == "\n":
                self._next_line()
            elif c == "\r":
                self.column = 0
            elif c == "\b":
                self.column = max(self.column - 1, 0)
            elif c >= " ":
                if self.column == self.columns:
                    self._next_line()
                    self.column = 0
                line = self.rows[self.row]
                line += [(" ", "")] * (self.column + 1 - len(line))
                line[self.column] = (c, self.style)
                self.column += 1

    def lines(self) -> list[list[tuple[str, str]]]:
        """The rows that are on the screen, as many as it has."""
        shown = [list(line) for line in self.rows[-self.height :]]
        return shown + [[] for _ in range(self.height - len(shown))]

    def _next_line(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append([])

    def _obey(self, values: str, letter: str) -> None:
        number = int(values) if values.isdigit() else 0
        if letter == "m":
            self.style = {"1": "b", "2": "d"}.get(values, "")
        elif letter == "K" and number == 0:
            del self.rows[self.row][self.column :]
        elif letter == "A":
            self.row = max(self.row - (number or 1), 0)
        elif letter == "B":
            self.row = min(self.row + (number or 1), len(self.rows) - 1)
        elif letter == "C":
            self.column = min(self.column + (number or 1), self.columns - 1)
        elif letter == "D":
            self.column = max(self.column - (number or 1), 0)


@dataclass(frozen=True)
class Command:
    """A command line, and what is typed while it runs: (what the screen shows before it, the keys)."""

    line: str
    keys: tuple[tuple[str, str], ...] = ()


def play(
    command: Command, folder: Path, environment: dict[str, str], seconds: float = 900.0
) -> Iterator[tuple[float, str]]:
    """Runs a command in a folder, at a terminal of its own: (seconds since its start, text) for all that it writes.

    Raises RuntimeError where it fails, or takes longer than `seconds`.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    arguments = [sys.executable if word == "python" else word for word in shlex.split(command.line)]
    child = subprocess.Popen(
        arguments, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, cwd=folder, env=environment
    )
    os.close(theirs)
    decoder, keys, shown = codecs.getincrementaldecoder("utf-8")("replace"), list(command.keys), ""
    began = time.monotonic()

    def read() -> str | None:
        """What there is to read; None at the end."""
        try:
            data = os.read(ours, 65536)
        except OSError:  # the other side is closed, on Linux
            data = b""
        return decoder.decode(data) if data else None

    try:
        while True:
            if time.monotonic() - began > seconds:
                child.kill()
                raise RuntimeError(f"{command.line} takes longer than {seconds:g} seconds")
            if not select.select([ours], [], [], 0.2)[0]:
                if keys and shown.endswith(keys[0][0]):
                    shown = ""
                    for key in keys.pop(0)[1]:
                        os.write(ours, key.encode())
                        time.sleep(0.08)
                        if select.select([ours], [], [], 0)[0] and (text := read()):
                            shown += text  # an answer may come that quickly
                            yield time.monotonic() - began, text
                continue
            if (text := read()) is None:
                break
            shown = (shown + text)[-1000:]
            yield time.monotonic() - began, text
    finally:
        status = child.wait(60)
        os.close(ours)
    if status:
        raise RuntimeError(f"{command.line} ended with status {status}")


def shortened(times: Sequence[float], longest: float = _LONGEST, pause: float = _PAUSE) -> list[float]:
    """When things that happened at `times` (ascending) happen in the picture: no pause is long, nor is the whole."""
    shown, now, before = [], 0.0, 0.0
    for at in times:
        now += min(at - before, pause)
        before = at
        shown.append(now)
    scale = min(1.0, longest / now) if now else 1.0
    return [at * scale for at in shown]


@dataclass(frozen=True)
class Frame:
    """What is on the screen from a second of the picture on."""

    at: float
    lines: list[list[tuple[str, str]]]


def record(commands: Sequence[Command], folder: Path, environment: dict[str, str]) -> list[Frame]:
    """Runs the commands in a folder, one after the other on one screen. At most eight frames per second are kept."""
    cells, offset = Cells(), 0.0
    frames: list[Frame] = []

    def keep(at: float) -> None:
        if frames and at - frames[-1].at < 0.125:
            frames[-1] = Frame(frames[-1].at, cells.lines())
        else:
            frames.append(Frame(at, cells.lines()))

    for command in commands:
        cells.feed("$ ")
        line = broken(command.line)
        pace = min(0.03, _TYPING / len(line))
        for k, letter in enumerate(line):
            cells.feed(letter)
            keep(offset + pace * k)
        cells.feed("\r\n")
        offset += pace * len(line) + 0.4
        keep(offset)
        written = list(play(command, folder, environment))
        for at, (_, text) in zip(shortened([at for at, _ in written]), written, strict=True):
            cells.feed(text)
            keep(offset + at)
        took = written[-1][0] if written else 0.0
        cells.feed(f"\x1b[2m({took:,.0f} second{'' if round(took) == 1 else 's'})\x1b[0m\r\n\r\n")
        offset = frames[-1].at + 1.5
        keep(offset)
    return frames


def broken(line: str, width: int = COLUMNS) -> str:
    """A command line as it is typed where it is longer than the terminal: a backslash and a line end before a flag."""
    lines = [""]
    for part in re.split(" (?=--)", line):
        if lines[-1] and len(lines[-1]) + len(part) + 1 > width - 4:  # the prompt, and the backslash after a space
            lines.append("   ")
        lines[-1] += f" {part}" if lines[-1] else part
    return " \\\r\n".join(lines)


def demo(makefile: str) -> list[str]:
    """The command lines of a Makefile's target `demo`, for a shell in which its `$(BIN)` is active."""
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    if recipe is None:
        raise ValueError("there is no target demo")
    lines = re.sub(r"\\\n\s*", "", recipe[1]).splitlines()
    return [line.strip().removeprefix("$(BIN)/") for line in lines]


_CHARACTER, _LINE, _MARGIN = 8.4, 18, 12  # pixels
_STYLE = """svg{background:#fff}text{font:14px ui-monospace,Menlo,Consolas,monospace;fill:#24292f;white-space:pre}
.b{font-weight:bold}.d{fill:#6e7781}
@media(prefers-color-scheme:dark){svg{background:#0d1117}text{fill:#e6edf3}.d{fill:#8b949e}}"""


def to_svg(frames: Sequence[Frame], rest: float = 4.0) -> str:
    """The frames as one picture that moves: a strip of them behind a window. `rest`: seconds of the last one."""
    ids: dict[str, int] = {}
    width, height = COLUMNS * _CHARACTER + 2 * _MARGIN, ROWS * _LINE + 2 * _MARGIN
    strip = []
    for k, frame in enumerate(frames):
        for row, line in enumerate(frame.lines):
            if markup := _markup(line):
                number = ids.setdefault(markup, len(ids))
                y = k * height + _MARGIN + (row + 0.75) * _LINE
                strip.append(f'<use href="#{number}" x="{_MARGIN}" y="{y:g}"/>')
    total = frames[-1].at + rest
    stops = "".join(
        f"{100 * frame.at / total:.3f}%{{transform:translateY({-k * height:g}px)}}" for k, frame in enumerate(frames)
    )
    last = -(len(frames) - 1) * height
    move = f"#s{{animation:m {total:.2f}s step-end infinite}}@keyframes m{{{stops}}}"
    still = f"@media(prefers-reduced-motion){{#s{{animation:none;transform:translateY({last:g}px)}}}}"
    rows = "".join(f'<text id="{number}" xml:space="preserve">{markup}</text>' for markup, number in ids.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}"><style>{_STYLE}{move}{still}</style><defs>{rows}</defs>'
        f'<g id="s">{"".join(strip)}</g></svg>\n'
    )


def _markup(line: Sequence[tuple[str, str]]) -> str:
    """A row as spans of one style each, without the white space at its end."""
    spans: list[tuple[str, str]] = []
    for character, style in line:
        if spans and spans[-1][1] == style:
            spans[-1] = spans[-1][0] + character, style
        else:
            spans.append((character, style))
    while spans and not spans[-1][0].strip():
        spans.pop()
    return "".join(
        f'<tspan class="{style}">{html.escape(text, quote=False)}</tspan>' if style else html.escape(text, quote=False)
        for text, style in spans
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3.1", help="the Ollama server's model (%(default)s)")
    parser.add_argument("--without-generator", action="store_true", help="record train.py and run.py alone")
    parser.add_argument("--out", default="docs/images/session.svg", metavar="FILE", help="(%(default)s)")
    args = parser.parse_args()
    keys = (("> ", "A small duck\n"), ("> ", "/con\t\n"), ("> ", "\x04"))
    commands = [Command(line) for line in demo((ROOT / "Makefile").read_text())]
    commands.append(Command("python run.py --max-tokens 60", keys))
    if not args.without_generator:
        commands.insert(0, Command(f"python data_generator.py --model {args.model} --documents 20 --out runs/written"))
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for script in ("data_generator.py", "train.py", "run.py"):
            (folder / script).symlink_to(ROOT / script)
        shutil.copytree(ROOT / "training_data", folder / "training_data")
        picture = to_svg(record(commands, folder, environment | {"XDG_STATE_HOME": name, "PYTHONPATH": str(ROOT)}))
    write_atomically(Path(args.out), lambda file: file.write(picture.encode()))
    print(f"written: {args.out}, {len(picture) / 1000:,.0f} kB")


if __name__ == "__main__":
    main()
