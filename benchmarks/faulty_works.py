"""Three activities for `benchmarks.faults`, small enough to start hundreds of times: training, fine-tuning, generating.

Each process is forked from one that has imported torch already. Otherwise it is what a user would start: it receives
signals, meets a full disk, and prints to a file.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch

from mamba2_min.checkpoints import checkpoint
from mamba2_min.config import Mamba2Config
from mamba2_min.data.corpus import load_corpus
from mamba2_min.errors import run_script
from mamba2_min.finetune import adapter
from mamba2_min.models.mamba2 import Mamba2LM

ROOT = Path(__file__).parent.parent
METRICS, RESUME = checkpoint.METRICS, checkpoint.RESUME
# What depends on the clock, or says where a file lies.
_NOT_COMPARED = ("seconds", "environment", "settings")
_ANIMALS = ["owl", "fox", "hen", "cat", "dog", "cow", "bee", "ant"]

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    [
        *("benchmarks.faulty_works", "torch._dynamo", "train", "data_generator", "mamba2_min.plots"),
        *("mamba2_min.training.runs", "mamba2_min.finetune.run", "mamba2_min.finetune.sweep"),
    ]
)


class Process:
    """`module`.main() with `arguments` in a process of its own, which prints to the file `said`."""

    def __init__(self, module: str, arguments: list[str], said: Path):
        self.said = said
        said.unlink(missing_ok=True)
        os.environ["PYTHONPATH"], os.environ["OMP_NUM_THREADS"] = str(ROOT), "1"  # for the server of forks
        forkserver.ensure_running()
        self._process = _processes.Process(target=_child, args=(module, arguments, said))
        self._process.start()

    def send(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def is_running(self) -> bool:
        return self._process.is_alive()

    def wait(self, seconds: float = 120) -> int:
        """The exit status as a shell gives it; one that takes longer is killed, which is -1."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            return -1
        status = self._process.exitcode
        return 128 - status if status < 0 else status

    def text(self) -> str:
        return self.said.read_text(errors="replace") if self.said.exists() else ""


def _child(module: str, arguments: list[str], said: Path) -> None:
    handle = os.open(said, os.O_RDWR | os.O_CREAT, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sys.argv = [module, *arguments]
    try:
        run_script(importlib.import_module(module).main)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class Work:
    """An activity that writes into the folder `out`, and can be stopped and started again.

    `module` and `arguments` are its command, `deletable` the files of `out` that a fault may take away, `progress()`
    how far it is, in units of which the whole has `whole`.
    """

    name, module = "", ""
    deletable: tuple[str, ...] = ()

    def __init__(self, arguments: list[object], out: Path, documents: Path):
        self.arguments, self.out, self.documents = [str(a) for a in arguments], out, documents
        self.whole = 0

    def start(self, said: Path) -> Process:
        return Process(self.module, [*self.arguments, "--out", str(self.out)], said)

    def into(self, out: Path) -> Work:
        """The same into another folder."""
        other = type(self)(list(self.arguments), out, self.documents)
        other.whole = self.whole
        return other

    def progress(self) -> int:
        return lines_of(self.out / checkpoint.METRICS)

    def result(self) -> dict[str, Any]:
        """What must be the same however the work was disturbed, by file."""
        found: dict[str, Any] = {}
        for path in sorted(self.out.iterdir()):
            if path.suffix == ".pt":
                tensors = checkpoint.load_tensors(path)
                found[path.name] = {name: value for name, value in tensors.items() if name not in _NOT_COMPARED}
            elif path.name in (checkpoint.METRICS, adapter.WEIGHTS):
                found[path.name] = path.read_bytes()
            else:
                found[path.name] = None  # that it is there
        return found


class Training(Work):
    name, module = "training", "train"
    deletable = ("last.pt", "model.pt", "metrics.jsonl", "tokenizer.json", "config.json", "settings.json", "loss.png")


class FineTuning(Work):
    name, module = "fine-tuning", "mamba2_min.finetune.__main__"
    deletable = ("last.pt", adapter.WEIGHTS, adapter.CONFIG, "metrics.jsonl", "settings.json", "loss.png")


class Generating(Work):
    """`whole` is the number of documents. A document that was deleted is replaced by the next that is good."""

    name, module = "generating", "data_generator"
    deletable = ("manifest.jsonl", "rejected.jsonl", ".lock")

    def progress(self) -> int:
        return lines_of(self.out / "manifest.jsonl")

    def result(self) -> dict[str, Any]:
        lines = [json.loads(line) for line in (self.out / "manifest.jsonl").read_text().splitlines()]
        texts = {line["file"]: (self.out / line["file"]).read_bytes() for line in lines}
        assert all(hashlib.sha256(texts[line["file"]]).hexdigest() == line["sha256"] for line in lines)
        assert sorted(texts) == sorted(path.name for path in self.out.glob("*.md"))
        # Numbers are given out once, so a document after a deleted one has another name.
        return {str(line["index"]): texts[line["file"]] for line in lines}


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def same(one: Any, other: Any) -> bool:
    """Whether two nested structures of tensors and plain values are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other


@contextmanager
def works(folder: Path) -> Iterator[list[Work]]:
    """The three activities, with their documents, base model and server, in `folder`."""
    sys.path.insert(0, str(ROOT / "tests"))
    from ollama_server import LASTING, OllamaServer, faults

    documents = _write_documents(folder / "documents")
    steps = ["--context", 16, "--batch-size", 3, "--log-every", 2, "--eval-every", 10, "--save-every", 4]
    steps += ["--max-steps", 60, "--patience", 0, "--threads", 1, "--device", "cpu", "--precision", "float32"]
    shape = ["--d-model", 16, "--n-layer", 1, "--d-state", 4, "--headdim", 8, "--chunk-size", 8, "--min-count", 1]
    training = Training([*steps, *shape, "--data", documents, "--resume"], folder / "run", documents)
    base, chats = _write_base(folder / "base", documents), _write_chats(folder / "chats")
    about = ["--model", base, "--data", chats, "--lora-r", 4, "--lora-dropout", 0.1, "--resume"]
    tuning = FineTuning([*steps, *about], folder / "tuned", chats)
    with OllamaServer() as server:
        server.misbehave = faults(0.3, (*LASTING, "busy", "reset", "cut"))
        asked = ["--host", server.url, "--documents", 24, "--workers", 2, "--backoff", 0.01, "--timeout", 5]
        yield [training, tuning, Generating(asked, folder / "generated", documents)]


def _write_documents(folder: Path) -> Path:
    draw = random.Random(0)
    folder.mkdir()
    for k in range(12):
        said = " ".join(f"The {draw.choice(_ANIMALS)} saw the {draw.choice(_ANIMALS)}." for _ in range(12))
        (folder / f"{k:03}.md").write_text(f"{said} That was story {k}.\n")
    return folder


def _write_chats(folder: Path) -> Path:
    pairs = [(a, b) for a in _ANIMALS for b in _ANIMALS if a != b]
    records = [{"prompt": f"Who saw the {b}?", "completion": f"The {a} saw the {b}."} for a, b in pairs]
    folder.mkdir()
    (folder / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def _write_base(folder: Path, documents: Path) -> Path:
    tokenizer = load_corpus(documents, min_count=1).tokenizer
    config = Mamba2Config(len(tokenizer), d_model=16, n_layer=1, d_state=4, headdim=8, chunk_size=8)
    Mamba2LM(config, seed=0).save_pretrained(folder)
    tokenizer.save(folder / checkpoint.TOKENIZER)
    return folder
