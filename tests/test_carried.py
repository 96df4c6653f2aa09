"""Streams whose rows go on, the state carried along them, averaged weights, dropouts that hold, documents from zero."""

import copy
import math

import pytest
import torch
from small_runs import SHAPE, assert_same_run, make_trainer, write_documents
from torch.nn import functional as F

from mamba2_min.checkpoints import checkpoint
from mamba2_min.config import Mamba2Config
from mamba2_min.data.corpus import load_corpus
from mamba2_min.data.streams import Streams, are_long
from mamba2_min.data.windows import document_windows
from mamba2_min.errors import UserError
from mamba2_min.evaluation.perplexity import evaluate
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.models.transformer import TransformerConfig, TransformerLM
from mamba2_min.ops.dropout import embedding_dropout, variational_dropout
from mamba2_min.settings import Settings
from mamba2_min.training.averaging import Average
from mamba2_min.training.carried import CarriedState
from mamba2_min.training.runs import read_plan
from mamba2_min.training.task import ModelFiles
from mamba2_min.training.trainer import Trainer

EVERYTHING = {"carry_state": True, "ema_decay": 0.9, "input_noise": 0.2}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)


def small_model(vocab_size=20, **more):
    return Mamba2LM(Mamba2Config(vocab_size=vocab_size, **{**SHAPE, **more}), seed=3)


# Streams


@pytest.mark.parametrize("trial", range(40))
def test_every_token_is_a_target_once_per_epoch_and_rows_go_on(trial):
    draw = torch.Generator().manual_seed(trial)
    lengths = torch.randint(1, 30, (int(torch.randint(1, 6, (), generator=draw)),), generator=draw)
    starts, n = lengths.cumsum(0) - lengths, int(lengths.sum())
    firsts = set((starts + 1).tolist())  # the tokens are 1, 2, ..., so that each tells where it stands
    rows, context = (int(torch.randint(1, 6, (), generator=draw)) for _ in range(2))
    rows = min(rows, n)
    streams = Streams(torch.arange(1, n + 1, dtype=torch.int32), starts, context, rows, start_id=0, seed=trial)
    for _ in range(3):
        seen, last = [], [None] * rows
        for window in range(streams.length):
            input_ids, targets, seq_idx, fresh = next(streams)
            assert input_ids.shape == targets.shape == seq_idx.shape == (rows, streams.context)
            assert fresh.all() or window
            for r in range(rows):
                for i in range(streams.context):
                    target = int(targets[r, i])
                    if target == -100:
                        assert (input_ids[r, i], seq_idx[r, i]) == (0, -1)
                        continue
                    seen.append(target)
                    first = target in firsts
                    assert input_ids[r, i] == (0 if first else target - 1)
                    if i:
                        assert (seq_idx[r, i] != seq_idx[r, i - 1]) == first
                    elif first:
                        assert fresh[r]
                    if last[r] is not None and not first and not (i == 0 and fresh[r]):
                        assert target == last[r] + 1
                    last[r] = target
        assert sorted(seen) == list(range(1, n + 1))


def test_a_place_in_the_streams_comes_back():
    tokens, starts = torch.arange(100, dtype=torch.int32), torch.tensor([0, 30, 31])
    streams = Streams(tokens, starts, 7, 3, 0, seed=5)
    for _ in range(8):
        next(streams)
    again = Streams(tokens, starts, 7, 3, 0, seed=5)
    again.load_state_dict(streams.state_dict())
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(next(streams), next(again), strict=True))
    for name, value in (("tokens", 99), ("rows", 4), ("context", 8), ("position", 10**6), ("epoch", "1")):
        with pytest.raises(UserError, match="cannot go on"):
            again.load_state_dict({**streams.state_dict(), name: value})


def test_a_text_is_long_where_half_of_it_is_in_long_documents():
    starts = torch.tensor([0, 10, 20])
    assert are_long(starts, 20 + 161, context=10)  # a document of 161 tokens, more than 16 windows
    assert not are_long(starts, 20 + 160, context=10)
    assert not are_long(torch.arange(0, 5000, 10), 5000 + 161, context=10)


# The carried state


