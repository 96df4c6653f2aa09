"""The trainer as a library: what a step does, when a run ends, and that an interruption changes nothing."""

import dataclasses
import json
import math
import os
import shutil

import pytest
import torch
from small_runs import SHAPE, assert_same_run, make_trainer, same, write_documents
from torch.nn import functional as F

from mamba2_min import files
from mamba2_min.checkpoints import checkpoint
from mamba2_min.config import Mamba2Config
from mamba2_min.data.corpus import load_corpus
from mamba2_min.data.windows import Windows
from mamba2_min.errors import UserError
from mamba2_min.evaluation.perplexity import evaluate
from mamba2_min.models.base import decay_groups
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.settings import Settings, learning_rate
from mamba2_min.training.gradients import batch_gradients
from mamba2_min.training.guards import JUMPED, NOT_FINITE, LossGuard
from mamba2_min.training.metrics import MetricsLog, read_metrics
from mamba2_min.training.trainer import Trainer


@pytest.fixture(autouse=True)
def one_thread_and_no_pictures(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)
    yield
    torch.set_num_threads(threads)


def weights_of(folder):
    """What Mamba2LM.from_pretrained(folder) has, the tied head included."""
    return dict(Mamba2LM.from_pretrained(folder).state_dict())


# What a step does


@pytest.mark.parametrize(
    "values",
    [
        {"context": 0},
        {"batch_size": 0},
        {"micro_batch": -1},
        {"context": 2.5},
        {"context": True},
        {"seed": 2**63},
        {"max_steps": 10**12},
        {"max_minutes": -1.0},
        {"max_minutes": math.inf},
        {"max_minutes": 10**400},
        {"lr": 0.0},
        {"lr": math.nan},
        {"lr": "fast"},
        {"lr": 1e-6, "min_lr": 1e-3},
        {"beta1": 1.0},
        {"beta2": "x"},
        {"clip": -1.0},
        {"patience": None},
        {"precision": "int4"},
        {"deterministic": 1},
        {"max_bad_steps": 0},
        {"compile": "yes"},
        {"recompute": 1},
    ],
)
def test_impossible_settings_are_value_errors(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Settings(**values)


def test_the_learning_rate_warms_up_linearly_and_falls_as_a_cosine():
    s = Settings(lr=1.0, min_lr=0.1, warmup_steps=4)
    assert [learning_rate(0, step, s) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(0.0, 4, s) == 1.0
    assert learning_rate(0.5, 50, s) == pytest.approx(0.55)
    assert learning_rate(1.0, 100, s) == learning_rate(1.7, 170, s) == pytest.approx(0.1)
    assert learning_rate(0.0, 0, dataclasses.replace(s, warmup_steps=0)) == 1.0


def test_the_learning_rate_follows_the_clock_where_that_is_the_limit(tmp_path, data):
    trainer = make_trainer(tmp_path / "run", data, max_minutes=2.0, max_steps=1000)
    assert trainer.progress == 0
    trainer.seconds = 60.0
    assert trainer.progress == 0.5 and trainer.ended() == ""
    trainer.step = 900  # whichever is further
    assert trainer.progress == 0.9
    trainer.seconds = 120.0
    assert trainer.ended() == "max_minutes"


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_alone_are_decayed(tied):
    config = Mamba2Config(vocab_size=40, tie_embeddings=tied, proj_bias=True, **SHAPE)
    model = Mamba2LM(config)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in decay_groups(model, 0.3))
    matrices = ("embedding.weight", "in_proj.weight", "out_proj.weight", "lm_head.weight")
    assert decayed == {name for name in names.values() if name.endswith(matrices)}
    assert len(decayed) == 3 if tied else 4
    vectors = ("A_log", ".D", "dt_bias", "norm.weight", "norm_f.weight", ".bias", "conv1d.weight")
    assert free and all(name.endswith(vectors) for name in free)
    assert decayed | free == set(names.values())
    assert [group["weight_decay"] for group in decay_groups(model, 0.3)] == [0.3, 0.0]


def test_micro_batches_add_up_to_the_batch(tmp_path, data):
    gradients = []
    for micro in (0, 1, 3, 4):
        trainer = make_trainer(tmp_path / "run", data, dropout=0.0, context=200, batch_size=8, micro_batch=micro)
        input_ids, targets = next(trainer.windows)
        assert (targets == -100).any()  # parts with fewer targets weigh less
        loss = batch_gradients(trainer, trainer.team, input_ids, targets)
        assert loss == pytest.approx(float(trainer.model.loss(input_ids, targets).detach()), rel=1e-5)
        gradients.append([p.grad.clone() for p in trainer.model.parameters()])
    for others in gradients[1:]:
        for whole, parts in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_a_training_learns_and_leaves_what_it_should(tmp_path, data):
    out = tmp_path / "run"
    result = make_trainer(out, data, max_steps=40, eval_every=10).train()
    records = read_metrics(out / "metrics.jsonl")
    validation = [r for r in records if r["split"] == "validation"]
    train = [r for r in records if r["split"] == "train"]
    assert (result.reason, result.step) == ("max_steps", 40)
    assert [r["step"] for r in validation] == [10, 20, 30, 40] and [r["step"] for r in train] == list(range(2, 41, 2))
    assert validation[-1]["loss"] < validation[0]["loss"] - 0.5
    assert result.best.loss == pytest.approx(min(r["loss"] for r in validation), rel=1e-6)
    assert {p.name for p in out.iterdir()} == {"config.json", "tokenizer.json", "model.pt", "last.pt", "metrics.jsonl"}
    words = json.loads((out / "tokenizer.json").read_text())["words"]
    assert Mamba2LM.from_pretrained(out).config.vocab_size == 257 + len(words)


def test_it_takes_ten_epochs_unless_told_otherwise(tmp_path, data):
    trainer = make_trainer(tmp_path / "run", data, max_steps=0, batch_size=1)
    per_epoch = trainer.windows.targets_per_epoch / 16
    assert trainer.settings.max_steps == round(10 * per_epoch)
    assert make_trainer(tmp_path / "run", data, max_steps=0, batch_size=99).settings.max_steps == 200
    assert make_trainer(tmp_path / "run", data, max_steps=0, epochs=2**31 - 1).settings.max_steps == 2**31 - 1
    assert make_trainer(tmp_path / "run", data, max_steps=0, batch_size=1, epochs=60).settings.max_steps == round(
        60 * per_epoch
    )


@pytest.mark.parametrize("context", [16, 100_000])
def test_a_corpus_of_twenty_tokens_trains(tmp_path, context):
    (tmp_path / "a.md").write_text("one two three four five six seven eight nine ten.")
    result = make_trainer(tmp_path / "run", tmp_path, context=context, max_steps=4).train()
    assert result.step == 4 and math.isfinite(result.best.loss)


# The exact validation loss


@pytest.mark.parametrize("window", [1, 7, 64, 100_000])
def test_evaluation_is_the_full_context_perplexity_whatever_the_window(data, window):
    corpus = load_corpus(data, min_count=1)
    model = Mamba2LM(Mamba2Config(vocab_size=len(corpus.tokenizer), **SHAPE), seed=1).double().eval()
    ids = torch.cat([torch.tensor([corpus.tokenizer.eos_id]), corpus.validation.long()])[None]
    with torch.no_grad():
        logits, _ = model(ids[:, :-1])
    nats = float(F.cross_entropy(logits[0], ids[0, 1:], reduction="sum"))
    model.train()
    score = evaluate(model, corpus.validation, corpus.validation_bytes, corpus.tokenizer.eos_id, window)
    assert score.nats == pytest.approx(nats, rel=1e-6)
    assert score.tokens == len(corpus.validation) and model.training
    assert score.perplexity == pytest.approx(math.exp(nats / score.tokens))
    text = sum(len((data / f"{k:03}.md").read_text().strip().encode()) + 1 for k in range(12))
    assert score.n_bytes == corpus.validation_bytes == text - corpus.train_bytes
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / score.n_bytes)


