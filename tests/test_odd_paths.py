"""Every command with every path that is not what it should be: one line, a non-zero exit, and nothing hangs."""

import importlib
import os
import sys
import threading

import pytest
from small_runs import SHAPE, make_trainer, write_documents

from mamba2_min.errors import run_script
from mamba2_min.training.trainer import Trainer

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links, pipes and devices as POSIX has them")

SMALL = [word for name, value in SHAPE.items() for word in ("--" + name.replace("_", "-"), str(value))]
TRAIN = ["--max-steps", "1", "--device", "cpu", "--min-count", "1", "--context", "8", *SMALL]
FINETUNE = "mamba2_min.finetune.__main__"
# (module, the flags before the odd path, the flags behind it, whether a file of any name is right there, or a folder)
COMMANDS = {
    "train --data": ("train", ["--out", "OUT", *TRAIN, "--data"], [], "both"),
    "train --val-data": ("train", ["--out", "OUT", "--data", "DATA", *TRAIN, "--val-data"], [], "both"),
    "train --out": ("train", ["--data", "DATA", *TRAIN, "--out"], [], "new folder"),
    "train --out --resume": ("train", ["--data", "DATA", *TRAIN, "--resume", "--out"], [], "new folder"),
    "run --model": ("run", ["--prompt", "x", "--max-tokens", "1", "--model"], [], "folder"),
    "data_generator --out": (
        "data_generator",
        ["--documents", "1", "--host", "127.0.0.1:1", "--out"],
        [],
        "new folder",
    ),
    "data_generator --topics": ("data_generator", ["--out", "OUT", "--host", "127.0.0.1:1", "--topics"], [], "file"),
    "data_generator --kind": ("data_generator", ["--out", "OUT", "--host", "127.0.0.1:1", "--kind"], [], "file"),
    "train --init-from": ("train", ["--out", "OUT", "--data", "DATA", "--device", "cpu", "--init-from"], [], "folder"),
    "finetune --model": (FINETUNE, ["--out", "OUT", "--data", "DATA", "--model"], [], "folder"),
    "finetune --data": (FINETUNE, ["--out", "OUT", "--model", "RUN", "--device", "cpu", "--data"], [], "folder"),
    "merge --adapter": ("mamba2_min.merge", ["--out", "OUT", "--adapter"], [], "folder"),
    "classify --model": ("mamba2_min.classify", ["--model"], [], "folder"),
    "run --adapter": ("run", ["--model", "RUN", "--prompt", "x", "--chat", "--adapter"], [], "folder"),
    "referee --prompts": (
        "mamba2_min.evaluation.referee",
        ["--a", "RUN", "--b", "DATA", "--host", "127.0.0.1:1", "--out", "OUT", "--prompts"],
        [],
        "file",
    ),
    "needle --data": ("mamba2_min.evaluation.needle", ["--model", "RUN", "--out", "OUT", "--data"], [], "file"),
    "position --model": ("mamba2_min.evaluation.position", ["--data", "DATA", "--out", "OUT", "--model"], [], "folder"),
    "export --model": ("mamba2_min.export", ["--out", "OUT", "--model"], [], "folder"),
    "export --out": ("mamba2_min.export", ["--model", "RUN", "--approximate", "--out"], [], "new folder"),
}


def long_name(path):
    return path.parent / ("a" * 300)


def long_path(path):
    return path.parent / "/".join(["a" * 200] * 30)


def surrogate(path):
    return f"{path}\ud800"


def inside_a_file(path):
    path.write_text("x")
    return path / "inside"


def a_file(path):
    path.write_bytes(b"\xff\0")
    return path


def a_folder(path):
    path.mkdir()
    return path


def loop(path):
    path.symlink_to(path)
    return path


def dangling(path):
    path.symlink_to(path.parent / "nowhere" / "nothing")
    return path


def pipe(path):
    os.mkfifo(path)
    return path


def device(path):
    path.symlink_to("/dev/zero")
    return path


def absent(path):
    return path / "a" / "b"


ODD = [long_name, long_path, surrogate, inside_a_file, a_file, a_folder, loop, dangling, pipe, device, absent]
# Of these a command may well make something.
RIGHT = {"new folder": {a_folder, absent}, "both": set(), "file": set(), "folder": set()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = write_documents(tmp_path_factory.mktemp("data"), count=6)
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_draw", lambda self: None)
        make_trainer(out, data, max_steps=1, eval_every=1).train()
    return data, out


@pytest.mark.parametrize("make", ODD, ids=lambda make: make.__name__)
@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_one_line(run, tmp_path, monkeypatch, capsys, command, make):
    module, before, after, kind = COMMANDS[command]
    if make in RIGHT[kind]:
        pytest.skip("nothing is wrong with that")
    places = {"DATA": str(run[0]), "RUN": str(run[1]), "OUT": str(tmp_path / "out")}
    arguments = [places.get(word, word) for word in before] + [str(make(tmp_path / "odd"))] + after
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *arguments])
    main = importlib.import_module(module).main
    ended = []

    def call():
        try:
            run_script(main)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits for ever"
    (error,) = ended
    said = capsys.readouterr().err
    assert isinstance(error, SystemExit), repr(error)
    assert error.code not in (0, None), said
    lines = [line for line in said.splitlines() if not line.startswith(("note:", "usage:", " "))]
    assert len(lines) == 1 and "error: " in lines[0] and "Traceback" not in said, said
