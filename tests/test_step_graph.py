"""A step as one CUDA graph: what the trainer does with one, on a CPU; and on a GPU, the same bits as without."""

import pytest
import torch
from small_runs import assert_same_run, make_trainer

from mamba2_min.config import Mamba2Config
from mamba2_min.finetune.lora import LoRAConfig, adapters, add_lora
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.training import step_graph
from mamba2_min.training.distributed import Team
from mamba2_min.training.step_graph import StepGraph
from mamba2_min.training.trainer import Trainer


class Unrecorded:
    """Stands for a StepGraph: it computes at each call what a graph would launch."""

    def __init__(self, parameters, backward, batch, reads):
        self.backward, self.shapes, self.reads = backward, [t.shape for t in batch], list(reads)

    def fits(self, batch, reads):
        same = len(reads) == len(self.reads) and all(a is b for a, b in zip(reads, self.reads, strict=True))
        return [t.shape for t in batch] == self.shapes and same

    def has_shapes_of(self, batch):
        return [t.shape for t in batch] == self.shapes

    def __call__(self, batch):
        return self.backward(*batch)


class Unrecordable:
    def __init__(self, parameters, backward, batch, reads):
        backward(*batch)
        raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)


def trained(folder, data, **settings):
    """A run with a graph, as on a GPU; and the reports about it."""
    trainer = make_trainer(folder, data, max_steps=4, graph=True, **settings)
    trainer.gradients._wanted = True
    reports = []
    trainer.report = lambda event, values: reports.append(values) if event == "graph" else None
    trainer.train()
    return reports


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("stand_in, why", [(Unrecorded, ""), (Unrecordable, "operation not permitted when stream")])
def test_a_run_is_the_same_with_a_graph_and_where_there_can_be_none(
    monkeypatch, tmp_path, data, stand_in, why, carried
):
    monkeypatch.setattr(step_graph, "StepGraph", stand_in)
    settings = {"dropout": 0.0, "carry_state": carried}
    make_trainer(tmp_path / "without", data, max_steps=4, graph=True, **settings).train()  # a CPU has none
    reports = trained(tmp_path / "with", data, **settings)
    # The first step of a carried state shows what it is made of.
    assert len(reports) == 1 and reports[0]["step"] == 1 + carried and reports[0]["why_not"].startswith(why)
    assert "\n" not in reports[0]["why_not"] and bool(reports[0]["why_not"]) == bool(why)
    assert_same_run(tmp_path / "without", tmp_path / "with")


def test_a_batch_in_parts_has_no_graph(monkeypatch, tmp_path, data):
    monkeypatch.setattr(step_graph, "StepGraph", Unrecorded)
    assert trained(tmp_path, data, micro_batch=2) == []


def test_a_shape_has_a_graph_when_it_comes_often(monkeypatch, tmp_path, data):
    """The last batch of an epoch is smaller: it does not cost two recordings."""
    monkeypatch.setattr(step_graph, "StepGraph", Unrecorded)
    trainer = make_trainer(tmp_path, data, graph=True, batch_size=4)
    trainer.model.eval()  # no dropout
    trainer.gradients._wanted, recorded = True, []
    trainer.report = lambda event, values: recorded.append(rows) if event == "graph" else None
    ids, targets = next(trainer.windows)
    for rows in [4, 2, 4, 3, 2, 4, *[3] * 7, 2, *[3] * 8, 3, 4]:
        found = trainer.gradients(ids[:rows], targets[:rows])
        trainer.optimizer.zero_grad(set_to_none=True)
        assert torch.equal(found, step_graph.batch_gradients(trainer, Team(), ids[:rows], targets[:rows]))
    assert recorded == [4, 3]


@pytest.mark.parametrize("size, graphs", [(2, 1), (1, 0), (4, 1), (3, 0)])
def test_of_several_processes_each_has_a_graph_of_its_own_part(monkeypatch, tmp_path, data, size, graphs):
    """The gradients are those of the process's parts without a graph. With three, two parts are the second one's."""
    monkeypatch.setattr(step_graph, "StepGraph", Unrecorded)
    monkeypatch.setattr(Team, "summed", lambda self, tensors: list(tensors))
    found = []
    for wanted in (False, True):
        trainer = make_trainer(tmp_path / "run", data, batch_size=4, micro_batch=4 // (2 if size == 2 else 4))
        trainer.team, trainer.gradients._wanted = Team(size - 1, size), wanted
        reports = []
        trainer.report = lambda event, values, reports=reports: reports.append(event)
        loss = trainer.gradients(*next(trainer.windows))
        found.append([loss, *(p.grad for p in trainer.model.parameters())])
    assert reports == ["graph"] * graphs
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def with_adapters(model):
    add_lora(model, LoRAConfig(dropout=0.3))
    for _, module in adapters(model):
        torch.nn.init.normal_(module.lora_B.weight)
    return model.train()


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_a_graph_gives_the_same_bits(monkeypatch, lora):
    config = Mamba2Config(vocab_size=300, d_model=128, n_layer=2, d_state=64)
    model = Mamba2LM(config, seed=0).cuda().train()
    if lora:
        from mamba2_min.ops import lora_kernels

        with_adapters(model)
        masks, draw = {}, lora_kernels.mask_bits  # one for each size, or no pass would be like another one
        monkeypatch.setattr(lora_kernels, "mask_bits", lambda *sizes: masks.setdefault(sizes, draw(*sizes)))
    trained = [p for p in model.parameters() if p.requires_grad]
    batches = [[torch.randint(300, (4, 200), device="cuda") for _ in range(2)] for _ in range(3)]

    def backward(ids, targets):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model.loss(ids, targets)
        loss.backward()
        return loss.detach()

    graph = StepGraph(list(model.parameters()), backward, batches[0])
    assert all(p.grad is None for p in model.parameters())
    for batch in batches:
        assert graph.fits(batch)
        loss = graph(batch)
        got = [p.grad.clone() for p in trained]
        model.zero_grad(set_to_none=True)
        assert torch.equal(loss, backward(*batch))
        assert all(torch.equal(a, p.grad) for a, p in zip(got, trained, strict=True))
        model.zero_grad(set_to_none=True)
    assert not graph.fits([t[:2] for t in batches[0]])
    if lora:
        frozen = model.backbone.layers[0].mixer.in_proj.weight
        frozen.data = frozen.data.clone()
        assert not graph.fits(batches[0])  # the graph would read the old memory


@pytest.mark.gpu
def test_a_graph_draws_dropout_anew_each_time():
    config = Mamba2Config(vocab_size=300, d_model=128, n_layer=2, d_state=64)
    model = with_adapters(Mamba2LM(config, seed=0).cuda())
    batch = [torch.randint(300, (4, 200), device="cuda") for _ in range(2)]

    def backward(ids, targets):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model.loss(ids, targets)
        loss.backward()
        return loss.detach()

    graph = StepGraph(list(model.parameters()), backward, batch)
    assert len({float(graph(batch)) for _ in range(4)}) == 4


@pytest.mark.gpu
def test_a_carried_state_goes_through_a_graph(tmp_path, data):
    runs = []
    for graph in (False, True):
        trainer = make_trainer(
            tmp_path / str(graph), data, 0.0, device="cuda", max_steps=6, graph=graph, carry_state=True, context=40
        )
        reports = []
        trainer.report = lambda event, values, to=reports: to.append(values) if event == "graph" else None
        trainer.train()
        assert reports == ([{"step": 2, "why_not": ""}] if graph else [])
        runs.append([*trainer.model.parameters(), *trainer.carried.state.ssm, *trainer.carried.state.conv])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
