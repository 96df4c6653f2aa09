"""The papers' tasks: a program without a network solves what is drawn, and a small model learns it by the same loop."""

import json
import sys
from dataclasses import replace
from functools import partial

import forked
import pytest
import torch

from benchmarks.quality import induction_heads, mqar, selective_copying, synthetic
from mamba2_min.evaluation.recall import associative_recall
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.models.transformer import TransformerLM


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def solve_copying(row):
    letters = [(place, token) for place, token in enumerate(row) if token not in (0, 15)]
    markers = [place for place, token in enumerate(row) if token == 15]
    return {place: letter for place, (_, letter) in zip(markers, letters, strict=True)}


def solve_induction(row):
    first = row.index(15)
    return {len(row) - 1: row[first + 1]}


def solve_pairs(row):
    pairs = len(row) // 4
    book = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
    assert len(book) == pairs
    return {place: book[row[place]] for place in range(2 * pairs, len(row), 2)}


STAGES = {
    "copying": (selective_copying.stage(128, tokens=8 * 128), solve_copying),
    "induction": (induction_heads.stage(256, 8), solve_induction),
    "pairs, random between": (mqar.stage(1024, True, tokens=4 * 1024), solve_pairs),
    "pairs, zeros between": (mqar.stage(256, False, tokens=4 * 256), solve_pairs),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_program_solves_it_and_nothing_else_is_asked(name):
    stage, solve = STAGES[name]
    ids, targets = stage.draw(seeded())
    again = stage.draw(seeded())
    assert torch.equal(ids, again[0]) and torch.equal(targets, again[1])
    assert not torch.equal(ids, stage.draw(seeded(synthetic.TEST_SEED))[0])
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        assert solve(row) == {place: t for place, t in enumerate(wanted) if t != -100}
        assert sum(t != -100 for t in wanted) == stage.questions


def test_between_the_questions_stands_anything():
    draw = partial(associative_recall, 50, 64, 4, vocab_size=32)
    ids, targets = draw(seeded(), random_fill=True)
    zeros, _ = draw(seeded(1))
    rest = (targets == -100) & (torch.arange(64) >= 8)
    assert len(ids[rest].unique()) == 32
    assert (zeros[:, 9::2] == 0).all()


def test_a_long_row_in_pieces_is_one_row():
    answer = torch.tensor([[3], [7], [0]])
    found = list(induction_heads.pieces(3, 100, answer, seeded(), piece=32))
    assert [part.shape[1] for part in found] == [32, 32, 32, 4]
    for row, wanted in zip(torch.cat(found, 1).tolist(), answer[:, 0].tolist(), strict=True):
        assert row.count(15) == 2 and row[-1] == 15
        assert solve_induction(row) == {99: wanted}


def test_reading_in_pieces_gives_the_accuracy_of_reading_at_once():
    model = synthetic.build(induction_heads.rows()[0], seed=0)
    in_pieces = induction_heads.accuracy(model, 200, 64, seed=0, precision="float32", piece=64)
    generator = seeded(synthetic.TEST_SEED)
    answer = torch.randint(0, 15, (64, 1), generator=generator)
    ids = torch.cat(list(induction_heads.pieces(64, 200, answer, generator, 64)), 1)
    with torch.no_grad():
        at_once = model(ids)[0][:, -1].argmax(-1, keepdim=True)
    assert in_pieces == (at_once == answer).double().mean()


def test_the_loss_is_that_of_the_answers():
    row = mqar.row(256, 32, 16, 1.0)
    model = synthetic.build(row, seed=0)
    stage = mqar.stage(64, True, tokens=256)
    ids, targets = stage.draw(seeded())
    loss, right = synthetic.answered(model, *synthetic.questions(stage, seeded()))
    torch.testing.assert_close(loss, model.loss(ids, targets))
    wanted = model(ids)[0].argmax(-1) == targets
    assert right.sum() == wanted.sum() and right.shape == (len(ids), 16)


def test_the_transformer_has_the_size_of_its_neighbour():
    for line in mqar.TABLE:
        row = mqar.row(*line)
        with torch.device("meta"):
            model = synthetic.build(row, seed=0)
            ours = synthetic.build(replace(row, transformer=False), seed=0)
        assert isinstance(model, TransformerLM if row.transformer else Mamba2LM)
        sizes = [sum(p.numel() for p in m.parameters()) for m in (model, ours)]
        assert abs(sizes[0] / sizes[1] - 1) < 0.02
    assert len({mqar.row(*line).name for line in mqar.TABLE}) == len(mqar.TABLE)


def test_the_penalty_lowers_dt():
    row, found = induction_heads.rows(batch=4)[0], []
    for still in (0.0, 1.0):
        model = synthetic.build(row, seed=0)
        plan = replace(row.plan, steps=20, warmup=1)
        synthetic.train(model, [induction_heads.stage(32, 4, still)], plan, 0, "float32")
        with synthetic.StepSizes(model) as sizes:
            model(induction_heads.stage(32, 4).draw(seeded())[0])
            found.append(sizes.cost().item())
        assert not model.backbone.blocks[0].mixer.in_proj._forward_hooks
    assert found[1] < found[0] - 0.5


def test_a_dt_of_zero_costs_nothing_and_has_a_gradient():
    model = synthetic.build(induction_heads.rows(batch=4)[0], seed=0)
    with synthetic.StepSizes(model) as sizes:
        model(induction_heads.stage(32, 4).draw(seeded())[0])
        seen = sizes._seen
        for k, projected in seen.items():
            seen[k] = projected.detach()
            seen[k][:, 1:] = -500.0
            seen[k][:, 0] = 500.0
            seen[k].requires_grad_()
        cost = sizes.cost()
        cost.backward()
        assert cost.item() > 0 and all(projected.grad.isfinite().all() for projected in seen.values())
    assert not sizes._seen


def small(name):
    """Each task at a size that a CPU learns in seconds."""
    shape = {"d_model": 32, "n_layer": 2, "d_state": 16, "headdim": 16, "tie_embeddings": False, "chunk_size": 32}
    plan = synthetic.Plan(steps=1500, minutes=2, lr=1e-2, warmup=20, advance=0.9, enough=0.99)
    stages = {
        "copying": [synthetic.Stage("l", partial(selective_copying.selective_copying, 32, 16, 2, vocab_size=8), 2)],
        "induction": [synthetic.Stage("l", partial(induction_heads.induction_heads, 64, 16, vocab_size=8), 1)],
        "pairs": [mqar.stage(16, True, vocabulary=24, tokens=64 * 16)],
    }[name]
    vocabulary = {"copying": 8, "induction": 8, "pairs": 24}[name]
    return synthetic.Row(name, {"vocab_size": vocabulary, **shape}, stages, plan)


@pytest.mark.parametrize(
    "name", ["copying", *(pytest.param(n, marks=pytest.mark.slow) for n in ("induction", "pairs"))]
)
def test_a_small_model_learns_it(name):
    row = small(name)
    model = synthetic.build(row, seed=0)
    how = synthetic.train(model, row.stages, row.plan, 0, "float32")
    assert how["ended"] == "enough", how["history"][-1]
    assert synthetic.test(model, row.stages[-1], 0, 4, "float32")["accuracy"] > 0.95


def test_stages_follow_each_other_and_time_ends_it():
    row = small("copying")
    plan = replace(row.plan, steps=200, advance=0.0, enough=2.0)
    stages = [row.stages[0], replace(row.stages[0], name="second")]
    how = synthetic.train(synthetic.build(row, 0), stages, plan, 0, "float32")
    assert [line[:2] for line in how["history"]] == [[50, "l"], [100, "second"], [150, "second"], [200, "second"]]
    assert how["ended"] == "steps"
    how = synthetic.train(synthetic.build(row, 0), stages, plan, 0, "float32", minutes=1e-9)
    assert (how["ended"], how["steps"]) == ("minutes", 1)


def test_a_table_is_written_row_by_row_and_gone_on_with(tmp_path, capsys):
    first = small("copying")
    rows = [replace(first, name=name, plan=replace(first.plan, steps=2)) for name in ("one", "two")]
    parser = synthetic.parser("")

    def measured(*flags):
        args = parser.parse_args(["--results", str(tmp_path), "--device", "cpu", "--precision", "float32", *flags])
        synthetic.run("trial", args, rows, {"Mamba": 1.0}, lambda model, row, seed, precision: {"accuracy": 0.5})
        return json.loads((tmp_path / "quality-trial.json").read_text())["runs"]

    assert [r["name"] for r in measured("--only", "one")] == ["one"]
    assert "accuracy 50.0000%, 2 steps" in capsys.readouterr().out
    runs = measured()
    assert [(r["name"], r["steps"], r["whole"]) for r in runs] == [("one", 2, True), ("two", 2, True)]
    assert capsys.readouterr().out.startswith("two") and not capsys.readouterr().out
    assert measured() == runs
    assert len(measured("--seeds", "0", "1")) == 4
    cut = replace(first, name="three", plan=replace(first.plan, steps=10**6))
    rows.append(cut)
    runs = measured("--minutes", "0.02")
    assert (runs[-1]["name"], runs[-1]["whole"], runs[-1]["ended"]) == ("three", False, "minutes")
    assert "three; the same command goes on" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["selective_copying", "induction_heads", "mqar"])
