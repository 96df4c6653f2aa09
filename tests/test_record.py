"""The recorded session: what a terminal would show, when, and as a picture."""

import itertools
import os
import re
import shlex
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("termios")
from benchmarks import record

SVG = "{http://www.w3.org/2000/svg}"


def shown(*texts, columns=20):
    cells = record.Cells(columns, 5)
    for text in texts:
        cells.feed(text)
    return ["".join(c for c, _ in line).rstrip() for line in cells.lines()]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one\r\ntwo", ["one", "two"]),
        ("a long one\rshort\x1b[K", ["short"]),
        ("12%\r100%", ["100%"]),
        ("abc\b\bX", ["aXc"]),
        ("x" * 25, ["x" * 20, "x" * 5]),
        ("bar\n\x1b[A\rnew\r\n", ["new"]),
        ("\x1b[?2004h> hi\x1b[?2004l\r\n\x1b]0;title\x07ok", ["> hi", "ok"]),
        ("a\x1b[3Cb\x1b[2DY", ["a  Yb"]),
        ("\r\n".join("1234567"), ["3", "4", "5", "6", "7"]),
    ],
)
def test_cells_are_what_a_terminal_shows(text, lines):
    assert shown(text) == lines + [""] * (5 - len(lines))
    assert shown("é→", "ok") == ["é→ok", "", "", "", ""]


def test_styles_are_kept():
    cells = record.Cells()
    cells.feed("a\x1b[1mb\x1b[0m\x1b[2mc & <d>\x1b[0m ")
    assert record._markup(cells.lines()[0]) == 'a<tspan class="b">b</tspan><tspan class="d">c &amp; &lt;d&gt;</tspan>'


def test_no_pause_is_long_and_nothing_changes_its_order():
    times = [0.1, 0.2, 60.0, 60.5, 600.0]
    short = record.shortened(times, longest=100.0, pause=1.0)
    assert short == pytest.approx([0.1, 0.2, 1.2, 1.7, 2.7])
    assert record.shortened(times, longest=1.35, pause=1.0) == pytest.approx([at / 2 for at in short])
    assert record.shortened([]) == []


def test_the_recorded_commands_are_those_of_the_demo():
    train, run = record.demo((record.ROOT / "Makefile").read_text())
    assert train.startswith("python train.py --data training_data/first_stories --out runs/demo --resume --max-minutes")
    assert run.startswith("python run.py --model runs/demo --prompt ") and "\\" not in train + run
    assert record.demo(
        "all: demo\n\tx\n\ndemo: all  ## why\n\t$(BIN)/python a.py --b 1 \\\n\t\t--c\n\tls\n\nend:\n"
    ) == ["python a.py --b 1 --c", "ls"]
    with pytest.raises(ValueError, match="no target demo"):
        record.demo("all:\n\tls\n")


@pytest.mark.parametrize("width", [40, 80])
def test_a_long_command_is_typed_on_lines_that_fit_and_means_the_same(width):
    for line in [*record.demo((record.ROOT / "Makefile").read_text()), "python run.py"]:
        typed = record.broken(line, width).replace("\r", "")
        assert max(map(len, f"$ {typed}".split("\n"))) <= width
        assert all(after.startswith("    --") for after in typed.split("\n")[1:])  # a value stays with its flag
        heard = subprocess.run(["sh", "-c", f"printf '%s\\n' {typed}"], capture_output=True, text=True, check=True)
        assert heard.stdout.splitlines() == shlex.split(line)


PROGRAM = r"""
print("\033[2mready\033[0m")
name = input("name? ")
print("hello", name)
"""


def test_an_answer_may_come_as_quickly_as_a_key_is_typed(tmp_path):
    """The program asks again before the last key of the answer has been looked at."""
    (tmp_path / "ask.py").write_text("while (line := input('> ')) != 'q': print('yes', line)")
    command = record.Command("python ask.py", (("> ", "a\n"), ("> ", "b\n"), ("> ", "q\n")))
    written = "".join(text for _, text in record.play(command, tmp_path, {**os.environ, "TERM": "dumb"}, seconds=20))
    assert written.replace("\r", "") == "> a\nyes a\n> b\nyes b\n> q\n"


def test_a_session_becomes_a_picture(tmp_path):
    (tmp_path / "ask.py").write_text(PROGRAM)
    commands = [record.Command("python ask.py", (("name? ", "owl\n"),)), record.Command("python -c 'print(6 * 7)'")]
    frames = record.record(commands, tmp_path, {**os.environ, "TERM": "xterm"})
    last = ["".join(c for c, _ in line).rstrip() for line in frames[-1].lines]
    told = [line for line in last if not re.fullmatch(r"\((1 second|[02-9] seconds)\)", line)]
    assert told[:7] == ["$ python ask.py", "ready", "name? owl", "hello owl", "", "$ python -c 'print(6 * 7)'", "42"]
    assert all(a.at < b.at for a, b in itertools.pairwise(frames))

    picture = ElementTree.fromstring(record.to_svg(frames))
    texts = {f"#{text.get('id')}": "".join(text.itertext()) for text in picture.iter(f"{SVG}text")}
    height = float(picture.get("height"))
    strip = [
        (float(use.get("y")) - (len(frames) - 1) * height, texts[use.get("href")]) for use in picture.iter(f"{SVG}use")
    ]
    assert [text for y, text in strip if y > 0] == [line for line in last if line]
    assert max(y for y, _ in strip) < height
    style = "".join(picture.find(f"{SVG}style").itertext())
    stops = [float(at) for at in re.findall(r"([\d.]+)%\{", style)]
    assert len(stops) == len(frames) and stops == sorted(stops) and stops[-1] < 100


def test_a_command_that_fails_or_hangs_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="ended with status 3"):
        list(record.play(record.Command("python -c 'exit(3)'"), tmp_path, {**os.environ}))
    with pytest.raises(RuntimeError, match=r"takes longer than 0\.5 seconds"):
        list(record.play(record.Command("python -c 'input()'"), tmp_path, {**os.environ}, seconds=0.5))
