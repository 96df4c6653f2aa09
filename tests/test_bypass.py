"""A module is called or known to be plain: whatever changes what a call does acts in prefill, step and loss alike."""

import copy

import pytest
import torch
from instruments import relative_error
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from mamba2_min.config import Mamba2Config
from mamba2_min.inference import stepping
from mamba2_min.inference.cuda_graph import is_recordable
from mamba2_min.inference.decoding import takes
from mamba2_min.models import called
from mamba2_min.models.bypass import Watch, forwards, is_hooked, is_plain
from mamba2_min.models.mamba2 import Block, Mamba2LM
from mamba2_min.models.transformer import TransformerConfig, TransformerLM

V = 31
IDS = torch.randint(V, (2, 14), generator=torch.Generator().manual_seed(0))
TARGETS = IDS.roll(1, 1).masked_fill(IDS == 3, -100)


def mamba(**changes):
    sizes = {"d_model": 16, "n_layer": 2, "d_state": 6, "headdim": 8, "chunk_size": 8, "vocab_size": V}
    return stirred(Mamba2LM(Mamba2Config(**{**sizes, **changes}), seed=0))


def transformer():
    return stirred(TransformerLM(TransformerConfig(vocab_size=V, d_model=16, headdim=8, d_ff=24), seed=0))


def stirred(model):
    r = torch.Generator().manual_seed(1)
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=r).double())
    return model


PLACES = {
    "model": "",
    "backbone": "backbone",
    "embedding": "backbone.embedding",
    "block": "backbone.layers.1",
    "norm": "backbone.layers.0.norm",
    "mixer": "backbone.layers.1.mixer",
    "in_proj": "backbone.layers.0.mixer.in_proj",
    "conv1d": "backbone.layers.1.mixer.conv1d",
    "gated norm": "backbone.layers.0.mixer.norm",
    "out_proj": "backbone.layers.1.mixer.out_proj",
    "norm_f": "backbone.norm_f",
    "head": "lm_head",
}
at_each_place = pytest.mark.parametrize("place", PLACES)


def turned(output):
    """What a module returned, with its tensor changed: of a block, a mixer and a model the first of several."""
    if isinstance(output, tuple):
        return turned(output[0]), *output[1:]
    return output + 0.4 * output.abs()  # a factor alone would be lost in the next norm


def hook(module):
    module.register_forward_hook(lambda module, args, output: turned(output))


def pre_hook(module):
    def change(module, args, kwargs):
        first, *rest = args
        return (turned(first) if first.is_floating_point() else (first + 1) % V, *rest), kwargs

    module.register_forward_pre_hook(change, with_kwargs=True)