# Early stopping


def test_early_stopping_restores_the_best(tmp_path):
    data = write_documents(tmp_path / "data", count=4, words=15, seed=1)  # few enough to be learnt by heart
    seen = {}

    def report(event, values):
        if event == "evaluation":
            seen[values["step"]] = (values, {k: v.clone() for k, v in trainer.model.state_dict().items()})

    out = tmp_path / "run"
    trainer = make_trainer(
        out, data, max_steps=600, eval_every=5, patience=3, min_delta=0.01, lr=0.05, dropout=0.0, report=report
    )
    result = trainer.train()
    assert result.reason == "patience" and result.step < 600
    assert [values["stale"] for values, _ in list(seen.values())[-3:]] == [1, 2, 3]
    assert result.step - result.best_step == 3 * 5
    best = math.inf
    for values, _ in seen.values():
        better = values["score"].loss < best - 0.01
        assert values["best"] == better
        best = values["score"].loss if better else best
    assert result.best.loss == best
    assert same(weights_of(out), seen[result.best_step][1])
    assert same(dict(trainer.model.state_dict()), seen[result.best_step][1])
    assert not trainer.model.training


def test_a_picture_that_memory_is_too_small_for_costs_the_picture_alone(tmp_path, data, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise ImportError("ft2font.so: failed to map segment from shared object")

    monkeypatch.undo()  # let it draw
    monkeypatch.setattr("mamba2_min.plots.plot_loss", fails)
    result = make_trainer(tmp_path / "run", data, max_steps=3).train()
    assert result.step == 3 and (tmp_path / "run" / "model.pt").exists()
    assert "note: loss.png is not drawn: ft2font.so: failed to map" in capsys.readouterr().err


def test_patience_zero_never_stops(tmp_path, data):
    result = make_trainer(tmp_path / "run", data, max_steps=6, eval_every=1, patience=0, min_delta=100.0).train()
    assert (result.reason, result.step, result.best_step) == ("max_steps", 6, 1)


# Resuming


class Killed(BaseException):
    """Raised by a test where a process might be killed."""


class Crash:
    """Ends a training at its n-th event: a step, an evaluation, a flush, a rename, an appended line."""

    def __init__(self, monkeypatch, at=None):
        self.at, self.moments = at, 0
        for owner, name in ((os, "fsync"), (os, "replace"), (MetricsLog, "append"), (checkpoint, "save_json")):
            monkeypatch.setattr(owner, name, self.around(getattr(owner, name)))

    def pass_by(self, *ignored):
        self.moments += 1
        if self.moments == self.at:
            raise Killed

    def around(self, function):
        def wrapper(*args, **kwargs):
            self.pass_by()
            value = function(*args, **kwargs)
            self.pass_by()
            return value

        return wrapper


EVERYTHING = {"max_steps": 9, "eval_every": 2, "save_every": 3, "micro_batch": 2, "patience": 2, "min_delta": 0.3}


def sitting(out, data, at=None):
    with pytest.MonkeyPatch.context() as patch:
        crash = Crash(patch, at)
        trainer = make_trainer(out, data, resume=True, report=crash.pass_by, **EVERYTHING)
        try:
            trainer.train()
        except Killed:
            with files.locked(out, checkpoint.RUN_FILES):  # as the next process will: takes half-written files away
                return crash.moments
        return crash.moments


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_draw", lambda self: None)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        moments = sitting(out, data)
        torch.set_num_threads(threads)
    records = read_metrics(out / "metrics.jsonl")
    assert any(not r["best"] for r in records if r["split"] == "validation")  # patience was on its way
    return out, moments


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_ends_as_if_it_never_was(tmp_path, data, undisturbed, every):
    expected, moments = undisturbed
    for at in range(1, moments + 1, every):
        out = tmp_path / f"{at}"
        sitting(out, data, at)
        sitting(out, data)
        assert_same_run(expected, out)
        shutil.rmtree(out)


def test_a_run_killed_again_and_again_ends_as_if_it_never_was(tmp_path, data, undisturbed):
    expected, _ = undisturbed
    for at in (5, 30, 3, 28, 26, 40, 11, 35):
        sitting(tmp_path / "run", data, at)
    sitting(tmp_path / "run", data)
    assert_same_run(expected, tmp_path / "run")


def test_going_on_with_more_steps_equals_having_asked_for_them(tmp_path, data):
    """Two times N steps equal 2N, where the learning rate does not depend on the number of steps."""
    flat = {"warmup_steps": 0, "min_lr": 0.01, "eval_every": 6}
    make_trainer(tmp_path / "whole", data, max_steps=12, **flat).train()
    make_trainer(tmp_path / "halves", data, max_steps=6, **flat).train()
    make_trainer(tmp_path / "halves", data, max_steps=12, resume=True, **flat).train()
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_a_run_that_has_ended_is_left_as_it_is(tmp_path, data):
    out = tmp_path / "run"
    first = make_trainer(out, data, max_steps=5).train()
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.iterdir()}
    trainer = make_trainer(out, data, max_steps=5, resume=True)
    assert trainer.train() == first
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.iterdir()} == before
    assert same(dict(trainer.model.state_dict()), weights_of(out))


