"""Folders of a fine-tuning, with pipes, devices, loops, halves and odd values in them: read, or refused in one line."""

import itertools
import json
import os
import random
import shutil
import threading

import pytest
import torch
from test_finetune import PAIRS, TEXTS, finetune, write_lines
from test_finetune import base as base_fixture

from mamba2_min import Sampler
from mamba2_min.checkpoints import checkpoint
from mamba2_min.classify import load as load_classifier
from mamba2_min.errors import UserError
from mamba2_min.finetune import adapter, labels
from mamba2_min.finetune.load import open_run
from mamba2_min.finetune.talk import load as load_talk
from mamba2_min.finetune.talk import save as save_talk
from mamba2_min.merge import merge

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links, pipes and devices as POSIX has them")
base = base_fixture
CPU = torch.device("cpu")
ODD = [None, True, -1, 0, 2**70, 1e308, "x" * 500, "../../secret", "a\ud800\x1b[31m", [], {}, [1], {"a": 1}, "", 0.5]


@pytest.fixture
def folders(base, tmp_path):
    """An adapter that answers, one that sorts, and the state of a conversation."""
    few = {"max_steps": 2, "eval_every": 2, "val_fraction": 0.3}
    finetune(base, write_lines(tmp_path / "a.jsonl", PAIRS), tmp_path / "chat", **few)
    finetune(base, write_lines(tmp_path / "b.jsonl", TEXTS), tmp_path / "sort", task="classify", **few)
    completer, _ = open_run(base, tmp_path / "chat", True, CPU, None)
    list(completer.reply([1, 2], 2, Sampler(seed=0)))
    save_talk(completer, tmp_path / "chat" / "talk.pt")
    return tmp_path


def readers(folders, folder):
    """Everything that reads a folder of this kind."""
    if folder.name == "sort":
        return [lambda: load_classifier(folder, folders / "base")]
    return [
        lambda: open_run(folders / "base", folder, True, CPU, None),
        lambda: merge(folder, folders / "merged", folders / "base"),
        lambda: load_talk(open_run(folders / "base", folder, True, CPU, None)[0], folder / "talk.pt"),
    ]


def read_or_refused(call):
    """Whether it was refused: in one printable line, and within seconds."""
    found = []

    def run():
        try:
            call()
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "it waits for ever"
    assert not found or isinstance(found[0], UserError), repr(found)
    assert not found or "\n" not in str(found[0]), str(found[0])
    return bool(found)


def zeros(path):
    path.symlink_to("/dev/zero")


def loop(path):
    path.symlink_to(path)


def test_what_is_not_a_file(folders):
    for folder, make in itertools.product((folders / "chat", folders / "sort"), (os.mkfifo, zeros, loop, os.mkdir)):
        for name in (adapter.CONFIG, adapter.WEIGHTS, labels.LABELS, labels.HEAD, "talk.pt"):
            path, aside = folder / name, folders / "aside"
            if path.exists():
                path.rename(aside)
                make(path)
                assert any([read_or_refused(call) for call in readers(folders, folder)]), path
                path.rmdir() if path.is_dir() else path.unlink()
                aside.rename(path)


def leaves(value, path=()):
    """The path to each value within a JSON value."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield from leaves(part, (*path, key))


def replaced(value, path, odd):
    if not path:
        return odd
    value = dict(value) if isinstance(value, dict) else list(value)
    value[path[0]] = replaced(value[path[0]], path[1:], odd)
    return value


def fuzz(folders, count, seed):
    draw = random.Random(seed)
    for _ in range(count):
        folder = folders / draw.choice(["chat", "sort"])
        path = draw.choice([path for path in folder.iterdir() if path.name not in ("loss.png", "metrics.jsonl")])
        content = path.read_bytes()
        if path.suffix == ".json" and draw.random() < 0.8:
            value = json.loads(content)
            path.write_text(json.dumps(replaced(value, draw.choice(list(leaves(value))), draw.choice(ODD))))
        else:
            at = draw.randrange(len(content))
            path.write_bytes(draw.choice([content[:at], content[:at] + b"\xff" + content[at + 1 :], content * 2, b""]))
        for call in readers(folders, folder):
            read_or_refused(call)
        path.write_bytes(content)
        shutil.rmtree(folders / "merged", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_odd_values_and_bytes(folders, seed):
    fuzz(folders, 150, seed)


@pytest.mark.slow
def test_the_folders_are_read_as_they_are(folders):
    assert (folders / "chat" / adapter.WEIGHTS).exists() and (folders / "base" / checkpoint.WEIGHTS).exists()
    for folder in (folders / "chat", folders / "sort"):
        assert not any([read_or_refused(call) for call in readers(folders, folder)])
