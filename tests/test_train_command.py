"""train.py as its users meet it: what it prints, what it refuses, and how it resumes."""

import json
import os
import pty
import re
import select
import sys

import forked
import pytest
import torch
from small_runs import ROOT, SHAPE, Training, load_script, write_documents

from mamba2_min import devices, files
from mamba2_min.config import Mamba2Config
from mamba2_min.errors import UserError
from mamba2_min.settings import BEFORE, PRESETS, Settings
from mamba2_min.training import memory, screen
from mamba2_min.training.runs import plan_run, read_plan
from mamba2_min.training.trainer import Trainer

FLAGS = [str(word) for name, value in SHAPE.items() for word in ("--" + name.replace("_", "-"), value)] + [
    "--min-count",
    "1",
    "--context",
    "16",
    "--batch-size",
    "3",
    "--threads",
    "1",
    "--device",
    "cpu",
]


@pytest.fixture
def train(monkeypatch, capsys, tmp_path, data):
    """train.py in this process: its status and what it printed. A UserError is what run_script makes of it."""
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def call(*arguments, out="run", data=data, flags=FLAGS):
        arguments = ["--data", str(data), "--out", str(out), *flags, *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        try:
            status = load_script().main()
        except UserError as error:
            assert "\n" not in str(error)
            return 2, str(error)
        finally:
            captured = capsys.readouterr()
        return status, captured.out + captured.err

    yield call
    torch.set_num_threads(threads)


def test_a_run_says_what_it_does_and_what_to_do_next(train, tmp_path, data):
    status, text = train("--max-steps", "4", "--eval-every", "2")
    lines = text.splitlines()
    assert status == 0
    assert [line[:12].strip() for line in lines[:5]] == ["documents", "tokens", "note", "model", "training"] or [
        line[:12].strip() for line in lines[:4]
    ] == ["documents", "tokens", "model", "training"]
    assert f"12 in {data}" in lines[0] and "parameters" in text
    assert re.search(r"^device      cpu, \w+; needs about \d+ MB of .* free$", text, re.M)
    line = r"^step      2  validation  \d\.\d{4}  perplexity +[\d.,]+  bits per byte \d\.\d{4}  \*$"
    assert re.search(line, text, re.M)
    best = r"^best        step \d: loss \d\.\d{4}, perplexity [\d.,]+, bits per byte \d\.\d{4}$"
    assert re.search(best, text, re.M)
    assert lines[-1] == "saved       run; complete text with: python run.py --model run"
    assert "\r" not in text and "\x1b" not in text  # a pipe is no terminal
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json",
        "tokenizer.json",
        "settings.json",
        "model.pt",
        "last.pt",
        "metrics.jsonl",
    }


def test_the_lines_of_a_training_are_columns_that_fit_a_terminal(train, monkeypatch):
    monkeypatch.setattr(screen, "_SECONDS_BETWEEN_LINES", -1)
    status, text = train("--max-steps", "3", "--eval-every", "2")
    lines = [line for line in text.splitlines() if line.startswith("step ")]
    assert status == 0 and [line[:24] for line in lines] == [
        "step      1  training   ",
        "step      2  training   ",
        "step      2  validation ",
        "step      3  training   ",
        "step      3  validation ",
    ]
    assert all(re.match(r" *\d\.\d{4}  ", line[24:]) and len(line) <= 80 for line in lines)
    assert len({line.index(".") for line in lines}) == 1  # one loss below the other
    assert re.search(r" +[\d,]+ tokens/s +\d:\d\d left$", lines[1])


