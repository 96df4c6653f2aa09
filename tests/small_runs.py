"""Trainings that are small enough to run dozens: documents, a model, a trainer, and train.py in its own process.

The processes (forked.py) write to a terminal, a pipe or a file, have limits, and receive signals.
"""

import importlib.util
import os
import random
import resource
import signal
import sys
from pathlib import Path

import torch
from forked import ROOT, fork, status_of

from mamba2_min.checkpoints import checkpoint
from mamba2_min.config import Mamba2Config
from mamba2_min.data.corpus import load_corpus
from mamba2_min.errors import run_script
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.settings import Settings
from mamba2_min.training.trainer import Trainer

SHAPE = {"d_model": 16, "n_layer": 1, "d_state": 4, "headdim": 8, "chunk_size": 8}
STATE = (
    "model",
    "optimizer",
    "windows",
    "guard",
    "torch_rng",
    "step",
    "pending",
    "records",
    "best",
    "best_step",
    "evaluated_step",
    "stale",
    "micro_batch",
)


def write_documents(folder, count=12, words=60, seed=0):
    """Documents of random sentences from few words, so that there is something to learn."""
    draw = random.Random(seed)
    names = ["owl", "fox", "hen", "cat", "dog", "cow", "bee", "ant"]
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        said = " ".join(f"The {draw.choice(names)} saw the {draw.choice(names)}." for _ in range(words // 5))
        (folder / f"{k:03}.md").write_text(f"{said} That was story {k}.\n")
    return folder


def make_trainer(
    out, data, dropout=0.1, resume=False, device="cpu", model=None, accept_documents=False, report=None, **settings
):
    """A Trainer of the smallest model; `settings` are those of Settings."""
    tokenizer = None
    if resume and (out / checkpoint.TOKENIZER).exists():
        tokenizer = checkpoint_tokenizer(out)
    corpus = load_corpus(data, min_count=1, tokenizer=tokenizer)
    if model is None:
        model = Mamba2LM(Mamba2Config(vocab_size=len(corpus.tokenizer), dropout=dropout, **SHAPE), seed=0)
    asked = {
        "context": 16,
        "batch_size": 3,
        "max_steps": 12,
        "eval_every": 4,
        "save_every": 3,
        "lr": 0.01,
        "log_every": 2,
        "precision": "float32",
        **settings,
    }
    report = report or (lambda event, values: None)
    return Trainer(model, corpus, Settings(**asked), out, device, resume, report, accept_documents)


def checkpoint_tokenizer(out):
    from mamba2_min.data.tokenizer import WordTokenizer

    return WordTokenizer.load(out / checkpoint.TOKENIZER)


def same(a, b):
    """Whether two nested structures of tensors and plain values are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(one, other):
    """Two runs' folders hold the same files, best weights, metrics, and everything that the next step depends on."""
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}
    a, b = (checkpoint.load_tensors(folder / checkpoint.RESUME) for folder in (one, other))
    for name in STATE:
        assert same(a[name], b[name]), name
    best = [checkpoint.load_tensors(folder / checkpoint.WEIGHTS) for folder in (one, other)]
    assert same(*best)
    lines = [(folder / checkpoint.METRICS).read_text() for folder in (one, other)]
    assert lines[0] == lines[1]


def load_script():
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "train.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


class Training:
    """train.py with `arguments` in its own process, which writes to the file `said`.

    `limits`: {resource.RLIMIT_...: most}, where the most of RLIMIT_AS is counted from what the process has when it
    starts. `stdout`: what it opens as its standard output instead, such as a pipe's name or /dev/full; `terminal`: what
    it opens as its terminal, alone in a session. `encoding`: that of its streams. `nohup`: it starts under nohup.
    `environment`: variables that it has beside its own.
    """

    def __init__(self, *arguments, said, **options):
        self.said = said
        self.process = fork(_child, (list(map(str, arguments)), said), options)

    @property
    def pid(self):
        return self.process.pid

    def wait(self, timeout=120):
        """The exit status, as `status_of` has it."""
        status = status_of(self.process, timeout)
        assert status is not None, f"still running after {timeout} seconds: {self.text()}"
        return status

    def text(self):
        return self.said.read_text() if self.said.exists() else ""


def _child(arguments, said, limits=None, stdout=None, terminal=None, encoding=None, nohup=False, environment=None):
    os.environ.update(environment or {})
    if terminal:
        os.setsid()
    both = os.open(terminal or said, os.O_RDWR | os.O_CREAT, 0o644)  # the first terminal of a session is its own
    only = os.open(stdout, os.O_WRONLY) if stdout else both
    os.dup2(only, 1)
    os.dup2(both, 2)
    if encoding:
        sys.stdout.reconfigure(encoding=encoding, errors="strict")
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    for limit, most in (limits or {}).items():
        if limit == resource.RLIMIT_AS:
            most += 4096 * int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(limit, (most, most))
    sys.argv = ["train.py", "--threads", "1", "--device", "cpu", "--precision", "float32", *arguments]
    try:
        run_script(load_script().main)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
