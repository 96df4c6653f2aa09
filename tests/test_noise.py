"""Unigram noise: what is replaced, by what, and what stays."""

import pytest
import torch
from small_runs import make_trainer, write_documents

from mamba2_min.errors import UserError
from mamba2_min.settings import Settings
from mamba2_min.training.noise import UnigramNoise
from mamba2_min.training.task import Pretraining
from mamba2_min.training.trainer import Trainer

END = 3
TEXT = torch.tensor([1] * 10 + [2] * 30 + [5] * 60 + [END] * 40, dtype=torch.int32)


def noisy(ids, p, seed=0):
    torch.manual_seed(seed)
    return UnigramNoise(TEXT, p, END, torch.device("cpu"))(ids)


def test_tokens_are_drawn_as_often_as_the_text_has_them_and_never_the_end():
    drawn = noisy(torch.full((400, 500), 4), 1.0).flatten()
    shares = torch.bincount(drawn, minlength=7) / len(drawn)
    torch.testing.assert_close(shares, torch.tensor([0, 0.1, 0.3, 0, 0, 0.6, 0]), rtol=0, atol=4e-3)


def test_a_share_of_the_tokens_is_replaced_and_the_end_token_stands():
    ids = torch.tensor([0, END]).repeat(300, 500)
    read = noisy(ids, 0.25)
    assert (read[ids == END] == END).all()
    assert float((read[ids == 0] != 0).float().mean()) == pytest.approx(0.25, abs=4e-3)
    assert (
        read.dtype == ids.dtype and torch.equal(read, noisy(ids, 0.25)) and not torch.equal(read, noisy(ids, 0.25, 1))
    )


def test_without_noise_nothing_is_drawn():
    ids, before = torch.arange(12).view(3, 4), torch.get_rng_state()
    noise = UnigramNoise(TEXT, 0.0, END, torch.device("cpu"))
    assert noise(ids) is ids and torch.equal(torch.get_rng_state(), before)


def test_a_text_of_end_tokens_alone_gives_an_id_of_the_vocabulary():
    noise = UnigramNoise(torch.full((5,), END), 1.0, END, torch.device("cpu"))
    assert (noise(torch.zeros(2, 9, dtype=torch.int64)) <= END).all()


@pytest.mark.parametrize("carry", [False, True])
def test_training_reads_noise_and_predicts_the_text(tmp_path, monkeypatch, carry):
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)
    data = write_documents(tmp_path / "data")
    trainer = make_trainer(tmp_path / "run", data, input_noise=0.5, carry_state=carry, max_steps=3)
    reads, name = [], "loss_and_state" if carry else "loss"
    plain = getattr(trainer.model, name)
    monkeypatch.setattr(trainer.model, name, lambda *args, **more: reads.append(args[:2]) or plain(*args, **more))
    batches = list(zip(range(3), make_trainer(tmp_path / "other", data, carry_state=carry).windows, strict=False))
    trainer.train()
    assert len(reads) >= 3  # and those of the validation
    for (ids, targets), (_, (clean, wanted, *_)) in zip(reads[:3], batches, strict=True):
        assert torch.equal(targets, wanted)
        assert 0.2 < float((ids != clean).float().mean()) < 0.8


def test_it_is_for_documents_and_a_share(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="input_noise"):
        Settings(input_noise=1.1)
    monkeypatch.setattr(Pretraining, "text", None)
    data = write_documents(tmp_path / "data")
    make_trainer(tmp_path / "run", data)
    with pytest.raises(UserError, match="input-noise is for training on documents"):
        make_trainer(tmp_path / "run", data, input_noise=0.1)


def test_a_training_without_noise_does_not_count_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "bincount", lambda tokens: torch.ones(0) if not len(tokens) else pytest.fail("counted"))
    make_trainer(tmp_path / "run", write_documents(tmp_path / "data"))
