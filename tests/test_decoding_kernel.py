"""The decoding kernels: in Triton's interpreter against the forward, compiled for GPUs that are not here, on a GPU."""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from instruments import relative_error
from test_graph_decoding import CONFIGS, stirred
from test_triton import BF16, FLOAT32, Recorder, needs_triton

from mamba2_min.config import Mamba2Config
from mamba2_min.inference import (
    cuda_graph,
    kernel_decoding,
    stepping,  # noqa: F401  the fast forms of `Mamba2LM.step`
)
from mamba2_min.inference.cuda_graph import CompiledDecoder
from mamba2_min.inference.decoding import Decoder
from mamba2_min.inference.kernel_decoding import KernelDecoder, fits
from mamba2_min.models.mamba2 import Mamba2LM

# Two layers of the shape of a published model with 130 million parameters, and a small vocabulary.
PUBLISHED = Mamba2Config(vocab_size=50_288, d_model=768, n_layer=2, d_state=128)
# What the kernels take; and no power of two, tails everywhere.
KINDS = {name: config for name, config in CONFIGS.items() if not config.norm_before_gate}
KINDS["odd sizes"] = dataclasses.replace(CONFIGS["plain"], d_model=36, headdim=12, d_state=10, ngroups=3)


@needs_triton
def test_values_in_the_interpreter():
    script = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "decoding_interpreter.py")]
    done = subprocess.run(
        script, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = list(map(json.loads, done.stdout.splitlines()))
    assert len(lines) == 16
    for line in lines:
        assert all(error < 1e-5 for error in line["errors"].values()), line


@needs_triton
@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("state_dtype", [BF16, FLOAT32], ids=str)
@torch.no_grad()
def test_compiled_without_spilling(monkeypatch, name, batch, state_dtype):
    from triton.backends.compiler import GPUTarget

    from mamba2_min.inference import step_kernels

    target, found = GPUTarget("cuda", int(name.removeprefix("sm_")), 32), []
    for kernel in ("project_rows", "join", "project_tiles", "advance"):
        monkeypatch.setattr(step_kernels, kernel, Recorder(getattr(step_kernels, kernel), target, found))
    monkeypatch.setattr(kernel_decoding, "_can_pair", lambda device: name == "sm_90")
    with torch.device("meta"):
        model = Mamba2LM(dataclasses.replace(PUBLISHED, n_layer=1), seed=0).to(BF16)
    decoder = KernelDecoder(model, model.initial_state(batch), state_dtype)
    decoder(torch.empty(batch, dtype=torch.int64, device="meta"))
    by_rows = ["project_rows", "advance", "project_rows", "project_rows"]
    by_tiles = ["join", "project_tiles", "advance", "project_tiles", "join"]
    assert [kernel["kernel"] for kernel in found] == (by_rows if batch == 1 else by_tiles)
    for kernel in found:
        assert kernel["shared"] <= 99 << 10 and kernel["stack"] == 0, kernel
        assert kernel["registers"] <= (255 if kernel["kernel"] == "project_tiles" else 96), kernel


def test_what_they_take():
    small = stirred(CONFIGS["plain"])
    assert not kernel_decoding.takes(small)  # on a CPU
    assert fits(PUBLISHED, BF16) and fits(PUBLISHED, FLOAT32)
    assert not fits(PUBLISHED, torch.float64) and not fits(CONFIGS["gate after the norm"], BF16)
    assert not fits(Mamba2Config(vocab_size=9, d_model=8192), BF16)


@pytest.mark.parametrize("for_them", [True, False])
def test_which_steps_are_recorded(monkeypatch, for_them):
    """Kernels where they take the model; a compiler where it is asked for, or where nothing else keeps a bf16 state."""
    monkeypatch.setattr(kernel_decoding, "takes", lambda model: for_them)
    model = stirred(CONFIGS["plain"])

    def steps(compiled, state_dtype):
        return type(cuda_graph._steps(model, model.initial_state(2), compiled, state_dtype))

    assert steps(False, None) is steps(False, FLOAT32) is (KernelDecoder if for_them else Decoder)
    assert steps(False, BF16) is (KernelDecoder if for_them else CompiledDecoder)
    assert steps(True, None) is steps(True, BF16) is CompiledDecoder


@pytest.mark.parametrize(
    "outcome, told",
    [(1e-3, None), (0.5, "off by 5.0e-01"), (float("nan"), "off by nan"), (RuntimeError("ptxas\nfailed"), "ptxas$")],
)
def test_a_gpu_on_which_they_are_wrong_does_not_use_them(monkeypatch, recwarn, outcome, told):
    def check(*args):
        if isinstance(outcome, Exception):
            raise outcome
        return [1e-3, outcome]

    monkeypatch.setattr(kernel_decoding, "self_check", check)
    assert kernel_decoding._works.__wrapped__(torch.device("cuda", 0), BF16, 64, 128, 4) is (told is None)
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == (told is not None) and all(re.search(told, message) for message in messages)


# -- On a GPU ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def errors_on_a_gpu(config, dtype, batch, state_dtype, steps=6):
    """Of `step`, as it runs by itself on a GPU, against the forward in float64: the logits and the states."""
    model = stirred(config).cuda().to(dtype)
    model.compile_steps(False, state_dtype)
    wide = copy.deepcopy(model).double()
    size = config.vocab_size
    ids = torch.randint(size, (batch, 9 + steps), generator=torch.Generator().manual_seed(batch)).cuda()
    _, state = model.prefill(ids[:, :9])
    logits = []
    for k in range(steps):
        step, state = model.step(ids[:, 9 + k], state)
        logits.append(step.clone())
    wanted, final = wide(ids)
    assert all(t.dtype == (state_dtype or FLOAT32) for t in state.ssm)
    parts = zip((*state.conv, *state.ssm), (*final.conv, *final.ssm), strict=True)
    states = [relative_error(got.double(), value) for got, value in parts if got.numel()]
    return relative_error(torch.stack(logits, 1).double(), wanted[:, 9:]), max(states)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 5, 17, 65])
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_small_models_on_a_gpu(monkeypatch, config, batch):
    """Every kind of model, in float32."""
    used = []
    monkeypatch.setattr(
        cuda_graph.kernel_decoding, "KernelDecoder", lambda *args: used.append(1) or KernelDecoder(*args)
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        logits, states = errors_on_a_gpu(config, FLOAT32, batch, None)
    finally:
        torch.set_float32_matmul_precision(before)
    assert used and logits < 1e-4 and states < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", [None, BF16], ids=["float32 state", "bf16 state"])
@pytest.mark.parametrize("batch", [1, 4, 5, 64, 65])
def test_a_published_shape_on_a_gpu(batch, state_dtype):
    """In bf16: no further from float64 than single operators in bf16 are, with room for a bf16 state's rounding."""
    logits, states = errors_on_a_gpu(PUBLISHED, BF16, batch, state_dtype)
    assert logits < 3e-2 and states < 3e-2


@pytest.mark.gpu
def test_equal_bits_and_paired_kernels_on_a_gpu(monkeypatch):
    """A kernel that begins before the one before it has ended reads nothing too early."""
    model = stirred(PUBLISHED).cuda().to(BF16)
    for batch in (1, 64):
        ids = torch.randint(50_288, (batch, 40), generator=torch.Generator().manual_seed(0)).cuda()
        texts = []
        for paired in (True, True, False):
            with monkeypatch.context() as patch:
                if not paired:
                    patch.setattr(kernel_decoding, "_can_pair", lambda device: False)
                state = model.initial_state(batch)
                texts.append(torch.stack([model.step(ids[:, k], state)[0].clone() for k in range(40)]))
        assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])