def test_windows_with_the_state_carried_score_as_the_whole_rows_do():
    torch.manual_seed(0)
    tokens, starts = torch.randint(1, 20, (90,), dtype=torch.int32), torch.tensor([0, 17, 40, 41])
    model = small_model().double()
    streams = Streams(tokens, starts, 7, 3, 0, seed=1)
    carried, windows, losses = CarriedState(model), [], []
    for _ in range(streams.length):
        input_ids, targets, seq_idx, fresh = next(streams)
        windows.append((input_ids, targets, seq_idx, fresh))
        for part in (slice(0, 2), slice(2, 3)):  # in micro-batches
            state = carried.before(part, fresh)
            loss, state = model.loss_and_state(input_ids[part], targets[part], state, seq_idx[part], reduction="sum")
            losses.append(float(loss.detach()))
            carried.after(part, state)
        carried.commit(3)
    whole = [torch.cat(parts, 1) for parts in list(zip(*windows, strict=True))[:3]]
    # The rows at once: a document's number must not change where a window ends, only where a document begins.
    restarts = torch.cat([w[3][:, None].expand(-1, 1) for w in windows], 1)
    number = torch.zeros_like(whole[0])
    for w, (_, _, seq_idx, _) in enumerate(windows):
        at = w * 7
        number[:, at : at + 7] = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        number[:, at] = restarts[:, w]
    expected = float(model.loss_and_state(whole[0], whole[1], None, number.cumsum(1), reduction="sum")[0].detach())
    assert sum(losses) == pytest.approx(expected, rel=1e-9)


def test_a_step_that_is_computed_again_starts_from_the_same_state():
    model = small_model()
    carried, fresh = CarriedState(model), torch.tensor([False, True])
    ids = torch.randint(1, 20, (2, 5))
    for _ in range(2):  # the first try is given up
        state = carried.before(slice(0, 2), fresh)
        assert all(not t.any() for t in (*state.conv, *state.ssm))
        carried.after(slice(0, 2), model.hidden(ids, state)[1])
    carried.commit(2)
    once = model.hidden(ids)[1]
    after = carried.before(slice(0, 2), fresh)
    for mine, theirs in zip((*after.conv, *after.ssm), (*once.conv, *once.ssm), strict=True):
        assert torch.equal(mine[0], theirs[0]) and not mine[1].any() and not mine.requires_grad


def test_a_state_that_is_not_finite_does_not_outlive_its_step(tmp_path, data):
    trainer = make_trainer(tmp_path / "run", data, max_steps=6, **EVERYTHING)
    scored, broken = trainer.model.loss_and_state, []

    def breaks(*args, **more):
        loss, state = scored(*args, **more)
        if trainer.step == 2 and not broken:
            broken.append(state)
            state = state.clone()
            state.ssm[0][0, 0] = math.nan
            state.conv[0][1] = math.inf
        return loss, state

    trainer.model.loss_and_state = breaks
    trainer.train()
    assert broken and trainer.guard.skipped == 0
    assert all(t.isfinite().all() for t in (*trainer.carried.state.conv, *trainer.carried.state.ssm))
    make_trainer(tmp_path / "run", data, resume=True, max_steps=6, **EVERYTHING)


