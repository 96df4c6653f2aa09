"""A run of an earlier version loads, completes text, and resumes to what that version reached when it resumed it.

fixtures/run_before is a run of commit dd0c608, stopped by SIGTERM at step 53 of 140. afterwards.json holds the losses
that this version had when it went on, and the texts that it completed with the stopped run's model.pt. Known words
are no longer glued together ("theThere"), so that text is of a later version.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import assert_same_run

from mamba2_min.checkpoints import checkpoint
from mamba2_min.inference.completer import Completer
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.ops.sampling import Sampler
from mamba2_min.training.metrics import read_metrics
from mamba2_min.training.runs import plan_run
from mamba2_min.training.trainer import Trainer

RUN = Path(__file__).parent / "fixtures" / "run_before"
AFTERWARDS = json.loads((RUN / "afterwards.json").read_text(encoding="utf-8"))
FILES = (*(name for name in checkpoint.RUN_FILES if name != checkpoint.CURVE),)


@pytest.fixture(autouse=True)
def one_thread_and_no_pictures(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def copy(tmp_path):
    """Makes a copy of the run's files."""

    def make(name):
        (tmp_path / name).mkdir()
        for file in FILES:
            shutil.copy(RUN / file, tmp_path / name / file)
        return tmp_path / name

    return make


class Stopped(BaseException):
    """What ends a training in the place of a kill."""


def resume(out, stop_at=None):
    """Resumes a run as train.py --resume does; `stop_at`: the step after which it is stopped."""
    plan = plan_run(out, {"data": str(RUN / "documents")}, resume=True)
    assert plan.resume and plan.training.context == 24 and plan.model["d_state"] == 4
    corpus = plan.corpus(out)

    def report(event, values):
        if event == "step" and values["step"] == stop_at:
            raise Stopped

    model = Mamba2LM(plan.config(corpus), seed=plan.training.seed)
    trainer = Trainer(model, corpus, plan.training, out, "cpu", plan.resume, report)
    assert trainer.resumed
    try:
        return trainer.train()
    except Stopped:
        return None


def test_it_completes_text():
    completer = Completer.load(RUN)
    for c in AFTERWARDS["completions"]:
        completer.known_words = c["known_words"]
        sampler = Sampler(temperature=c["temperature"], seed=c["seed"])
        text = "".join(completer.complete(c["prompt"], c["max_tokens"], sampler))
        assert text.rstrip("\n") == c["text"].rstrip("\n")


def test_it_resumes_to_what_the_version_before_reached(copy):
    out = copy("run")
    before = read_metrics(out / "metrics.jsonl")
    result = resume(out)
    assert (result.reason, result.step, result.best_step) == tuple(
        AFTERWARDS[name] for name in ("reason", "step", "best_step")
    )
    records = read_metrics(out / "metrics.jsonl")
    assert records[: len(before)] == before and before[-1]["step"] == 53
    for split in ("train", "validation"):
        now = {str(r["step"]): r["loss"] for r in records[len(before) :] if r["split"] == split}
        assert now.keys() == AFTERWARDS[split].keys()
        # Another CPU rounds otherwise, and each step adds to the difference.
        for step, loss in AFTERWARDS[split].items():
            assert math.isclose(now[step], loss, rel_tol=1e-5), (split, step)


def test_interrupted_again_it_ends_with_the_same_bits(copy):
    whole, parts = copy("whole"), copy("parts")
    resume(whole)
    for stop_at in (54, 71, 100, 119):
        assert resume(parts, stop_at) is None
    assert resume(parts).step == 140
    assert_same_run(whole, parts)


def test_a_run_that_has_ended_is_left_as_it_is(copy):
    out = copy("run")
    first = resume(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert resume(out) == first
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