BAD = {
    "no such folder": (["--data", "nowhere"], "no such file or folder: nowhere"),
    "no documents": (["--data", "bare"], "no documents in bare"),
    "an empty file": (["--data", "empty"], "no documents in empty"),
    "not UTF-8": (["--data", "latin"], "latin/a.md is not UTF-8: byte 0xE9 at offset 3"),
    "a letter": (["--data", "letter"], "the only document, and too short to be cut in two"),
    "out is a file": (["--out", "file"], "file is a file, where a folder is wanted"),
    "out below a file": (["--out", "file/run"], "cannot make the folder file/run: Not a directory"),
    "out is nothing": (["--out", ""], "--out needs the name of a folder"),
    "out cannot be written": (["--out", "/proc/run"], "cannot make the folder /proc/run"),
    "a huge model": (["--d-model", "1000000000000"], "d_model must be a"),
    "a large model": (["--n-layer", "10000000"], "the model alone is too large; lower --d-model"),
    "no heads": (["--headdim", "7"], "headdim must divide"),
    "a tiny vocabulary": (["--vocab-size", "10"], "a vocabulary of 10 is too small"),
    "a negative rate": (["--lr", "-1"], "lr must be a number from 0"),
    "a rate that is none": (["--lr", "nan"], "lr must be a number from 0"),
    "no steps a save": (["--save-every", "0"], "save_every must be an integer from 1"),
    "a share of more than all": (["--val-fraction", "1.5"], "val_fraction must be a number from 0 to 1, not 1.5"),
    "no device": (["--device", "abacus"], "unknown device 'abacus'"),
    "a device that is no device": (["--device", "cpu:x"], "'cpu:x' is not a device"),
    "threads": (["--threads", "-1"], "--threads must be at least 1"),
    "more threads than there are": (["--threads", "9" * 30], "--threads must be at least 1 and at most 1,024"),
    "accepting what can't be": (["--accept", "seed"], "--accept takes micro-batch, adapt-micro-batch, epochs, "),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_done_is_one_line(train, tmp_path, name):
    (tmp_path / "bare").mkdir()
    for folder, content in (("empty", b""), ("latin", b"caf\xe9 au lait"), ("letter", b"w")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.md").write_bytes(content)
    (tmp_path / "file").write_text("here first")
    flags, expected = BAD[name]
    status, text = train("--max-steps", "2", *flags)
    assert status == 2 and expected in text, text
    assert (tmp_path / "file").read_text() == "here first"
    assert not list(tmp_path.glob("run/*"))  # nothing was begun


def test_a_folder_that_cannot_be_written(train, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    (tmp_path / "run").mkdir(mode=0o555)
    status, text = train("--max-steps", "2")
    assert status == 2 and "cannot write run" in text


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-steps", "many"],
        ["--preset", "vast"],
        ["--frobnicate"],
        ["--pattern", "x"],
        ["--batch-size", "1.5"],
        ["--resume", "--overwrite"],
    ],
)
def test_an_unknown_flag_or_value_is_a_usage_error(train, capsys, flags):
    with pytest.raises(SystemExit) as error:
        train(*flags)
    assert error.value.code == 2


def test_a_run_is_not_overwritten_by_accident(train, tmp_path):
    assert train("--max-steps", "2")[0] == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    status, text = train("--max-steps", "3")
    assert (status, text) == (2, "run already holds a run (last.pt): --resume continues it, --overwrite replaces it")
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    status, text = train("--max-steps", "3", "--overwrite")
    assert status == 0 and "at most 3 steps" in text


def test_what_goes_on_as_it_was_and_what_must_be_accepted(train, tmp_path, data):
    assert train("--max-steps", "2", "--eval-every", "2")[0] == 0
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir()}

    def refused(expected, *arguments, **where):
        status, text = train("--resume", *arguments, **where)
        assert status == 2 and expected in text, text
        assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir()} == before

    refused("--max-steps was 2 when the run in run began, and is now 4; add --accept max-steps", "--max-steps", "4")
    refused(f"--lr was {Settings().lr} when the run in run began, and is now 0.7; add --accept lr", "--lr", "0.7")
    refused("--seed was 0 when the run in run began, and is now 7; leave it out", "--seed", "7")
    refused("--d-state was 4", "--d-state", "8")
    refused("--min-count was 1", "--min-count", "3")
    refused("--a-init was hippo", "--a-init", "uniform")
    refused("did not begin with --preset tiny", "--preset", "tiny", flags=["--threads", "1", "--device", "cpu"])
    refused("the documents are not those", data=write_documents(tmp_path / "other", seed=3))

    status, text = train("--resume")
    assert status == 0 and "this run has ended already; nothing is changed" in text
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir()} == before
    moved = data.rename(tmp_path / "moved")  # the same documents at another place
    status, text = train("--resume", "--max-steps", "4", "--accept", "max-steps", data=moved)
    assert status == 0 and "resume      from step 2" in text
    status, text = train("--resume", data=moved)  # once accepted it is the run's own
    assert status == 0 and "all 4 steps done" in text
    status, text = train(
        "--resume", "--max-steps", "6", "--accept", "max-steps,documents", data=write_documents(tmp_path / "b", seed=3)
    )
    assert status == 0 and "other documents than before" in text
    moved.rename(data)