@pytest.mark.parametrize("stop_at", [2, 5, 7, 11])
def test_with_everything_on_a_killed_run_ends_with_the_same_bits(tmp_path, data, stop_at):
    shape = {"dropout": 0.1, "embedding_dropout": 0.1, "variational_dropout": 0.2}

    class Killed(BaseException):
        pass

    def run(out, resume=False, stop=None):
        def report(event, values):
            if event == "step" and values["step"] == stop:
                raise Killed

        corpus = load_corpus(data, min_count=1)
        model = small_model(len(corpus.tokenizer), **shape)
        trainer = make_trainer(out, data, model=model, resume=resume, report=report, micro_batch=2, **EVERYTHING)
        try:
            return trainer.train()
        except Killed:
            return None

    run(tmp_path / "whole")
    assert run(tmp_path / "parts", stop=stop_at) is None
    run(tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    a, b = (checkpoint.load_tensors(tmp_path / name / checkpoint.RESUME) for name in ("whole", "parts"))
    for key in ("conv", "ssm"):
        assert all(map(torch.equal, a["carried"][key], b["carried"][key]))
    assert all(torch.equal(a["average"][name], b["average"][name]) for name in a["average"])


def test_killed_before_the_best_model_is_written_it_is_written_later(tmp_path, data, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(self, out, model):
        raise Killed

    make_trainer(tmp_path / "whole", data, **EVERYTHING).train()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ModelFiles, "save", killed)
        make_trainer(tmp_path / "parts", data, **EVERYTHING).train()
    assert not (tmp_path / "parts" / checkpoint.WEIGHTS).exists()
    make_trainer(tmp_path / "parts", data, resume=True, **EVERYTHING).train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_micro_batches_carry_what_the_batch_does(tmp_path, data):
    exact = {**EVERYTHING, "input_noise": 0.0, "dropout": 0.0}
    whole = make_trainer(tmp_path / "whole", data, **exact)
    parts = make_trainer(tmp_path / "parts", data, micro_batch=2, **exact)
    whole.train(), parts.train()
    for a, b in zip(whole.carried.state.ssm, parts.carried.state.ssm, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_it_is_off_unless_asked_for(tmp_path, data):
    long = write_documents(tmp_path / "long", count=2, words=3000)
    assert make_trainer(tmp_path / "a", long).carried is None
    assert make_trainer(tmp_path / "b", data, carry_state=True).carried is not None


def test_in_older_runs_it_is_chosen_by_the_documents(tmp_path, data):
    assert make_trainer(tmp_path / "a", data, carry_state=None).carried is None  # short documents
    long = write_documents(tmp_path / "long", count=2, words=3000)
    trainer = make_trainer(tmp_path / "c", long, carry_state=None)
    assert trainer.carried is not None and any("the state is carried on" in note for note in trainer.notes)


def test_a_transformer_carries_nothing(tmp_path):
    long = write_documents(tmp_path / "long", count=2, words=3000)
    size = len(load_corpus(long, min_count=1).tokenizer)
    model = TransformerLM(TransformerConfig(vocab_size=size, d_model=16, n_layer=1, headdim=8, d_ff=16), seed=0)
    assert make_trainer(tmp_path / "a", long, model=model).carried is None
    with pytest.raises(UserError, match="needs a Mamba-2"):
        make_trainer(tmp_path / "b", long, model=model, carry_state=True)


@pytest.mark.parametrize("part", ["average", "carried"])
@pytest.mark.parametrize(
    "change",
    [
        lambda saved: None,
        lambda saved: [],
        lambda saved: {"conv": 1},
        lambda saved: {**saved, next(iter(saved)): torch.zeros(2)},
        lambda saved: {**saved, next(iter(saved)): [torch.zeros(2)]},
        lambda saved: {**saved, "more": torch.zeros(2)},
        lambda saved: {name: _mapped(value, lambda t: t * math.nan) for name, value in saved.items()},
        lambda saved: {name: _mapped(value, lambda t: t.long()) for name, value in saved.items()},
        lambda saved: {name: _mapped(value, lambda t: t[..., :1]) for name, value in saved.items()},
    ],
)
def test_odd_values_in_last_pt_are_refused_in_one_line(tmp_path, trained, data, part, change):
    saved = copy.deepcopy(trained)
    saved[part] = change(saved[part])
    (tmp_path / "run").mkdir()
    checkpoint.save_tensors(tmp_path / "run" / checkpoint.RESUME, saved)
    with pytest.raises(UserError) as caught:
        make_trainer(tmp_path / "run", data, resume=True, **EVERYTHING)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_draw", lambda self: None)
        make_trainer(out, data, **EVERYTHING).train()
    return checkpoint.load_tensors(out / checkpoint.RESUME)


def _mapped(value, function):
    return [function(t) for t in value] if isinstance(value, list) else function(value)


# The average of weights


def test_the_average_is_what_its_formula_says():
    torch.manual_seed(0)
    model = small_model().double()
    frozen = model.backbone.norm_f.weight.requires_grad_(False)
    average = Average(model, 0.9)
    name, p = "backbone.layers.0.mixer.A_log", model.backbone.layers[0].mixer.A_log
    expected = p.detach().clone()
    for n in range(120):
        with torch.no_grad():
            p.add_(torch.randn_like(p))
        d = min(0.9, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * p.detach()
        average.update(n)
    torch.testing.assert_close(average.state_dict()[name], expected, rtol=1e-12, atol=1e-12)
    assert not any(t is frozen for t in average.state_dict().values())
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with average.in_place():
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_the_average_is_validated_and_kept_as_the_best(tmp_path, data):
    seen = {}

    def report(event, values):
        if event == "evaluation":
            seen[values["step"]] = ({k: v.clone() for k, v in trainer.model.state_dict().items()}, values["score"])

    trainer = make_trainer(tmp_path / "run", data, ema_decay=0.9, report=report)
    result = trainer.train()
    weights, score = seen[result.best_step]
    best = checkpoint.load_tensors(tmp_path / "run" / checkpoint.WEIGHTS)
    assert all(torch.equal(best[name], weights[name]) for name in best)
    last = checkpoint.load_tensors(tmp_path / "run" / checkpoint.RESUME)
    assert any(not torch.equal(last["model"][name], best[name]) for name in best)  # training goes on from the others
    assert trainer.task.evaluate(trainer.model, trainer.autocast) == score == result.best


# Dropouts that hold


def test_dropped_words_are_absent_from_the_whole_batch():
    torch.manual_seed(0)
    ids, p = torch.randint(0, 50, (4, 100)), 0.3
    out = embedding_dropout(torch.ones(4, 100, 6), ids, 50, p)
    shares = []
    for word in range(50):
        values = out[ids == word].unique().tolist()
        assert values == [0.0] or values == pytest.approx([1 / (1 - p)])
        shares.append(values == [0.0])
    assert 0.1 < sum(shares) / 50 < 0.5


def test_dropped_channels_are_absent_from_a_whole_row():
    torch.manual_seed(0)
    out = variational_dropout(torch.ones(3, 40, 200, requires_grad=True), 0.25)
    assert (out == out[:, :1]).all() and out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert not torch.equal(out[0, 0], out[1, 0])
    assert 0.15 < float((out[:, 0] == 0).float().mean()) < 0.35


def test_dropouts_are_for_training_alone_and_draw_nothing_where_they_are_off():
    ids = torch.randint(0, 20, (2, 9))
    with_both = small_model(embedding_dropout=0.5, variational_dropout=0.5)
    without = small_model()
    torch.testing.assert_close(with_both.eval()(ids)[0], without.eval()(ids)[0], rtol=0, atol=0)
    before = torch.get_rng_state()
    without.train()(ids)
    assert torch.equal(torch.get_rng_state(), before)
    with_both.train()(ids)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["dropout", "embedding_dropout", "variational_dropout"])
def test_dropping_everything_is_refused(name):
    with pytest.raises(ValueError, match=name):
        Mamba2Config(vocab_size=10, **{name: 1.0})
    with pytest.raises(ValueError, match="ema_decay"):
        Settings(ema_decay=1.0)


# Validation by document


@pytest.mark.parametrize("window", [1, 6, 25, 1000])
@pytest.mark.parametrize("kind", ["mamba", "transformer"])
def test_each_document_is_scored_from_zero_whatever_the_window(kind, window):
    torch.manual_seed(1)
    tokens, starts = torch.randint(1, 20, (61,), dtype=torch.int32), torch.tensor([0, 1, 20, 48, 49])
    if kind == "mamba":
        model = small_model().double().eval()
    else:
        model = TransformerLM(TransformerConfig(vocab_size=20, d_model=16, n_layer=1, headdim=8, d_ff=16), seed=0)
        model = model.double().eval()
    nats = 0.0
    for begin, end in zip(starts.tolist(), [*starts.tolist()[1:], 61], strict=True):
        document = torch.cat([torch.zeros(1, dtype=torch.int64), tokens[begin:end].long()])[None]
        with torch.no_grad():
            logits, _ = model(document[:, :-1])
        nats += float(F.cross_entropy(logits[0], document[0, 1:], reduction="sum"))
    score = evaluate(model, tokens, 100, 0, window, starts=starts)
    assert (score.nats, score.tokens) == (pytest.approx(nats, rel=1e-9), 61)


def test_windows_of_documents_end_with_a_document_where_they_can():
    starts = torch.tensor([0, 3, 5, 20])
    lengths = [t.shape[1] for t, *_ in document_windows(torch.arange(22), starts, 6, 0)]
    assert lengths == [5, 6, 6, 5]


def test_the_corpus_knows_where_its_documents_begin(data):
    corpus = load_corpus(data, min_count=1)
    eos = corpus.tokenizer.eos_id
    for tokens, starts, documents in (
        (corpus.train, corpus.train_starts, corpus.train_documents),
        (corpus.validation, corpus.validation_starts, corpus.validation_documents),
    ):
        ends = (tokens == eos).nonzero()[:, 0] + 1
        assert starts.tolist() == [0, *ends[:-1].tolist()] and len(starts) == documents


def test_a_run_from_before_keeps_its_way_of_validating(tmp_path, data):
    trainer = make_trainer(tmp_path / "run", data)
    corpus = trainer.corpus
    model, c = trainer.model, (corpus.validation, corpus.validation_bytes, corpus.tokenizer.eos_id)
    assert trainer.task.evaluate(model, trainer.autocast) == evaluate(model, *c, starts=corpus.validation_starts)
    carried = make_trainer(tmp_path / "run", data, validate="carried")
    assert carried.task.evaluate(model, trainer.autocast) == evaluate(model, *c)


def test_settings_that_an_older_run_does_not_name_are_those_of_its_time():
    from pathlib import Path

    plan = read_plan(Path(__file__).parent / "fixtures" / "run_before")
    assert (plan.training.validate, plan.training.carry_state, plan.training.ema_decay) == ("carried", False, 0.0)
