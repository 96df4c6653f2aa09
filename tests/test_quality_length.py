"""Loss by position against the training length: the same tokens are compared, and one command does it all."""

import json
import sys

import pytest
import torch

from benchmarks.quality import length
from mamba2_min.config import Mamba2Config
from mamba2_min.errors import UserError
from mamba2_min.evaluation.position import losses_by_position
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.training.trainer import Trainer

WORDS = [*"abcdefghijklmnop"]


@pytest.fixture(scope="module")
def model():
    return Mamba2LM(Mamba2Config(20, d_model=16, n_layer=1, d_state=8, headdim=8), seed=0).eval()


def ids_of(count):
    return torch.randint(20, (count,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


@pytest.mark.parametrize("count", [3, 8, 16, 17, 53])
def test_each_token_is_read_after_half_to_all_of_the_training_length(model, count):
    ids, context = ids_of(count), 16
    near = length.losses_near(model, ids, 1, context)
    for k in range(count):
        begin = max(0, (k // 8 - 1) * 8)
        alone = losses_by_position(model, ids[begin : k + 1], 1)[-1]
        torch.testing.assert_close(near[k], alone, atol=1e-4, rtol=1e-4)


def test_within_the_training_length_there_is_no_excess_at_the_beginning(model):
    ids = ids_of(64)
    loss, excess = length.curves(model, ids, [0], 16, 1, 16)
    assert len(loss) == 5 and all(abs(b.loss) < 1e-4 for b in excess)
    loss, excess = length.curves(model, ids, [8, 24, 40], 24, 1, 16)
    assert [b.last for b in excess] == [1, 2, 4, 8, 16, 24]
    assert length.largest_excess(excess, 16) == excess[-1].loss


def test_starts_are_spread_and_have_a_lead():
    assert length.starts(1000, 600, 3, 100) == [100, 250, 400]
    assert length.starts(700, 600, 1, 100) == [100]
    with pytest.raises(UserError, match="shorter --longest"):
        length.starts(699, 600, 1, 100)


def test_a_book_is_cut_at_paragraphs():
    text = "\n\n".join(f"paragraph {k}" for k in range(100))
    parts = length.cut(text)
    assert "".join(parts) == text and all(part.startswith("paragraph") for part in parts)
    assert 0.35 < len(parts[2]) / len(text) < 0.41
    with pytest.raises(UserError, match="no paragraphs"):
        length.cut("one line")


def test_one_command_trains_measures_and_draws(tmp_path, monkeypatch, capsys):
    lines = [" ".join(WORDS[(k * j) % len(WORDS)] for j in range(1, 12)) for k in range(400)]
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(lines))
    flags = f"--long {book} --data {tmp_path}/more --out {tmp_path}/runs --results {tmp_path} --image {tmp_path}/p.png"
    sizes = "--contexts 16 32 --steps 3 --more-steps 2 --longest 256 --starts 2 --device cpu --minutes 1"
    more = tmp_path / "more"
    more.mkdir()
    (more / "train.txt").write_text("a cat\n\n" * 50)
    shape = "--set d_model=16 n_layer=1 d_state=8 headdim=8 chunk_size=16"
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)  # of each run; the command's own picture is drawn
    monkeypatch.setattr(sys, "argv", ["length", *f"{flags} {sizes} {shape}".split()])
    assert length.main() == 0
    written = json.loads((tmp_path / "quality-length.json").read_text())
    found = [(run["context"], run["way"], run["steps"]) for run in written["runs"]]
    names = ["from zero", "from zero, then 2 steps carried", "carried"]
    assert found == [(c, name, steps) for c in (16, 32) for name, steps in zip(names, (3, 2, 3), strict=True)]
    assert all(run["harmless"] == (run["largest_excess"] <= length.HARM) for run in written["runs"])
    assert all(run["loss"][-1]["last"] == 256 for run in written["runs"])
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert "trained at 32, carried: 3 steps" in capsys.readouterr().out


def test_a_folder_without_text_is_one_line(tmp_path):
    (tmp_path / "book.txt").write_text("a\n\n" * 100)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.txt"):
        length.prepare(tmp_path / "book.txt", tmp_path / "empty", tmp_path / "out")