def own_forward(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: turned(forward(*args, **kwargs))


def subclass(module):
    class Other(type(module)):
        def forward(self, *args, **kwargs):
            return turned(super().forward(*args, **kwargs))

    module.__class__ = Other


def assert_one_model(model, before, tokens=IDS):
    """Forward, prompt and steps, and loss, values and gradients, are of one function, and not of `before`'s."""
    whole, final = model(tokens)
    assert relative_error(whole, before(tokens)[0]) > 1e-3
    logits, state = model.prefill(tokens[:, :6])
    got = [logits, *(model.step(tokens[:, t], state)[0].clone() for t in range(6, tokens.shape[1]))]
    assert relative_error(torch.stack(got, 1), whole[:, 5:]) < 1e-10
    for a, b in zip(state.ssm, final.ssm, strict=True):
        assert relative_error(a, b) < 1e-10
    loss, expected = model.loss(tokens, TARGETS), F.cross_entropy(whole.flatten(0, 1), TARGETS.flatten())
    assert relative_error(loss, expected) < 1e-12
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        assert relative_error(a, b) < 1e-10


@at_each_place
@pytest.mark.parametrize("change", [hook, pre_hook, own_forward, subclass], ids=lambda f: f.__name__)
def test_what_is_put_on_a_module_acts_everywhere(place, change):
    model = mamba()
    before = copy.deepcopy(model)
    change(model.get_submodule(PLACES[place]))
    assert_one_model(model, before)


@at_each_place
@pytest.mark.parametrize("change", [hook, pre_hook, own_forward, subclass], ids=lambda f: f.__name__)
def test_what_is_put_on_a_module_within_a_text_acts_from_there_on(place, change):
    model = mamba()
    state = model.initial_state(2)
    for t in range(5):
        model.step(IDS[:, t], state)
    assert state in stepping._decoders
    plain = model(IDS[:, 5:], state.clone())[0]
    change(model.get_submodule(PLACES[place]))
    with torch.no_grad():
        expected, _ = model(IDS[:, 5:], state.clone())
    got = torch.stack([model.step(IDS[:, t], state)[0].clone() for t in range(5, 14)], 1)
    assert relative_error(got, expected) < 1e-10 and relative_error(got, plain) > 1e-3


def test_what_is_taken_off_again_no_longer_acts():
    model = mamba()
    expected, state = model(IDS)[0], model.initial_state(2)
    handle = model.backbone.layers[0].register_forward_hook(lambda module, args, output: None)
    got = [model.step(IDS[:, t], state)[0].clone() for t in range(5)]
    assert state not in stepping._decoders
    handle.remove()
    got += [model.step(IDS[:, t], state)[0].clone() for t in range(5, 14)]
    assert state in stepping._decoders and relative_error(torch.stack(got, 1), expected) < 1e-10


def names_called(model, run):
    """The module names, with the inputs' numbers of dimensions, that a call of `run` calls."""
    seen, handles = [], []
    for name, module in model.named_modules():

        def note(module, args, kwargs, output, name=name):
            seen.append((name, [a.dim() for a in args if isinstance(a, torch.Tensor)][:1]))

        handles.append(module.register_forward_hook(note, with_kwargs=True))
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("build", [mamba, transformer], ids=lambda f: f.__name__)
def test_every_module_is_called_by_a_prompt_a_step_and_the_loss(build):
    model = build()
    leaves = {name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    whole = names_called(model, lambda: model(IDS))
    assert {name for name, _ in whole} == leaves
    assert names_called(model, lambda: model.prefill(IDS)) == whole
    assert names_called(model, lambda: model.loss(IDS, TARGETS)) == whole
    state = model.initial_state(2)
    assert names_called(model, lambda: model.step(IDS[:, 0], state)) == whole


def test_a_global_hook_is_called():
    model, seen = mamba(), []
    state = model.initial_state(2)
    model.step(IDS[:, 0], state)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: turned(output) if isinstance(module, nn.Conv1d) else None
    )
    try:
        assert_one_model(model, lambda tokens: (torch.zeros(2, 14, V), None))
        with torch.no_grad():
            expected, _ = model(IDS[:, 1:], state.clone())
        seen = [model.step(IDS[:, t], state)[0].clone() for t in range(1, 14)]
    finally:
        handle.remove()
    assert relative_error(torch.stack(seen, 1), expected) < 1e-10


def test_a_forward_that_its_class_was_given_is_called(monkeypatch):
    model = mamba()
    before = copy.deepcopy(model)(IDS)[0]
    state = model.initial_state(2)
    model.step(IDS[:, 0], state)
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *args: turned(forward(self, *args)))
    assert_one_model(model, lambda tokens: (before, None))


class Adapter(nn.Module):
    """A low-rank addition to a module, the way adapters wrap one."""

    def __init__(self, base):
        super().__init__()
        self.base, r = base, torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(2, base.weight.shape[1], generator=r).double())
        self.up = nn.Parameter(torch.randn(base.weight.shape[0], 2, generator=r).double())

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def adapter(model):
    model.lm_head = Adapter(model.lm_head)


def layer_norm(model):
    model.backbone.norm_f = nn.LayerNorm(16).double()


def biased_head(model):
    weight = model.lm_head.weight
    model.lm_head = nn.Linear(16, V).double()
    model.lm_head.weight = weight


