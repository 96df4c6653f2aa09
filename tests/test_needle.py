"""The needle: answers are those of one pass over everything, and a model that forgets gains nothing."""

import json
import sys

import pytest
import torch

from mamba2_min import Mamba2Config, Mamba2LM, UserError, WordTokenizer
from mamba2_min.errors import run_script
from mamba2_min.evaluation import needle

BOOK = "The rain fell on the roof. The old dog slept by the door and heard nothing of it. " * 40
NAMES = ["Abena", "Adil", "Agnieszka"]


@pytest.fixture(scope="module")
def tokenizer():
    return WordTokenizer.train([BOOK, needle.QUESTION + ".\n\n " + " ".join(NAMES)], min_count=1)


@pytest.fixture(scope="module")
def model(tokenizer):
    return Mamba2LM(Mamba2Config(len(tokenizer), d_model=32, n_layer=2, d_state=8, headdim=8), seed=0).eval()


def test_answers_are_those_of_one_pass_over_everything(model, tokenizer, monkeypatch):
    monkeypatch.setattr(needle, "WINDOW", 17)
    names = needle.single_names(tokenizer, BOOK, 8)
    assert list(names) == NAMES
    parts = needle.stretches(BOOK, [10, 30, 100], skip=5)
    assert " ".join(parts).split() == BOOK.split()[5:105] and [len(p.split()) for p in parts] == [10, 20, 70]
    found = needle.carry(model, tokenizer, names, parts)
    for k, (logs, size) in enumerate(found):
        for row, name in enumerate(names.values()):
            ids = [tokenizer.eos_id, *tokenizer.encode(needle.QUESTION), name, *tokenizer.encode(".\n\n")]
            for part in parts[: k + 1]:
                ids += tokenizer.encode(part)
            ids += tokenizer.encode("\n\n" + needle.QUESTION)
            with torch.no_grad():
                wanted = model(torch.tensor([ids]))[0][0, -1].log_softmax(-1)[list(names.values())]
            torch.testing.assert_close(logs[row], wanted, rtol=1e-4, atol=1e-4)
        assert size == found[0][1]  # the same after 10 words and after 100


def test_gain_and_right_by_hand():
    logs = torch.tensor([[-1.0, -5.0, -3.0], [-2.0, -4.0, -3.0], [-3.0, -6.0, -3.0]])
    assert needle.gains(logs).tolist() == [1.5, 1.5, 0.0]
    assert needle.right(logs).tolist() == [1, 1, 1]  # row 2: -1, -1, 0 against the rows' means
    assert needle.right(logs.flip(0)).tolist() == [0, 1, 0]
    assert needle.right(torch.zeros(4, 4) + 1e-6 * torch.rand(4, 4)).tolist() == [0.25] * 4


def test_a_model_that_forgets_at_once_gains_nothing(model, tokenizer):
    short = needle.measure(model, tokenizer, BOOK, [5, 200], trials=2)
    forgetful = Mamba2LM(model.config, seed=0).eval()
    for layer in forgetful.backbone.layers:
        layer.mixer.dt_bias.data.fill_(20.0)  # exp(dt A) is 0 for every head
    lost = needle.measure(forgetful, tokenizer, BOOK, [5, 200], trials=2)
    assert lost[0].right == pytest.approx(1 / 3) and abs(lost[0].gain) < 1e-4 and abs(lost[1].gain) < 1e-4
    assert short[0].state_bytes == lost[1].state_bytes and abs(short[0].gain) > 10 * abs(lost[0].gain)
    assert [p.words for p in short] == [5, 200]


def test_the_command(model, tokenizer, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path / "run")
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    (tmp_path / "book.txt").write_text(BOOK)
    (tmp_path / "short.txt").write_text("The rain.")
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["needle", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            run_script(needle.main)
        return stopped.value.code, *capsys.readouterr()

    status, out, err = call("--model", "run", "--data", "book.txt", "--out", "out")
    assert status == 0 and "by chance" in out, err
    found = json.loads((tmp_path / "out" / "needle.json").read_text())
    assert [p["words"] for p in found["points"]] == [10, 20, 50, 100, 200, 500] and found["chance"] == pytest.approx(
        1 / 3
    )
    assert (tmp_path / "out" / "needle.png").stat().st_size > 5000
    for arguments, message in (
        (["--model", "run", "--data", "none.txt"], "none.txt"),
        (["--model", "run", "--data", "short.txt"], "fewer than the shortest distance"),
        (["--model", "run", "--data", "book.txt", "--names", 1], "--names must be at least 2"),
        (["--model", "none", "--data", "book.txt"], "none"),
    ):
        status, _, err = call(*arguments)
        assert status == 2 and message in err and err.count("\n") == 1


def test_a_vocabulary_without_names(model):
    tokenizer = WordTokenizer.train([BOOK], min_count=1)
    with pytest.raises(UserError, match="fewer than two names"):
        needle.single_names(tokenizer, BOOK, 8)