def test_nothing_is_written_before_the_training_starts(tmp_path, data):
    make_trainer(tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


def test_another_run_cannot_be_gone_on_with(tmp_path, data):
    out = tmp_path / "run"
    make_trainer(out, data, max_steps=3).train()
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def refused(match, **changes):
        with pytest.raises(UserError, match=match) as error:
            make_trainer(out, changes.pop("data", data), resume=True, **{"max_steps": 3, **changes})
        assert "\n" not in str(error.value)
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before

    refused("weight_decay was 1.0 when the run in .* began, and is now 0.5", weight_decay=0.5)
    refused("batch_size was 3", batch_size=4)
    refused("dropout was 0.1, now 0.0", dropout=0.0)
    other = write_documents(tmp_path / "other", seed=9)
    refused("the documents are not those .* --accept documents", data=other)
    words = json.loads(before["tokenizer.json"])["words"]
    from mamba2_min.data.tokenizer import WordTokenizer

    WordTokenizer(words[::-1]).save(out / "tokenizer.json")
    before["tokenizer.json"] = (out / "tokenizer.json").read_bytes()
    refused("the vocabulary in .*tokenizer.json is not the one that the run began with")


def test_more_documents_can_be_accepted(tmp_path, data):
    out = tmp_path / "run"
    make_trainer(out, data, max_steps=6).train()
    weights = checkpoint.load_tensors(out / "last.pt")["model"]
    more = write_documents(tmp_path / "more", count=20, seed=5)
    trainer = make_trainer(out, more, max_steps=9, resume=True, accept_documents=True)
    assert same(dict(trainer.model.state_dict()), weights)
    assert (trainer.step, trainer.best, trainer.windows.epochs) == (6, None, 0)
    assert any("other documents" in note for note in trainer.notes)
    result = trainer.train()
    assert result.step == 9 and result.best_step > 6
    assert make_trainer(out, more, max_steps=9, resume=True).train().best == result.best  # now they are its own


def test_what_the_last_bit_depends_on_is_said(tmp_path, data):
    out = tmp_path / "run"
    make_trainer(out, data, max_steps=3).train()
    assert not make_trainer(out, data, max_steps=3, resume=True).notes
    torch.set_num_threads(2)
    notes = make_trainer(out, data, max_steps=3, resume=True).notes
    assert notes == ["the last bits may differ from those of an undisturbed run: threads was 1, now 2"]


# Losses that go wrong


def test_the_guard_knows_a_jump_from_noise():
    noise = torch.Generator().manual_seed(0)
    guard = LossGuard(10.0)
    for k in range(400):  # falls, and scatters by 0.3
        loss = 2 + 6 * math.exp(-k / 50) + 0.3 * float(torch.randn((), generator=noise))
        assert guard.judge(loss, 1.0) == ""
    assert guard.judge(7.0, 1.0) == JUMPED
    assert guard.judge(7.0, 1.0, share=0.1) == ""  # few targets scatter more
    assert guard.judge(2.0, 1.0) == ""
    assert (guard.in_a_row, guard.skipped) == (0, 1)
    assert guard.judge(math.nan, 1.0) == guard.judge(2.0, math.inf) == guard.judge(-math.inf, 0.0) == NOT_FINITE
    assert (guard.in_a_row, guard.skipped, guard.reason) == (3, 4, NOT_FINITE)
    again = LossGuard(10.0)
    again.load_state_dict(guard.state_dict())
    assert again.state_dict() == guard.state_dict()


def test_nothing_jumps_early_or_where_that_is_off():
    guard = LossGuard(10.0)
    assert all(guard.judge(loss, 1.0) == "" for loss in [1.0] * 15 + [1000.0])
    guard = LossGuard(0.0)
    assert all(guard.judge(loss, 1.0) == "" for loss in [1.0] * 50 + [1e30])


class Spoiled(Mamba2LM):
    """A model whose loss is multiplied by `spoil[n]` in its n-th call."""

    def __init__(self, config, seed, spoil):
        super().__init__(config, seed)
        self.spoil, self.calls = spoil, 0

    def loss(self, *args, **kwargs):
        self.calls += 1
        return super().loss(*args, **kwargs) * self.spoil.get(self.calls, 1.0)


def spoiled(data, spoil):
    size = len(load_corpus(data, min_count=1).tokenizer)
    return Spoiled(Mamba2Config(vocab_size=size, **SHAPE), 0, spoil)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 50.0])
