"""The scan of bf16 activations that GPUs use: as exact as its operands allow, whatever the shape. On a CPU too."""

import pytest
import torch
from instruments import relative_error
from test_ssd import INPUTS, by_definition, make, run, to

from mamba2_min.ops.seq_idx import document_numbers
from mamba2_min.ssd import ssd_chunked
from mamba2_min.ssd.cpu import chunked_scan
from mamba2_min.ssd.cuda import BF16Scan

NARROW = ("x", "B", "C")


TOLERANCE = {"dA": 3e-2}  # a sum over all tokens of terms of either sign, each rounded to bf16


def bf16_scan(x, dt, A, B, C, D=None, initial_state=None, seq_idx=None, q=8):
    """For l a multiple of q."""
    b, l, h, p = x.shape
    start = dt.new_zeros(b, h, p, B.shape[3]) if initial_state is None else initial_state
    segment = None if seq_idx is None else document_numbers(seq_idx, b, l, x.device)
    return BF16Scan.apply(x, dt, A, B, C, D, start, segment, q)


def rounded(case):
    """The case with its activations in bf16, and the same numbers in float64."""
    low = to(case, torch.float32)
    low.update({name: low[name].bfloat16() for name in NARROW})
    return low, to(low, torch.float64)


@pytest.mark.parametrize("g", [1, 2])
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("skip", [False, True], ids=["no D", "D"])
def test_values_and_gradients(g, documents, skip):
    low, wide = rounded(make(l=40, g=g, documents=documents, skip=skip))
    got, expected = run(bf16_scan, low), run(by_definition, wide)
    assert got["y"].dtype == torch.bfloat16 and got["state"].dtype == torch.float32
    for name, value in expected.items():
        assert relative_error(got[name], value) < TOLERANCE.get(name, 1e-2), name


def test_a_gradient_through_each_result_alone():
    low, wide = rounded(make(l=24))
    for through in ((0, 1), (1, 0)):
        got, expected = run(bf16_scan, low, through=through), run(by_definition, wide, through=through)
        for name, value in expected.items():
            if value.any():
                assert relative_error(got[name], value) < TOLERANCE.get(name, 1e-2), (name, through)


@pytest.mark.parametrize("decay", [-1e4, -1e-3])
def test_extremes_are_finite(decay):
    low, _ = rounded(make(l=64, documents=False))
    low["A"].fill_(decay)
    low["dt"][:, ::5] = 1e3
    assert all(t.isfinite().all() for t in run(bf16_scan, low).values())


@pytest.mark.parametrize(("b", "l"), [(1, 16), (3, 8), (2, 24)])
def test_a_compiler_finds_the_same_gradients(b, l):
    """Without its code generator: what it reads out of the hand-written derivatives, of each result."""
    low, _ = rounded(make(l=l, b=b, documents=False))
    compiled = torch.compile(bf16_scan, backend="aot_eager", dynamic=False)
    for through in ((0, 1), (1, 0), (1, 1)):
        got, expected = run(compiled, low, through=through), run(bf16_scan, low, through=through)
        for name, value in expected.items():
            assert relative_error(got[name], value) < 1e-6, (name, through)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"], ids=["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_on_a_gpu(backend, documents):
    low, wide = rounded(make(l=500, b=2, h=8, g=2, p=64, n=64, documents=documents))
    form = ssd_chunked if backend is None else torch.compile(ssd_chunked, backend=backend, dynamic=False)
    got = run(lambda **case: form(**case, chunk_size=64), {k: v if v is None else v.cuda() for k, v in low.items()})
    for name, value in run(by_definition, wide).items():
        assert relative_error(got[name].cpu(), value) < TOLERANCE.get(name, 1e-2), name


def test_a_cpu_does_not_use_it():
    low, _ = rounded(make(l=16, documents=False))
    y, _ = chunked_scan(*(low[name] for name in INPUTS), None, 8)
    assert y.grad_fn is None
    low["x"].requires_grad_()
    y, _ = chunked_scan(*(low[name] for name in INPUTS), None, 8)
    assert "BF16" not in type(y.grad_fn).__name__
