"""The projection with an adapter as one function: values, gradients, and what it keeps for the backward pass."""

import contextlib
import copy
from unittest import mock

import pytest
import torch
from instruments import relative_error
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from mamba2_min import ssd
from mamba2_min.config import Mamba2Config
from mamba2_min.finetune.lora import LoRAConfig, adapters, add_lora
from mamba2_min.models import core
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.ops import gpu_kernels, norm
from mamba2_min.ops.lora import lora_linear
from mamba2_min.ops.norm import gated_rms_norm, rms_norm
from mamba2_min.ops.recipes import recipe_of
from mamba2_min.settings import PRESETS


def make(inside, out, r, bias, dtype=torch.float64, shape=(3, 5)):
    random = torch.Generator().manual_seed(0)
    x, A, B, weight, offset = (
        torch.randn(size, generator=random, dtype=torch.float64).to(dtype)
        for size in ((*shape, inside), (r, inside), (out, r), (out, inside), (out,))
    )
    return [x.requires_grad_(), weight, offset if bias else None, A.requires_grad_(), B.requires_grad_()]


def plain(x, weight, bias, A, B, scale, mask=None):
    dropped = x if mask is None else x * mask
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(dropped, A), B)


def gradients(y, x, A, B):
    return torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), (x, A, B))


@pytest.mark.parametrize(("inside", "out", "r", "bias"), [(7, 5, 2, True), (16, 33, 3, False), (1, 1, 1, True)])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_values_and_gradients_are_those_of_single_operations(inside, out, r, bias, p):
    x, weight, offset, A, B = make(inside, out, r, bias)
    torch.manual_seed(5)
    y = lora_linear(x, weight, offset, A, B, 3.0, p)
    torch.manual_seed(5)
    mask = torch.empty(x.shape, dtype=torch.bool).bernoulli_(1 - p).double() / (1 - p) if p else None
    wanted = plain(x, weight, offset, A, B, 3.0, mask)
    assert relative_error(y, wanted) < 1e-12
    for got, right in zip(gradients(y, x, A, B), gradients(wanted, x, A, B), strict=True):
        assert relative_error(got, right) < 1e-12


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(p):
    x, weight, bias, A, B = make(4, 3, 2, True, shape=(5,))

    def function(*learnt):
        torch.manual_seed(2)
        return lora_linear(learnt[0], weight, bias, *learnt[1:], 1.5, p)

    assert torch.autograd.gradcheck(function, (x, A, B))


def test_dropout_drops_as_often_as_asked_and_keeps_the_mean():
    x, A, B = torch.ones(400, 500), torch.eye(500), torch.eye(500)
    with torch.no_grad():
        y = lora_linear(x, torch.zeros(500, 500), None, A, B, 1.0, 0.1)
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.9))}
    assert abs(float((y == 0).float().mean()) - 0.1) < 0.003  # four standard deviations