def test_a_step_that_goes_wrong_is_skipped_and_counted(tmp_path, data, bad):
    skipped, weights = [], {}

    def report(event, values):
        if event == "skipped":
            skipped.append((values["step"], values["why"]))
        if event == "step":
            weights[values["step"]] = {k: v.clone() for k, v in trainer.model.state_dict().items()}

    trainer = make_trainer(
        tmp_path / "run", data, max_steps=24, eval_every=24, model=spoiled(data, {20: bad, 22: bad}), report=report
    )
    result = trainer.train()
    assert skipped == [(20, JUMPED if bad == 50.0 else NOT_FINITE), (22, JUMPED if bad == 50.0 else NOT_FINITE)]
    assert same(weights[19], weights[20]) and not same(weights[20], weights[21])
    assert (result.reason, trainer.guard.skipped, trainer.guard.in_a_row) == ("max_steps", 2, 0)
    lines = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["split"] == "train"]
    assert lines[-1]["skipped"] == 2 and all(math.isfinite(r["loss"]) for r in lines)


def test_after_many_bad_steps_it_stops_and_the_best_stays(tmp_path, data):
    out = tmp_path / "run"
    model = spoiled(data, {k: math.nan for k in range(8, 100)})
    trainer = make_trainer(out, data, max_steps=50, max_bad_steps=6, model=model)
    result = trainer.train()
    assert (result.reason, result.step, result.best_step) == ("bad steps", 13, 8)  # weights of step 7; 8 to 13 are bad
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(out).values())
    records = read_metrics(out / "metrics.jsonl")
    assert [r["loss"] for r in records if r["split"] == "train"][-2:] == [None, None]
    assert make_trainer(out, data, max_steps=50, max_bad_steps=6, dropout=0.0, resume=True).train() == result
    # The rate may be another one, which is then the run's own; and the guard judges anew.
    with pytest.raises(UserError, match="seed was 0"):
        make_trainer(out, data, max_steps=50, max_bad_steps=6, dropout=0.0, resume=True, lr=1e-3, seed=3)
    trainer = make_trainer(out, data, max_steps=50, max_bad_steps=6, dropout=0.0, resume=True, lr=1e-3)
    assert any("learning rate 0.001 from here on" in note for note in trainer.notes)
    result = trainer.train()
    assert (result.reason, result.step, trainer.guard.skipped) == ("max_steps", 50, 6)
    rates = [r["lr"] for r in read_metrics(out / "metrics.jsonl") if r["split"] == "train" and r["step"] > 13]
    assert rates and max(rates) <= 1e-3
    assert make_trainer(out, data, max_steps=50, max_bad_steps=6, dropout=0.0, resume=True, lr=1e-3).train() == result


