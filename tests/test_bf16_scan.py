"""The scan for bf16 activations on GPUs: as exact as its operands allow, whatever the shape. It runs on a CPU too."""

import pytest
import torch
from instruments import relative_error
from test_ssd import by_definition, chunked, make, run, to

from mamba2_min import ssd
from mamba2_min.ssd import SCANS, Shape, ssd_chunked

NARROW = ("x", "B", "C")


TOLERANCE = {"dA": 3e-2}  # a sum over all tokens of terms of either sign, each rounded to bf16


bf16_scan = chunked(8, "cuda")


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


@pytest.mark.parametrize("l", [1, 7, 9, 30])
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_any_length(l, documents):
    low, wide = rounded(make(l, g=2, documents=documents))
    got, expected = run(bf16_scan, low), run(by_definition, wide)
    for name, value in expected.items():
        assert relative_error(got[name], value) < TOLERANCE.get(name, 1e-2), name


def test_a_cpu_does_not_use_it():
    supports, _ = SCANS["cuda"]
    shape = Shape(2, 16, 4, 4, 1, 6, 8)
    assert supports(torch.device("cuda"), torch.bfloat16, shape)
    assert not supports(torch.device("cpu"), torch.bfloat16, shape)
    low, _ = rounded(make(l=16, documents=False))
    own, forced = (form(**low)[0] for form in (chunked(8), bf16_scan))
    assert not torch.equal(own, forced)


def test_it_takes_bf16_alone():
    with pytest.raises(ValueError, match="bfloat16"), ssd.using("cuda"):
        ssd_chunked(**make(l=16))
