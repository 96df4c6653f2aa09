"""Where PyTorch looks inside: torch.func, torch.export, torch.jit.trace, make_fx, fake tensors and the meta device."""

import pytest
import torch
from instruments import relative_error
from test_bypass import IDS, TARGETS, V, mamba, transformer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from mamba2_min import Mamba2LM
from mamba2_min.ops import autograd

each_model = pytest.mark.parametrize("build", [mamba, transformer], ids=lambda f: f.__name__)
exports = pytest.mark.skipif(not autograd._TELLS_EXPORT, reason="PyTorch before 2.12 does not tell export from compile")


class Loss(nn.Module):
    """What torch.func and torch.export call: a forward that gives the loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, targets, seq_idx=None):
        return self.model.loss(ids, targets, seq_idx=seq_idx)


class Logits(Loss):
    def forward(self, ids):
        return self.model(ids)[0]


def prepared(build):
    model = build()
    loss = Loss(model)
    return model, loss, {name: p.detach() for name, p in loss.named_parameters()}


def gradients(model, *args, **kwargs):
    return torch.autograd.grad(model.loss(*args, **kwargs), list(model.parameters()))


def small(build):
    """Of one layer: tracing takes its time."""
    model = build().eval()
    del model.backbone.layers[1:]
    return model


def assert_close(got, expected, tolerance=1e-10):
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < tolerance


# -- torch.func -------------------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_grad_by_torch_func(build, documents):
    model, loss, parameters = prepared(build)
    seq_idx = torch.arange(14).expand(2, -1) // 5 if documents else None
    got = grad(lambda p: functional_call(loss, p, (IDS, TARGETS, seq_idx)))(parameters)
    assert_close(got.values(), gradients(model, IDS, TARGETS, seq_idx=seq_idx))


@each_model
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_per_example(build):
    model, loss, parameters = prepared(build)

    def one(p, ids, targets):
        return functional_call(loss, p, (ids[None], targets[None]))

    got = vmap(grad(one), in_dims=(None, 0, 0))(parameters, IDS, TARGETS)
    rows = [gradients(model, IDS[k : k + 1], TARGETS[k : k + 1]) for k in range(len(IDS))]
    assert_close(got.values(), [torch.stack(row) for row in zip(*rows, strict=True)])


@each_model
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_an_ensemble_of_models(build):
    models = [build(), build()]
    with torch.no_grad():
        models[1].lm_head.weight.mul_(1.1)
    stacked, buffers = stack_module_state(models)
    got = vmap(lambda p, b, ids: functional_call(models[0], (p, b), (ids,))[0], in_dims=(0, 0, None))(
        stacked, buffers, IDS
    )
    assert_close(got, [model(IDS)[0] for model in models])


@each_model
def test_first_and_second_derivatives_by_a_parameter(build):
    _, loss, parameters = prepared(build)
    name = "model.backbone.norm_f.weight"

    def by(weight):
        return functional_call(loss, {**parameters, name: weight}, (IDS, TARGETS))

    weight, step = parameters[name], torch.randn(16, generator=torch.Generator().manual_seed(0)).double()
    first, second, e = jacrev(by)(weight), hessian(by)(weight), 1e-5
    assert relative_error((by(weight + e * step) - by(weight - e * step)) / (2 * e), first @ step) < 1e-7
    assert relative_error(jvp(by, (weight,), (step,))[1], first @ step) < 1e-10
    slope = (jacrev(by)(weight + e * step) - jacrev(by)(weight - e * step)) / (2 * e)
    assert relative_error(slope, second @ step) < 1e-6


@each_model
def test_a_gradient_is_taken_twice_from_one_graph(build):
    model = build()
    loss = model.loss(IDS, TARGETS)
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    kept = [t.clone() for t in first]
    for t in first:
        t.zero_()  # what was handed out is nobody else's
    assert_close(torch.autograd.grad(3 * loss, list(model.parameters())), [3 * t for t in kept], 1e-12)


@each_model
def test_a_gradient_of_gradients_is_refused_in_one_line(build):
    model = build()
    with pytest.raises(RuntimeError, match=r"no gradients of their own .*torch\.func") as error:
        torch.autograd.grad(model.loss(IDS, TARGETS), list(model.parameters()), create_graph=True)
    assert "\n" not in str(error.value)


# -- torch.export and tracers -----------------------------------------------------------------------------------------


@exports
@each_model
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["not strict", "strict"])
def test_a_forward_is_exported(build, strict):
    model = small(build)
    exported = torch.export.export(model, (IDS,), strict=strict).module()
    logits, state = exported(IDS)
    expected, after = model(IDS)
    assert relative_error(logits, expected) < 1e-10 and type(state) is type(after)
    assert_close(torch.utils._pytree.tree_leaves(state)[:1], torch.utils._pytree.tree_leaves(after)[:1])


@exports
@each_model
def test_a_forward_is_exported_for_any_length(build):
    model = small(build)
    length = {"ids": {1: torch.export.Dim("l", min=2, max=512)}}
    exported = torch.export.export(Logits(model), (IDS,), dynamic_shapes=length, strict=False).module()
    for ids in (IDS, IDS.repeat(1, 5), IDS[:, :3]):
        assert relative_error(exported(ids), model(ids)[0]) < 1e-10


@exports
def test_a_continued_text_and_a_loss_of_documents_are_exported():
    model = small(mamba)
    _, state = model(IDS)
    exported = torch.export.export(model, (IDS, state), strict=False).module()
    assert relative_error(exported(IDS, state)[0], model(IDS, state)[0]) < 1e-10
    seq_idx = torch.arange(14).expand(2, -1) // 5
    loss = torch.export.export(Loss(model), (IDS, TARGETS, seq_idx), strict=False).module()
    assert relative_error(loss(IDS, TARGETS, seq_idx), model.loss(IDS, TARGETS, seq_idx=seq_idx)) < 1e-10


@each_model
@pytest.mark.filterwarnings("ignore")
def test_other_tracers(build):
    model = small(build)
    assert relative_error(make_fx(lambda ids: model(ids)[0])(IDS)(IDS), model(IDS)[0]) < 1e-10
    traced = torch.jit.trace(Logits(model), (IDS,), check_trace=False)
    assert relative_error(traced(IDS), model(IDS)[0]) < 1e-10
    with pytest.raises(ValueError, match="input_ids must be a tensor of integers, not a Proxy"):
        torch.fx.symbolic_trace(Logits(model))


# -- Tensors without values -------------------------------------------------------------------------------------------


def run_all(model, ids):
    seq_idx = torch.zeros_like(ids)
    assert model(ids)[0].shape == model(ids, seq_idx=seq_idx)[0].shape == (*ids.shape, V)
    assert model.prefill(ids)[0].shape == (len(ids), V)
    for recompute in (False, True):
        model.train().recompute = recompute
        model.zero_grad()
        (model.loss(ids, ids) + model.loss(ids, ids, seq_idx=seq_idx)).backward()
        assert all(p.grad.shape == p.shape for p in model.parameters())


@each_model
def test_shapes_without_memory(build):
    model = build().to("meta")
    assert model.lm_head.weight is model.backbone.embedding.weight and model.lm_head.weight.is_meta
    run_all(model, IDS.to("meta"))
    with FakeTensorMode():
        run_all(type(model)(model.config), torch.zeros(2, 14, dtype=torch.long))


@each_model
def test_an_empty_batch(build):
    model, ids = build(), IDS[:0]
    run_all(model, ids)
    assert model.loss(ids, ids) == 0 and all(not p.grad.any() for p in model.parameters())
    _, state = model(ids)
    assert model(ids, state)[0].shape == (0, 14, V)
    assert model.step(ids[:, 0], model.initial_state(0))[0].shape == (0, V)
    model.lm_head.register_forward_hook(lambda *_: None)
    model.backbone.layers[0].mixer.register_forward_hook(lambda *_: None)
    run_all(model, ids)


def test_an_empty_batch_with_a_convolution_that_is_called():
    model = mamba()
    model.backbone.layers[0].mixer.conv1d.register_forward_hook(lambda *_: None)
    run_all(model, IDS[:0])


@each_model
def test_a_head_stays_tied_where_pytorch_makes_new_parameters(build):
    expected = build().float().eval()
    with torch.device("meta"):
        model = type(expected)(expected.config)
    model.to_empty(device="cpu").load_state_dict(expected.state_dict())
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert torch.equal(model.eval()(IDS)[0], expected(IDS)[0])
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert model.lm_head.weight is model.backbone.embedding.weight
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.half().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model.lm_head.weight is model.backbone.embedding.weight


def test_a_head_that_is_not_tied_stays_so():
    model = mamba(tie_embeddings=False).to("meta").to_empty(device="cpu")
    assert isinstance(model, Mamba2LM) and model.lm_head.weight is not model.backbone.embedding.weight