def test_a_half_written_folder(train, tmp_path):
    run = tmp_path / "run"
    assert train("--max-steps", "2", "--lr", "0.02")[0] == 0
    (run / "last.pt").rename(tmp_path / "kept.pt")
    status, text = train("--resume")
    assert status == 2 and "run holds a model but no last.pt to resume from; --overwrite replaces it" in text
    (run / "model.pt").unlink()
    status, text = train("--max-steps", "2")
    assert status == 2 and "already holds a run (config.json)" in text
    status, text = train("--resume")  # settings.json is of a run that was ended before its first save
    assert status == 0 and "nothing saved yet: from the beginning" in text
    assert read_plan(run).training.lr == 0.02
    whole = (run / "last.pt").read_bytes()
    for part in (b"", whole[:100], whole[: len(whole) // 2], b"\0" * 1000):
        (run / "last.pt").write_bytes(part)
        status, text = train("--resume")
        assert status == 2 and "run/last.pt is not a whole checkpoint" in text, text
    (run / "last.pt").write_bytes(whole)
    for name in ("settings.json", "tokenizer.json"):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) // 2])
        status, text = train("--resume")
        assert status == 2 and f"run/{name}" in text
        (run / name).write_bytes(content)
    assert train("--resume")[0] == 0


def test_a_folder_of_another_vocabulary(train, tmp_path):
    assert train("--max-steps", "2")[0] == 0
    assert train("--max-steps", "2", out="other", data=write_documents(tmp_path / "d", count=7, seed=8))[0] == 0
    (tmp_path / "other" / "tokenizer.json").replace(tmp_path / "run" / "tokenizer.json")
    status, text = train("--resume")
    assert status == 2 and ("the model is not that of the run" in text or "the vocabulary in" in text)


def test_settings_from_elsewhere_are_checked(tmp_path):
    good = {
        "data": {
            "data": "d",
            "val_data": None,
            "vocab_size": 8,
            "min_count": 1,
            "pattern": "words",
            "val_fraction": 0.1,
        },
        "model": {},
        "training": {},
    }
    path = tmp_path / "settings.json"
    files.save_json(path, good)
    assert read_plan(tmp_path).training == Settings(**BEFORE)
    for part, change in (
        ("data", {"data": 7}),
        ("data", {"more": 1}),
        ("data", {"val_fraction": "x"}),
        ("model", {"d_model": 10**12}),
        ("model", {"vocab_size": 5}),
        ("training", {"lr": None}),
        ("training", {"unheard": 1}),
        ("training", []),
    ):
        value = {**good[part], **change} if change else change
        files.save_json(path, {**good, part: value})
        with pytest.raises(UserError, match=r"settings.json cannot be understood"):
            read_plan(tmp_path)


def test_a_plan_takes_defaults_presets_and_wishes(tmp_path):
    plan = plan_run(tmp_path / "run", {"d_model": 96, "lr": 0.5, "val_fraction": 0.2}, preset="tiny")
    assert plan.model == {**PRESETS["tiny"], "d_model": 96}
    assert (plan.training, plan.data.val_fraction) == (Settings(lr=0.5), 0.2)
    assert plan_run(tmp_path / "run", {}).model == PRESETS["small"]


def test_batch_size_auto_is_kept(train, tmp_path, monkeypatch):
    flags = [word for word in FLAGS if word not in ("--batch-size", "3")]
    need = [memory.training_memory(Mamba2Config(vocab_size=272, **SHAPE), batch, 512) for batch in (2, 3)]
    monkeypatch.setattr(devices, "free_memory", lambda device: sum(need) // 2)
    status, text = train("--batch-size", "auto", "--max-steps", "2", "--context", 512, flags=flags)
    assert status == 0 and re.search(r"batch 8 in parts of [12],", text), text
    chosen = read_plan(tmp_path / "run").training.micro_batch
    monkeypatch.setattr(devices, "free_memory", lambda device: 10**15)
    status, text = train("--resume", "--batch-size", "auto", flags=["--threads", "1", "--device", "cpu"])
    assert status == 0 and f"in parts of {chosen}" in text


# What reaches the terminal


HOSTILE = {
    "nul": "one\0two " * 200,
    "right to left": "שלום عالم \u202e olleh " * 80,
    "marks": "e\u0301\u0300\u0323" * 300,
    "escapes": "\x1b[31mred\x1b]0;title\x07 \x9b2J \x08\x08 " * 80,
    "one line": "word " * 4000,
    "one word": "a" * 20_000,
    "emoji": "👩‍👩‍👧 " * 300,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_documents_train_and_are_never_printed_raw(train, tmp_path, name):
    folder = tmp_path / "bad\x1b[2J\n\u202edata"
    folder.mkdir()
    (folder / "a\x1b[31m.md").write_text(HOSTILE[name], newline="")
    status, text = train("--max-steps", "3", "--eval-every", "1", out=f"{folder}/run", data=folder)
    assert status == 0
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    assert r"\x1b[2J" in text  # the folder's name, made visible


def process(*arguments):
    return forked.command(ROOT / "train.py", *arguments)


def test_a_real_process_refuses_in_one_line(tmp_path):
    (tmp_path / "a\x1b[31m.md").write_bytes(b"\xff")
    done = process("--data", tmp_path, "--out", tmp_path / "run")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: {tmp_path}/a\\x1b[31m.md is not UTF-8")


def test_help_is_quick_and_shows_the_true_defaults():
    done = process("--help")
    assert done.returncode == 0
    said = " ".join(done.stdout.split())
    assert f"--patience N validations without a better one, then stop; 0: never ({Settings().patience})" in said
    assert f"({Settings().lr:g})" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="a pseudo-terminal")
def test_a_terminal_gets_a_bar_that_fits(tmp_path, data):
    main, side = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    words = ("--data", data, "--out", tmp_path / "run", *FLAGS, "--max-steps", 30, "--eval-every", 15)
    child = Training(*words, said=None, terminal=os.ttyname(side))
    select.select([main], [], [])  # it has the terminal: from now on it ends with the process
    os.close(side)
    received = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:
            break
        if not part:
            break
        received += part
    os.close(main)
    assert child.wait() == 0
    text = received.decode()
    assert "\r" in text and " left" in text
    after = text[text.rindex(" left") :]  # the bar goes: its last figures are older than the lines that follow
    assert re.match(r" left(\x1b\[A)?\r {79,80}\r", after) and "ended       at step 30" in after
    lines = re.split(r"[\r\n]+|\x1b\[\w", text)
    assert max(len(line) for line in lines if not line.startswith("python run.py")) <= 80  # a command is not broken


def test_metrics_and_settings_are_json(train, tmp_path):
    assert train("--max-steps", "4", "--eval-every", "2", "--log-every", "1")[0] == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 2, 3, 4, 4]
    assert {"step", "split", "loss"} <= json.loads(lines[0]).keys()
