"""Steps that a compiler and a CUDA graph take: the same numbers as the others."""

import dataclasses

import pytest
import torch
from instruments import relative_error
from torch import nn

from mamba2_min.config import Mamba2Config
from mamba2_min.inference import stepping  # noqa: F401  the fast forms of `Mamba2LM.step`
from mamba2_min.inference.cuda_graph import CompiledDecoder, is_recordable
from mamba2_min.models.mamba2 import Mamba2LM

PLAIN = Mamba2Config(vocab_size=61, d_model=32, n_layer=2, d_state=16, headdim=8, pad_vocab_size_multiple=8)
CONFIGS = {
    "plain": PLAIN,
    "two groups": dataclasses.replace(PLAIN, ngroups=2),
    "groups that share a norm": dataclasses.replace(PLAIN, ngroups=2, norm_per_group=False),
    "gate after the norm": dataclasses.replace(PLAIN, norm_before_gate=True),
    "biases": dataclasses.replace(PLAIN, proj_bias=True, conv_bias=False),
    "one tap": dataclasses.replace(PLAIN, d_conv=1),
    "untied": dataclasses.replace(PLAIN, tie_embeddings=False),
}


def stirred(config, seed=0):
    """A model of which no parameter is at a value that would hide it."""
    model = Mamba2LM(config, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise * parameter.std(correction=0).add(0.1))
    return model


@torch.no_grad()
def read(model, decoder_of, batch, tokens=7):
    """Logits of some tokens after a prompt, and the state then."""
    ids = torch.randint(61, (batch, 5 + tokens), generator=torch.Generator().manual_seed(batch))
    ids = ids.to(model.lm_head.weight.device)
    _, state = model.prefill(ids[:, :5])
    state = state.clone()
    decoder = decoder_of(model, state)
    logits = [decoder(ids[:, 5 + k])[:, :61].clone() for k in range(tokens)]
    return torch.stack(logits, 1), decoder.conv, state.ssm, model(ids)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("batch", [1, 3])
def test_what_is_compiled_computes_what_the_model_does(config, batch):
    model = stirred(config)
    logits, conv, ssm, (expected, state) = read(model, lambda *args: CompiledDecoder(*args, compiled=False), batch)
    assert relative_error(logits, expected[:, 5:]) < 2e-5
    for got, wanted in zip((*conv, *ssm), (*state.conv, *state.ssm), strict=True):
        assert got.numel() == 0 or relative_error(got, wanted) < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_a_state_that_is_kept_in_bf16_is_rounded_once_a_token(batch):
    model = stirred(PLAIN)
    ids = torch.randint(61, (batch, 12), generator=torch.Generator().manual_seed(batch))
    _, state = model.prefill(ids[:, :5])
    expected, narrow = state.clone(), state.clone()
    decoder = CompiledDecoder(model, narrow, torch.bfloat16, compiled=False)
    assert all(t.dtype == torch.bfloat16 for t in narrow.ssm) and narrow.nbytes < state.nbytes
    for k in range(5, 12):
        for t in expected.ssm:
            t.copy_(t.bfloat16())
        wanted, expected = model.step(ids[:, k], expected)
        assert relative_error(decoder(ids[:, k])[:, :61], wanted) < 1e-2
    for got, wanted in zip(narrow.ssm, expected.ssm, strict=True):
        assert relative_error(got.float(), wanted) < 1e-2
    narrow.conv[:] = decoder.conv
    wanted, _ = model(ids[:, :4], narrow.clone())  # goes on wherever a state does
    got, _ = model.step(ids[:, 0], narrow.clone())
    assert relative_error(got, wanted[:, 0]) < 2e-5


def test_a_state_that_was_decoded_may_be_trained_from():
    model = stirred(PLAIN)
    with torch.no_grad():
        _, state = model.prefill(torch.tensor([[1, 2, 3]]))
    with torch.inference_mode():
        decoder = CompiledDecoder(model, state, compiled=False)
        for token in (4, 5, 6):
            decoder(torch.tensor([token]))
            state.conv[:] = decoder.conv
            assert not any(t.is_inference() for t in (*state.conv, *state.ssm))
    logits, _ = model(torch.tensor([[7, 8]]), state)
    logits.sum().backward()


def test_a_projection_that_is_wrapped_is_not_gone_around():
    model = stirred(PLAIN)
    assert is_recordable(model)
    model.backbone.layers[1].mixer.in_proj = nn.Sequential(model.backbone.layers[1].mixer.in_proj)
    assert not is_recordable(model)


@pytest.mark.gpu
def test_a_state_in_bf16_on_a_gpu():
    model = stirred(PLAIN).cuda()
    ids = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(0)).cuda()
    expected, _ = model(ids)
    model.compile_steps(state_dtype=torch.bfloat16)
    _, state = model.prefill(ids[:, :5])
    for k in range(5, 12):
        logits, state = model.step(ids[:, k], state)
        assert relative_error(logits, expected[:, k]) < 2e-2
    assert all(t.dtype == torch.bfloat16 for t in state.ssm)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["recorded", "compiled and recorded"])
@pytest.mark.parametrize("batch", [1, 3])
def test_on_a_gpu(compiled, batch):
    model = stirred(PLAIN).cuda()
    ids = torch.randint(61, (batch, 12), generator=torch.Generator().manual_seed(0)).cuda()
    expected, whole = model(ids)
    model.compile_steps(compiled)
    _, state = model.prefill(ids[:, :5])
    for k in range(5, 12):
        logits, state = model.step(ids[:, k], state)
        assert relative_error(logits, expected[:, k]) < 1e-4
        if k == 8:
            state = state.clone()  # and a decoder anew
    for got, wanted in zip((*state.conv, *state.ssm), (*whole.conv, *whole.ssm), strict=True):
        assert relative_error(got, wanted) < 1e-4
    more, _ = model(ids[:, :4], state)  # the state goes on elsewhere
    assert relative_error(more, model(ids[:, :4], whole)[0]) < 1e-4
