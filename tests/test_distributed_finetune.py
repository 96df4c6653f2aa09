"""Several processes fine-tune one model as one process does: the same files, whatever their number."""

import json
import socket

import pytest
import torch
from forked import Command

from mamba2_min import Mamba2Config, Mamba2LM, WordTokenizer
from mamba2_min.checkpoints.checkpoint import load_tensors
from mamba2_min.finetune.conversations import TURNS

ANIMALS = ["cat", "dog", "cow", "hen", "fox", "owl", "pig", "bee"]
CHAT = [{"prompt": f"What does the {a} do?", "completion": f"The {a} sleeps {k}."} for k, a in enumerate(ANIMALS)]
CHAT += [{"prompt": "What do they do? " + "And then? " * 12, "completion": "They sleep."}]  # a row of its own
TEXTS = [{"text": f"The {a} is {w}.", "label": w} for a in ANIMALS for w in ("here", "there")]
FLAGS = "--context 32 --batch-size 4 --micro-batch 1 --max-steps 12 --eval-every 4 --save-every 3 --log-every 1"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    texts = [TURNS.written("user", p["prompt"]) + TURNS.written("assistant", p["completion"]) for p in CHAT]
    tokenizer = WordTokenizer.train([*texts, *(t["text"] for t in TEXTS)], min_count=1)
    config = Mamba2Config(len(tokenizer), d_model=32, n_layer=2, d_state=8, headdim=16, chunk_size=16)
    Mamba2LM(config, seed=0).save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    for name, records in (("chat", CHAT), ("classify", TEXTS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def finetuned(base, out, count, task, method, *more):
    """Status and output of each of `count` processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "mamba2_min.finetune", "--model", base, "--data", base / f"{task}.jsonl"]
    words += ["--out", out, "--task", task, "--method", method, *FLAGS.split(), *more]
    words += ["--device", "cpu", "--threads", "1", "--precision", "float32", "--val-fraction", "0.3"]
    running = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in place.items()} if count > 1 else {}
        running.append(Command(*words, environment=environment))
    return [(done.returncode, done.stdout, done.stderr) for done in [one.wait() for one in running]]


@pytest.mark.parametrize(
    ("task", "method"),
    [
        ("chat", "lora"),
        *(pytest.param(*names, marks=pytest.mark.slow) for names in (("chat", "full"), ("classify", "lora"))),
    ],
    ids=str,
)
def test_two_processes_leave_the_files_of_one(base, tmp_path, task, method):
    for name, count in (("alone", 1), ("run", 2)):
        said = finetuned(base, tmp_path / name, count, task, method)
        assert [status for status, _, _ in said] == [0] * count, said
        assert "all 12 steps done" in said[0][1] and not any(out for _, out, _ in said[1:])  # one screen
    alone, run = tmp_path / "alone", tmp_path / "run"
    assert {p.name for p in alone.iterdir()} == {p.name for p in run.iterdir()}
    assert (alone / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()
    a, b = (load_tensors(folder / "last.pt") for folder in (alone, run))
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert a["best_step"] == b["best_step"] > 0


def test_a_sweep_is_for_one_process(base, tmp_path):
    for status, _, error in finetuned(base, tmp_path / "run", 2, "chat", "lora", "--sweep", "1e-3"):
        assert status == 2 and error.startswith("error: --sweep takes one process") and error.count("\n") == 1