# Memory


class Greedy(Mamba2LM):
    """A model that runs out of memory with more than `most` windows at a time."""

    most = 2

    def loss(self, input_ids, targets):
        if len(input_ids) > self.most:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory")
        return super().loss(input_ids, targets)


def greedy(data, most):
    model = Greedy(Mamba2Config(vocab_size=len(load_corpus(data, min_count=1).tokenizer), **SHAPE), seed=0)
    model.most = most
    return model


def test_where_memory_runs_out_the_micro_batch_is_halved_and_the_batch_stays(tmp_path, data):
    said = []
    trainer = make_trainer(
        tmp_path / "adapted",
        data,
        batch_size=8,
        adapt_micro_batch=True,
        model=greedy(data, 2),
        dropout=0.0,
        report=lambda event, values: said.append(values) if event == "memory" else None,
    )
    trainer.train()
    assert said == [{"step": 1, "micro_batch": 4}, {"step": 1, "micro_batch": 2}]
    make_trainer(tmp_path / "asked", data, batch_size=8, micro_batch=2, dropout=0.0).train()
    assert same(weights_of(tmp_path / "adapted"), weights_of(tmp_path / "asked"))
    again = make_trainer(tmp_path / "adapted", data, batch_size=8, adapt_micro_batch=True, dropout=0.0, resume=True)
    assert again.micro_batch == 2