def dense_convolution(model):
    conv1d = model.backbone.layers[0].mixer.conv1d
    model.backbone.layers[0].mixer.conv1d = nn.Conv1d(conv1d.in_channels, conv1d.in_channels, 4).double()


def weight_norm(model):
    conv1d = model.backbone.layers[1].mixer.conv1d
    parametrizations.weight_norm(conv1d)
    with torch.no_grad():
        conv1d.parametrizations.weight.original0.mul_(2)


def rounded_head(model):
    class Rounded(nn.Module):
        def forward(self, weight):
            return weight.round(decimals=1)

    parametrize.register_parametrization(model.lm_head, "weight", Rounded())


def other_block(model):
    class Steered(Block):
        def forward(self, x, *rest):
            return super().forward(x + 1.0, *rest)

    block = Steered(model.config).double()
    block.load_state_dict(model.backbone.layers[1].state_dict())
    model.backbone.layers[1] = block


def other_eps(model):
    model.backbone.norm_f.eps = 1.0


CHANGES = [adapter, layer_norm, biased_head, dense_convolution, weight_norm, rounded_head, other_block, other_eps]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_replaces_a_module_acts_everywhere(change):
    model = mamba()
    before = copy.deepcopy(model)
    change(model)
    assert_one_model(model, before)


def test_an_adapter_on_the_head_learns():
    model = mamba()
    adapter(model)
    model.loss(IDS, TARGETS).backward()
    assert model.lm_head.up.grad.any() and model.lm_head.down.grad.any()


@pytest.mark.parametrize("place", ["lm_head", "backbone.layers.0.mixer.conv1d", "backbone.layers.1"])
def test_backward_hooks_are_called(place):
    model, seen = mamba(), []
    plain = torch.autograd.grad(model.loss(IDS, TARGETS), list(model.parameters()))
    module = model.get_submodule(place)
    module.register_full_backward_hook(lambda module, inputs, outputs: seen.append("after"))
    module.register_full_backward_pre_hook(lambda module, outputs: seen.append("before"))
    got = torch.autograd.grad(model.loss(IDS, TARGETS), list(model.parameters()))
    assert seen == ["before", "after"]
    assert all(relative_error(a, b) < 1e-10 for a, b in zip(got, plain, strict=True))


def test_the_head_is_called_on_slices_and_never_on_all_positions(monkeypatch):
    model, rows = mamba(), []
    monkeypatch.setattr(called, "_SLICE_ELEMENTS", 2 * 5 * V)
    whole = model(IDS)[0]
    expected = F.cross_entropy(whole.flatten(0, 1), TARGETS.flatten())
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(tuple(output.shape)))
    loss = model.loss(IDS, TARGETS)
    assert rows == [(2, 5, V), (2, 5, V), (2, 4, V)]
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        assert relative_error(a, b) < 1e-10
    assert len(rows) == 6  # the backward pass makes each slice's logits again
    assert relative_error(model.loss_and_state(IDS, TARGETS, reduction="sum")[0] / (TARGETS >= 0).sum(), loss) < 1e-12
    with pytest.raises(ValueError, match="targets must lie in"):
        model.loss(IDS, torch.full_like(IDS, V))
    assert model.loss(IDS, torch.full_like(IDS, -100)) == 0


@pytest.mark.parametrize("d_conv", [1, 2, 4])
@pytest.mark.parametrize(
    "rows", [[[0] * 14, [1] * 14], [[0] * 5 + [4] * 2 + [0] * 7, [0] * 13 + [1]]], ids=["one", "3"]
)
@pytest.mark.parametrize("with_state", [False, True])
def test_a_convolution_that_is_called_keeps_documents_apart(d_conv, rows, with_state):
    model, seq_idx = mamba(d_conv=d_conv), torch.tensor(rows)
    state = model(IDS.flip(1))[1].detach() if with_state else None
    expected, kept = model(IDS, state, seq_idx)
    weights = list(model.parameters())
    gradients = torch.autograd.grad(expected.square().sum() + sum(t.sum() for t in kept.conv), weights)
    for block in model.backbone.layers:
        block.mixer.conv1d.register_forward_hook(lambda module, args, output: None)
    got, new = model(IDS, state, seq_idx)
    assert relative_error(got, expected) < 1e-10
    for a, b in zip((*new.conv, *new.ssm), (*kept.conv, *kept.ssm), strict=True):
        assert a.shape == b.shape and (a.numel() == 0 or relative_error(a, b) < 1e-10)
    again = torch.autograd.grad(got.square().sum() + sum(t.sum() for t in new.conv), weights)
    assert all(relative_error(a, b) < 1e-10 for a, b in zip(again, gradients, strict=True))