def test_a_row_that_is_not_there_is_one_line(name, tmp_path):
    ended = forked.command("-m", f"benchmarks.quality.{name}", "--only", "nothing", "--results", tmp_path)
    assert ended.returncode and ended.stderr.count("\n") == 1 and "nothing" in ended.stderr


def brief(plan):
    return replace(plan, steps=2)


def test_each_command_writes_its_row(tmp_path, monkeypatch):
    """The commands themselves, on rows that are short: two steps, one batch of tests."""
    monkeypatch.setattr(induction_heads, "TESTED_AT", [64, 128])
    monkeypatch.setattr(selective_copying, "LADDER", [(8, 2), (32, 16)])
    monkeypatch.setattr(mqar, "TABLE", [(32, 32, 16, 1.0), (32, 32, 0, 1.0)])
    train = synthetic.train
    monkeypatch.setattr(synthetic, "train", lambda model, stages, plan, *a: train(model, stages, brief(plan), *a))
    for module in (selective_copying, mqar):
        monkeypatch.setattr(module, "TEST_BATCHES", 1)
        monkeypatch.setattr(module, "TOKENS", 128)
    for module in (selective_copying, induction_heads, mqar):
        monkeypatch.setattr(sys, "argv", ["x", "--device", "cpu", "--precision", "float32", "--results", str(tmp_path)])
        assert module.main() == 0
    found = {p.name: json.loads(p.read_text()) for p in sorted(tmp_path.glob("*.json"))}
    names = {name: [run["name"] for run in written["runs"]] for name, written in found.items()}
    assert names == {
        "quality-induction-heads.json": ["mamba2 d64 still", "mamba2 d64 plain"],
        "quality-mqar.json": ["l32 mamba2 d32 n16", "l32 transformer d32"],
        "quality-selective-copying.json": ["mamba2 d64"],
    }
    for written in found.values():
        assert all(0 <= run["accuracy"] <= 1 and run["whole"] and run["parameters"] for run in written["runs"])
    assert list(found["quality-induction-heads.json"]["runs"][0]["by_length"]) == ["64", "128"]