def test_autocast_is_that_of_a_linear():
    x, weight, bias, A, B = make(16, 24, 4, True, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, wanted = lora_linear(x, weight, bias, A, B, 2.0, 0.0), plain(x, weight, bias, A, B, 2.0)
    assert y.dtype == wanted.dtype == torch.bfloat16 and relative_error(y, wanted) < 1e-2
    found, right = gradients(y.float(), x, A, B), gradients(wanted.float(), x, A, B)
    for got, meant in zip(found, right, strict=True):
        assert got.dtype == meant.dtype == torch.float32 and relative_error(got, meant) < 1e-2


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_norm_tells_how_to_compute_its_output_again(frozen):
    random = torch.Generator().manual_seed(0)
    y, z = (torch.randn(2, 5, 8, generator=random).requires_grad_() for _ in range(2))
    weight = torch.randn(8, generator=random).requires_grad_(not frozen)
    for out in (rms_norm(y, weight, 1e-5), gated_rms_norm(y, z, weight, 1e-5, groups=2)):
        recipe = recipe_of(out)
        assert (recipe is not None) == frozen
        if recipe:
            assert torch.equal(recipe.compute(*recipe.inputs), out)
            with torch.no_grad():
                out += 1
            assert recipe_of(out) is None  # as a hook may do


def small(n_layer=2, **changes):
    return Mamba2LM(Mamba2Config(vocab_size=61, d_model=16, n_layer=n_layer, d_state=6, headdim=8, **changes), seed=0)


def test_a_hook_between_norm_and_projection_is_respected():
    """What the norm's recipe computes is then not what the projection read."""
    model = small().double()
    add_lora(model, LoRAConfig(r=3, dropout=0.0), seed=1)
    for _, module in adapters(model):
        torch.nn.init.normal_(module.lora_B.weight)
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    found = []
    for hook in (lambda m, a, out: out * 3, lambda m, a, out: out.mul_(3)):
        one = copy.deepcopy(model)
        for block in one.backbone.layers:
            block.mixer.norm.register_forward_hook(hook)
        one.loss(ids[:, :-1], ids[:, 1:]).backward()
        found.append([p.grad for p in one.parameters() if p.requires_grad])
    scaled = copy.deepcopy(model)
    for block in scaled.backbone.layers:
        block.mixer.norm.weight.data *= 3
    scaled.loss(ids[:, :-1], ids[:, 1:]).backward()
    wanted = [p.grad for p in scaled.parameters() if p.requires_grad]
    for one in found:
        assert all(relative_error(a, b) < 1e-10 for a, b in zip(one, wanted, strict=True))


class NoKernel:
    """Stands in for a kernel: nothing is computed, and all memory is allocated as on a GPU."""

    def __getitem__(self, grid):
        return lambda *args, **options: None


@contextlib.contextmanager
def as_on_a_gpu():
    """The code's path of a GPU under autocast, without its numbers."""
    triton = pytest.importorskip("triton")
    from mamba2_min.ops import conv_kernels, lora_kernels, norm_kernels
    from mamba2_min.ssd import triton_kernels

    with contextlib.ExitStack() as stack:
        for module in (conv_kernels, lora_kernels, norm_kernels, triton_kernels):
            for name, value in list(vars(module).items()):
                if isinstance(value, triton.JITFunction):
                    stack.enter_context(mock.patch.object(module, name, NoKernel()))
        narrow = (torch.bfloat16, torch.float32)
        stack.enter_context(mock.patch.object(gpu_kernels, "takes", lambda t: t.dtype in narrow))
        for module in (norm, core):
            stack.enter_context(mock.patch.object(module, "writes_bf16", lambda: True))
        stack.enter_context(ssd.using("triton"))
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        yield


def kept_by(model, ids):
    """The bytes of all tensors that the backward pass needs, but for parameters and their bf16 copies."""
    weights = {p.shape for p in model.parameters()} | {p.shape[::-1] for p in model.parameters()}
    weights |= {torch.Size((p.shape[0], p.shape[1] + 16)) for p in model.parameters() if p.dim() == 2}  # W beside B
    found = {}

    def note(t):
        if t.shape not in weights:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with as_on_a_gpu(), saved_tensors_hooks(note, lambda t: t):
        model.hidden(ids)
    return sum(storage.nbytes() for storage in found.values())


def kept_in_a_layer(lora):
    """What one layer of the 130M model keeps, a token."""
    by_layers = []
    for n_layer in (2, 3):
        model = Mamba2LM(Mamba2Config(61, **{**PRESETS["base"], "n_layer": n_layer}), seed=0).train()
        if lora:
            add_lora(model, LoRAConfig(16, 32.0, 0.1))
        by_layers.append(kept_by(model, torch.zeros(1, 512, dtype=torch.int64)) / 512)
    return by_layers[1] - by_layers[0]


def test_lora_keeps_at_most_seven_tenths_of_full_fine_tuning():
    full, lora = kept_in_a_layer(False), kept_in_a_layer(True)
    assert 24_000 < full < 25_000  # as docs/LOG.md says
    assert lora < 0.7 * full