def test_a_convolution_of_another_length_is_refused_in_one_line():
    model = mamba()
    c = model.config.conv_dim
    model.backbone.layers[0].mixer.conv1d = nn.Conv1d(c, c, 4, groups=c, padding=3).double()
    with pytest.raises(ValueError, match=r"^conv1d must return \(2, 44, 14\) for \(2, 44, 17\), not \(2, 44, 20\)$"):
        model(IDS)


def test_weights_that_are_no_plain_tensors_make_a_module_that_is_called():
    class Packed(torch.Tensor):
        pass

    known = forwards(nn.Linear)
    linear = nn.Linear(3, 2)
    assert is_plain(linear, known) and not is_plain(nn.Linear(3, 2, device="meta"), known)
    linear.weight = nn.Parameter(torch.randn(2, 3).as_subclass(Packed))
    assert not is_plain(linear, known)
    assert not is_plain(nn.Identity(), known)


def test_a_gpu_records_nothing_that_is_hooked():
    """The answer that both the GPU's and the CPU's decoder ask for."""
    model = mamba()
    assert takes(model) and is_recordable(model)
    for place in PLACES.values():
        handle = model.get_submodule(place).register_forward_hook(lambda *_: None)
        assert not takes(model)
        handle.remove()
    assert takes(model)


def test_a_look_at_the_modules_sees_what_is_put_in_the_place_of_another():
    model = mamba()

    def sees(change):
        watch = Watch(model)
        assert watch.sees_no_change(model)
        change()
        return not watch.sees_no_change(model)

    mixer = model.backbone.layers[0].mixer
    assert sees(lambda: setattr(mixer, "D", nn.Parameter(mixer.D.detach().clone())))
    assert sees(lambda: setattr(mixer, "in_proj", copy.deepcopy(mixer.in_proj)))
    assert sees(lambda: setattr(mixer.D, "data", mixer.D.data.clone()))
    assert sees(lambda: setattr(mixer.norm, "eps", 0.5))
    assert sees(lambda: model.backbone.layers.append(copy.deepcopy(model.backbone.layers[0])))
    assert not sees(lambda: mixer.D.data.mul_(2))
    assert not sees(lambda: model.train())
    assert not Watch(model).sees_no_change(copy.deepcopy(model)) and not is_hooked(model)


@pytest.mark.parametrize("place", ["", "backbone.embedding", "backbone.layers.1", "backbone.layers.0.mixer.qkv_proj"])
@pytest.mark.parametrize("change", [hook, own_forward, subclass], ids=lambda f: f.__name__)
def test_a_transformer_calls_its_modules_too(place, change):
    model = transformer()
    state = model.initial_state(2)
    for t in range(4):
        model.step(IDS[:, t], state)
    change(model.get_submodule(place))
    expected, _ = model(IDS[:, 4:], state.clone())
    got = [model.step(IDS[:, t], state)[0].clone() for t in range(4, 14)]
    assert relative_error(torch.stack(got, 1), expected) < 1e-10
    assert (
        relative_error(model.loss(IDS, TARGETS), F.cross_entropy(model(IDS)[0].flatten(0, 1), TARGETS.flatten()))
        < 1e-12
    )


def test_compiled_training_calls_a_block_that_is_hooked(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda *_: pytest.fail("a hooked block was compiled"))
    model = mamba().train()
    model.compile_blocks()
    before = copy.deepcopy(model).eval()
    for block in model.backbone.layers:
        hook(block.mixer.in_proj)
    assert_one_model(model, before)
