"""Muon: its steps against a reference by singular values, what it leaves to AdamW, and runs that resume."""

import copy
import math

import pytest
import torch
from small_runs import assert_same_run, make_trainer, write_documents

from mamba2_min.checkpoints import checkpoint
from mamba2_min.config import Mamba2Config
from mamba2_min.errors import UserError
from mamba2_min.finetune.classifier import Classifier
from mamba2_min.models.base import decay_groups
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.models.transformer import TransformerConfig, TransformerLM
from mamba2_min.training import muon
from mamba2_min.training.muon import Muon, layer_matrices, orthogonal
from mamba2_min.training.trainer import Trainer, _optimizer

OPTIONS = {"lr": 0.02, "betas": (0.9, 0.99)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 9), (3, 20, 50), (2, 50, 20), (1, 33, 33), (4, 2, 3)])
def test_it_keeps_the_singular_vectors_and_brings_the_values_near_to_one(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    before = x.clone()
    inside = u.mT @ orthogonal(x) @ vh.mT  # diagonal, if the vectors are the same
    values = inside.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(inside, torch.diag_embed(values), rtol=0, atol=1e-10)
    assert values.min() > 0.5 and values.max() < 1.25 and torch.equal(x, before)


def test_nothing_comes_of_nothing():
    assert orthogonal(torch.zeros(2, 3, 5)).abs().max() == 0


def reference(weight, gradients, rows, lr, decay):
    """Muon of one matrix (r, c), with the polynomial applied to the singular values of each part."""
    mean = torch.zeros_like(weight)
    for gradient in gradients:
        mean = 0.95 * mean + 0.05 * gradient
        weight = weight * (1 - lr * decay)
        steps = []
        for part in (0.95 * mean + 0.05 * gradient).split(rows):
            u, s, vh = torch.linalg.svd(part, full_matrices=False)
            s = s / (s.square().sum().sqrt() + 1e-7)
            for _ in range(5):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            steps.append(0.2 * math.sqrt(max(part.shape)) * u @ torch.diag(s) @ vh)
        weight = weight - lr * torch.cat(steps)
    return weight


def test_steps_are_those_of_a_reference_and_the_rest_is_adamw():
    torch.manual_seed(0)
    a, b, c = (torch.nn.Parameter(torch.randn(7, 4, dtype=torch.float64)) for _ in range(3))
    vector = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    alone = [copy.deepcopy(p) for p in (c, vector)]
    begun = [p.detach().clone() for p in (a, b)]
    groups = [{"params": [a, b, c], "weight_decay": 0.3}, {"params": [vector], "weight_decay": 0.0}]
    optimizer = Muon(groups, {a: [4, 2, 1], b: [7]}, **OPTIONS)
    adamw = torch.optim.AdamW(
        [{"params": [alone[0]], "weight_decay": 0.3}, {"params": [alone[1]], "weight_decay": 0.0}], **OPTIONS
    )
    gradients = [[torch.randn_like(p) for p in (a, b, c, vector)] for _ in range(4)]
    for step in gradients:
        for p, g in zip((a, b, c, vector), step, strict=True):
            p.grad = g.clone()
        for p, g in zip(alone, step[2:], strict=True):
            p.grad = g.clone()
        optimizer.step(), adamw.step()
    for p, begin, rows, k in ((a, begun[0], [4, 2, 1], 0), (b, begun[1], [7], 1)):
        torch.testing.assert_close(p.detach(), reference(begin, [step[k] for step in gradients], rows, 0.02, 0.3))
    for p, q in zip((c, vector), alone, strict=True):
        assert torch.equal(p, q)
    assert set(optimizer.state[a]) == {"step", "exp_avg"} and optimizer.state[a]["step"] == 4


def test_a_matrix_without_a_gradient_stays():
    p = torch.nn.Parameter(torch.ones(2, 2))
    Muon([{"params": [p], "weight_decay": 1.0}], {p: [2]}, **OPTIONS).step()
    assert torch.equal(p, torch.ones(2, 2))


def test_the_matrices_of_the_layers_and_their_parts():
    config = Mamba2Config(vocab_size=20, d_model=16, n_layer=2, d_state=4, headdim=8, ngroups=2)
    model = Mamba2LM(config, seed=0)
    mixer = model.backbone.blocks[1].mixer
    found = layer_matrices(model)
    assert len(found) == 4 and found[mixer.in_proj.weight] == [32, 32, 8, 8, 4]
    assert sum(found[mixer.in_proj.weight]) == len(mixer.in_proj.weight)
    mixer.in_proj.weight.requires_grad = False
    mixer.out_proj = torch.nn.Sequential(mixer.out_proj)  # whatever it is, it is not a plain matrix
    assert len(layer_matrices(model)) == 2
    other = TransformerLM(TransformerConfig(vocab_size=20, d_model=16, n_layer=1, headdim=8, d_ff=24), seed=0)
    assert list(layer_matrices(other).values()) == [[16] * 3, [16], [24] * 2, [16]]
    assert all(sum(rows) == len(p) for p, rows in layer_matrices(other).items())
    assert layer_matrices(Classifier(other, labels=2)).keys() == layer_matrices(other).keys()  # not the head


def test_a_transformer_learns_with_it(tmp_path, data):
    trainer = make_trainer(tmp_path / "mamba", data)
    size = len(trainer.corpus.tokenizer)
    model = TransformerLM(TransformerConfig(vocab_size=size, d_model=16, n_layer=1, headdim=8, d_ff=24), seed=0)
    result = make_trainer(tmp_path / "run", data, model=model, optimizer="muon", max_steps=30).train()
    assert result.best.loss < 0.6 * math.log(size)


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_a_run_resumes_bit_for_bit(tmp_path, data, micro_batch):
    settings = {"optimizer": "muon", "micro_batch": micro_batch, "ema_decay": 0.9}
    make_trainer(tmp_path / "whole", data, **settings).train()
    for stop in (4, 7):

        def report(event, values, stop=stop):
            if event == "step" and values["step"] == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            make_trainer(tmp_path / "parts", data, resume=stop == 7, report=report, **settings).train()
    make_trainer(tmp_path / "parts", data, resume=True, **settings).train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_of_the_other_optimizer_is_not_resumed(tmp_path, data):
    make_trainer(tmp_path / "run", data, max_steps=3).train()
    with pytest.raises(UserError, match="optimizer"):
        make_trainer(tmp_path / "run", data, max_steps=3, optimizer="muon", resume=True)


def test_a_mean_that_no_clipped_gradient_gives_is_found_out(tmp_path, data):
    make_trainer(tmp_path / "run", data, optimizer="muon").train()
    path = tmp_path / "run" / checkpoint.RESUME
    saved = checkpoint.load_tensors(path)
    muons = [state for state in saved["optimizer"]["state"].values() if "exp_avg_sq" not in state]
    assert len(muons) == 2
    muons[0]["exp_avg"] *= 1e4
    checkpoint.save_tensors(path, saved)
    with pytest.raises(UserError, match="beyond what clipped gradients"):
        make_trainer(tmp_path / "run", data, optimizer="muon", resume=True)


def test_divided_matrices_are_refused():
    from mamba2_min.settings import Settings

    model = Mamba2LM(Mamba2Config(vocab_size=9, d_model=8, n_layer=1, d_state=4, headdim=8), seed=0)
    with pytest.raises(UserError, match="--shard"):
        _optimizer(model, Settings(optimizer="muon"), sharded=True)
    assert type(_optimizer(model, Settings(optimizer="muon"), sharded=False)) is Muon


@pytest.mark.gpu
def test_on_a_gpu():
    x = torch.randn(3, 40, 100, generator=torch.Generator().manual_seed(1))
    exact, found = orthogonal(x.double()), orthogonal(x.cuda()).cpu().double()
    assert (found - exact).norm() < 0.06 * exact.norm()  # the products are in bf16
    torch.manual_seed(0)
    model = Mamba2LM(Mamba2Config(vocab_size=20, d_model=32, n_layer=2, d_state=8, headdim=16), seed=0).cuda()
    ids = torch.randint(0, 20, (4, 33)).cuda()
    optimizer = Muon(decay_groups(model, 0.1), muon.layer_matrices(model), **OPTIONS)
    losses = []
    for _ in range(30):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward(), optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