@pytest.mark.parametrize(
    ("micro", "most", "adapt", "advice"),
    [
        (0, 2, False, "--micro-batch 4 .* or --batch-size auto"),
        (1, 0, False, "lower --context"),
        (0, 0, True, "lower --context"),
    ],
)
def test_out_of_memory_is_one_line_that_says_what_to_lower(tmp_path, data, micro, most, adapt, advice):
    trainer = make_trainer(
        tmp_path / "run", data, batch_size=8, micro_batch=micro, adapt_micro_batch=adapt, model=greedy(data, most)
    )
    with pytest.raises(UserError, match=f"out of memory in step 1, .*{advice}") as error:
        trainer.train()
    assert "\n" not in str(error.value)


def test_blocks_that_are_recomputed_train_to_the_same_weights(tmp_path, data):
    for name, recompute in (("kept", False), ("again", True)):
        make_trainer(tmp_path / name, data, recompute=recompute, dropout=0.1, max_steps=6).train()
    assert same(weights_of(tmp_path / "kept"), weights_of(tmp_path / "again"))


class Compiler:
    """Replaces torch.compile: computes what a block does, or what a faulty compiler makes of it."""

    def __init__(self, fault=None):
        self.fault, self.calls, self.sizes = fault, 0, []

    def __call__(self, forward, dynamic):
        def run(block, *args):
            self.calls += 1
            self.sizes.append(len(args[0]))
            if self.fault == "no memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            if self.fault == "fails":
                raise RuntimeError("InductorError: no C++ compiler\nand much more")
            x, *states = forward(block, *args)
            if self.fault == "loses gradients":
                x = args[0] + (x - args[0]).detach()
            return torch.full_like(x, math.nan) if self.fault == "NaN" else x, *states

        return run


@pytest.fixture(scope="module")
def uncompiled(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("runs") / "plain"
    make_trainer(out, data, max_steps=4, dropout=0.1).train()
    return weights_of(out)


@pytest.mark.parametrize("fault", [None, "fails", "loses gradients", "NaN", "no memory"])
def test_a_run_is_compiled_or_goes_on_without_and_says_so(tmp_path, data, monkeypatch, uncompiled, fault):
    monkeypatch.setattr(torch, "compile", compiler := Compiler(fault))
    said = []
    trainer = make_trainer(
        tmp_path / "run",
        data,
        compile=True,
        max_steps=4,
        dropout=0.1,
        report=lambda event, values: said.append(values) if event == "compiled" else None,
    )
    trainer.train()
    assert same(weights_of(tmp_path / "run"), uncompiled)
    (answer,) = said
    assert answer["step"] == 1
    if fault is None:
        assert answer["why_not"] == "" and compiler.calls == 5 * SHAPE["n_layer"]  # the trial and four steps
    else:
        said = {"fails": "no C++ compiler", "NaN": "nan", "loses gradients": "norm", "no memory": "memory"}[fault]
        assert said in answer["why_not"]
        assert "\n" not in answer["why_not"]


def test_parts_of_each_size_are_proved(tmp_path, data, monkeypatch):
    monkeypatch.setattr(torch, "compile", compiler := Compiler())
    make_trainer(tmp_path / "run", data, compile=True, batch_size=8, micro_batch=3, max_steps=1).train()
    layers = SHAPE["n_layer"]
    assert compiler.sizes[: 2 * layers] == [3] * layers + [2] * layers  # the trial
    assert compiler.sizes[2 * layers :] == [3] * layers * 2 + [2] * layers


@pytest.mark.slow
def test_compiled_with_the_real_compiler(tmp_path, data):
    said = []
    trainer = make_trainer(
        tmp_path / "run",
        data,
        compile=True,
        max_steps=12,
        dropout=0.0,
        report=lambda event, values: said.append(values) if event == "compiled" else None,
    )
    trainer.train()
    assert [values["why_not"] for values in said] == [""]
    make_trainer(tmp_path / "plain", data, max_steps=12, dropout=0.0).train()
    losses = [read_metrics(tmp_path / name / "metrics.jsonl")[-1]["loss"] for name in ("run", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# metrics.jsonl


def test_a_torn_last_line_is_forgotten(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(step=1, split="train", loss=2.0, lr=0.1)
    log.append(step=2, split="validation", loss=math.nan, perplexity=math.inf)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + b'{"step": 3, "split": "tr')
    records = read_metrics(log.path)
    assert [r["step"] for r in records] == [1, 2] and records[1]["loss"] is None
    log.rewind(2)
    assert log.path.read_bytes() == whole
    log.rewind(1)
    log.append(step=2, split="validation", loss=1.5)
    assert [r["loss"] for r in read_metrics(log.path)] == [2.0, 1.5] and log.records == 2


def test_a_missing_metrics_file_holds_nothing(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.rewind(7)
    log.flush()
    assert read_metrics(log.path) == [] and log.records == 0


def test_a_training_goes_on_without_files_that_were_deleted_and_says_so(tmp_path, monkeypatch):
    """The weights are those of an undisturbed run; of metrics.jsonl the lines from then on are."""
    data = write_documents(tmp_path / "data")
    make_trainer(tmp_path / "whole", data).train()
    killed, step = make_trainer(tmp_path / "run", data), Trainer._step

    def step_or_end(trainer):
        if trainer.step == 7:
            raise KeyboardInterrupt
        step(trainer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_step", step_or_end)
        killed.train()
    for name in (checkpoint.METRICS, checkpoint.WEIGHTS):
        (tmp_path / "run" / name).unlink()
    again = make_trainer(tmp_path / "run", data, resume=True)
    assert (again.step, again.best) == (6, None)
    assert again.notes[-2:] == [
        "metrics.jsonl has 0 of the 4 lines that it had: the loss curve has a gap",
        "model.pt, the best model until now, is gone: looking for a new best",
    ]
    again.train()
    for name in (checkpoint.WEIGHTS, checkpoint.RESUME):
        a, b = (checkpoint.load_tensors(tmp_path / folder / name) for folder in ("whole", "run"))
        assert same(a["model"], b["model"]) if name == checkpoint.RESUME else same(a, b)
    lines = [(tmp_path / folder / checkpoint.METRICS).read_text() for folder in ("whole", "run")]
    assert lines[1] and lines[0].endswith(lines[1])


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"[]",
        b"{}",
        b'{"step": -1, "split": "train", "loss": 1, "lr": 1}',
        b"\xff",
        b"[" * 100_000,
        b'{"step": 1, "split": "test", "loss": 1}',
        b'{"step": 1, "split": "train", "loss": 1}',
        b'{"step": 1, "split": "validation", "loss": "low"}',
        b'{"step": 1, "split": "validation", "loss": 1e999}',
        b'{"step": 1.5, "split": "validation", "loss": 1}',
        b'{"step": 1, "split": "validation"}',
        b"",
    ],
)
def test_a_line_that_is_no_measurement_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "split": "validation", "loss": 1}\n' + line + b"\n")
    with pytest.raises(UserError, match="line 2 is not a measurement"):
        read_metrics(path)
    with pytest.raises(UserError, match="line 2 is not a measurement"):
        MetricsLog(path).rewind(2)


def test_windows_are_what_a_step_takes(tmp_path, data):
    trainer = make_trainer(tmp_path / "run", data, max_steps=3)
    expected = Windows(trainer.task.corpus.train, 16, 3, 0)
    assert all(map(torch.equal, next(trainer.windows), next(expected)))


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [True, False])
def test_going_on_on_a_gpu(tmp_path, data, deterministic):
    """Bit for bit with `deterministic`; without, within 1% of the loss."""
    kwargs = {
        "device": "cuda",
        "precision": "auto",
        "deterministic": deterministic,
        "max_steps": 40,
        "context": 64,
        "eval_every": 10,
        "save_every": 7,
    }

    def stop(event, values):
        if event == "step" and values["step"] == 25:
            raise Killed

    make_trainer(tmp_path / "whole", data, **kwargs).train()
    with pytest.raises(Killed):
        make_trainer(tmp_path / "parts", data, report=stop, **kwargs).train()
    make_trainer(tmp_path / "parts", data, resume=True, **kwargs).train()
    if deterministic:
        assert_same_run(tmp_path / "whole", tmp_path / "parts")
    losses = [[r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
