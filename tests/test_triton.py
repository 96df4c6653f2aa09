"""The GPU's kernels: in Triton's interpreter against their definitions, compiled for GPUs that are not here, on one.

The interpreter is exact in float32 and useless in bf16; compilation tells registers, spills and shared memory. Both
need Triton alone. What a GPU computes is tested by `pytest -m gpu`.
"""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from instruments import relative_error
from test_ssd import make, run, to
from torch.nn import functional as F

from mamba2_min import ssd
from mamba2_min.config import Mamba2Config
from mamba2_min.models import core, mamba2
from mamba2_min.ops import conv, norm
from mamba2_min.ops.gpu_kernels import has_triton, is_right
from mamba2_min.ops.lora import lora_linear
from mamba2_min.ops.loss import cross_entropy, linear_cross_entropy
from mamba2_min.ops.seq_idx import document_numbers
from mamba2_min.ssd import Shape, ssd_chunked
from mamba2_min.ssd import triton as triton_scan

needs_triton = pytest.mark.skipif(not has_triton(), reason='needs Triton: pip install "mamba2-min[dev]" on Linux')
FOLDER = Path(__file__).parent
BF16, FLOAT32 = torch.bfloat16, torch.float32


# -- In the interpreter -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted():
    """{case: its relative errors}"""
    script = [sys.executable, "-W", "ignore", str(FOLDER / "triton_interpreter.py")]
    done = subprocess.run(
        script, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {line["name"]: line["errors"] for line in map(json.loads, done.stdout.splitlines())}


@needs_triton
def test_values_and_gradients_in_the_interpreter(interpreted):
    assert len(interpreted) == 26
    for name, errors in interpreted.items():
        for what, error in errors.items():
            small = what.endswith(("dA", "dD", "A_log", ".D"))  # a small difference of large sums
            limit = 1e-4 if small else 1e-5 if ".lora_" in what else 2e-6
            assert error < limit, (name, what, error)


# -- Compiled for what is not here ------------------------------------------------------------------------------------

TARGETS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10}


class Recorder:
    """Stands for a kernel: a launch compiles it for a GPU that is not here, and notes what it needs."""

    def __init__(self, kernel, target, found):
        self.kernel, self.target, self.found = kernel, target, found

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps, num_stages=3, launch_pdl=False, **constants):
        import triton
        from triton.compiler import ASTSource

        names = {BF16: "*bf16", FLOAT32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
        signature, aligned, constants = {}, {}, dict(constants)
        for i, (name, value) in enumerate(zip(self.kernel.arg_names, args, strict=False)):
            if isinstance(value, torch.Tensor):
                signature[name], aligned[(i,)] = names[value.dtype], [["tt.divisibility", 16]]
            elif value == 1 and isinstance(value, int):
                constants[name] = 1
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
                if isinstance(value, int) and value % 16 == 0:
                    aligned[(i,)] = [["tt.divisibility", 16]]
        signature = {name: signature.get(name, "constexpr") for name in self.kernel.arg_names}
        places = {(self.kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=places, attrs=aligned)
        built = triton.compile(source, target=self.target, options={"num_warps": num_warps, "num_stages": num_stages})
        self.found.append({"kernel": self.kernel.__name__, "shared": built.metadata.shared, **resources(built)})


def resources(built):
    """Registers of a thread and bytes of its stack, of machine code for NVIDIA; {} for other GPUs."""
    if "cubin" not in built.asm:
        return {}
    import tempfile

    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        told = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    return {"registers": int(found[1]), "stack": int(found[2])} if found else {}


def compiled(monkeypatch, name, tiles, dtype, documents=False):
    """What each kernel of a scan needs, forward and backward."""
    from triton.backends.compiler import GPUTarget

    from mamba2_min.ssd import triton_kernels
    from mamba2_min.ssd.triton_launch import Launch

    hip = name.startswith("gfx")
    target = GPUTarget("hip", name, 64) if hip else GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    found = []
    for kernel in ("prepare", "states", "outputs", "pair_gradients", "key_gradients", "step_gradients"):
        monkeypatch.setattr(triton_kernels, kernel, Recorder(getattr(triton_kernels, kernel), target, found))

    def new(*shape, dtype=FLOAT32):
        return torch.empty(shape, dtype=dtype, device="meta")

    b, l, h, p, n = 8, 2048, 24, 64, 128
    xBC = new(b, l, h * p + 2 * n, dtype=dtype)
    x, B, C = xBC.split([h * p, n, n], dim=-1)
    x, B, C, A, D = x.unflatten(-1, (h, p)), B[:, :, None], C[:, :, None], new(h), new(h)
    launch = Launch(x, B, new(b, l, dtype=torch.int32) if documents else None, tiles, "ieee")
    decays = launch.prepare(new(b, l, h), A)
    H, last, _ = launch.states(x, B, decays, new(b, h, p, n), None)
    launch.sums(x, B, decays, reverse=False)
    launch.sums(x, C, decays, reverse=True)
    launch.outputs(C, B, x, H, decays, D, reverse=False)
    dH, _, carried = launch.states(x, C, decays, last, H)
    launch.outputs(B, C, x, dH, decays, D, reverse=True)
    _, *read, _ = launch.key_gradients(C, B, x, x, H, decays, reverse=False)
    _, *written = launch.key_gradients(B, C, x, x, dH, decays, reverse=True)
    launch.step_gradients(B, C, decays.dt, A, read, written, carried)
    return found


def rows(*dtypes):
    from mamba2_min.ssd.triton_launch import TABLE

    return [(dtype, tiles) for dtype, _, _, tiles in TABLE if dtype in dtypes]


@needs_triton
def test_compiled_for_an_h100(monkeypatch):
    dtype, tiles = rows(BF16)[0]
    found = compiled(monkeypatch, "sm_90", tiles, dtype)
    assert len(found) == 12
    for kernel in found:
        assert kernel["shared"] <= tiles.shared and kernel["registers"] <= 255, kernel
        # With four warps `pair_gradients` spills 30 registers or fewer; with eight it does not, and is slower.
        assert kernel["stack"] <= (128 if kernel["kernel"] == "pair_gradients" else 0), kernel


@needs_triton
@pytest.mark.parametrize("dtype, r, stack", [(BF16, 16, 0), (BF16, 64, 64), (FLOAT32, 16, 0)])
def test_the_adapters_kernels_compile(monkeypatch, dtype, r, stack):
    """The largest ranks that they take, on the least shared memory that they take."""
    from triton.backends.compiler import GPUTarget

    from mamba2_min.ops import lora_kernels

    found = []
    for kernel in ("_mask_kernel", "_project_kernel", "_gradients_kernel"):
        recorder = Recorder(getattr(lora_kernels, kernel), GPUTarget("cuda", 90, 32), found)
        monkeypatch.setattr(lora_kernels, kernel, recorder)
    tokens, width = 16_384, 1536
    x, a = (torch.empty(size, dtype=dtype, device="meta") for size in ((tokens, width), (r, width)))
    bits, kept = lora_kernels.mask_bits(tokens, width, 0.1, x.device)
    xh, _ = lora_kernels.project(x, a, bits, 2 / kept)
    lora_kernels.gradients(x, a, bits, 2 / kept, xh[:, width:], xh[:, :width])
    assert len(found) == 3 and all(k["stack"] <= stack and k["shared"] <= 92_192 for k in found), found


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [
        pytest.param(name, marks=pytest.mark.xfail(raises=RuntimeError, reason="a fault of Triton 3.7.1; docs/LOG.md"))
        if name == "sm_100"
        else name
        for name in TARGETS
    ],
)
def test_each_row_of_the_table_compiles_and_fits(monkeypatch, target):
    """A device that has the shared memory a row names can run it: no kernel needs more."""
    for dtype, tiles in rows(BF16, FLOAT32):
        if tiles.shared <= TARGETS[target]:
            with monkeypatch.context() as patch:
                for kernel in compiled(patch, target, tiles, dtype, documents=True):
                    assert kernel["shared"] <= tiles.shared, (target, tiles, kernel)


# -- The choice -------------------------------------------------------------------------------------------------------


def test_what_it_does_not_take():
    shape = Shape(2, 16, 4, 4, 1, 6, 8)
    assert not triton_scan.supports(torch.device("cpu"), BF16, shape)
    assert not triton_scan.supports(torch.device("cuda"), torch.float16, shape)
    with pytest.raises(ValueError, match="bfloat16 or float32"), ssd.using("triton"):
        ssd_chunked(**make(l=16))


@needs_triton
def test_the_first_row_that_fits():
    from mamba2_min.ssd.triton_launch import TABLE, tiles_for

    for dtype, p, n, tiles in TABLE:
        assert tiles_for(dtype, p, n, tiles.shared) is not None and tiles_for(dtype, p, n, 1000) is None
    assert tiles_for(BF16, 24, 128, 1 << 30) is None and tiles_for(BF16, 64, 40, 1 << 30) is None
    assert tiles_for(BF16, 64, 4096, 1 << 30) is None and tiles_for(torch.float16, 64, 64, 1 << 30) is None
    assert tiles_for(BF16, 64, 128, 227 << 10) == TABLE[0][3]


# -- The check at first use -------------------------------------------------------------------------------------------


def test_the_check_at_first_use_sees_nothing_of_the_place_where_it_is_asked_for():
    """A checkpoint's hooks, autocast, inference mode: it runs within the first forward of a process."""

    def check():
        assert not torch.is_autocast_enabled("cpu") and not torch.is_inference_mode_enabled()
        x = torch.ones(3, requires_grad=True)
        (x * x).sum().backward()
        assert torch.equal(x.grad, torch.full((3,), 2.0))
        yield 0.0

    def never(t):
        raise AssertionError("a tensor that the check saves is not the caller's")

    hooks = torch.autograd.graph.saved_tensors_hooks(never, never)
    with hooks, torch.inference_mode(), torch.autocast("cpu", dtype=BF16):
        assert is_right("kernels", torch.device("cpu"), check, 0.1)


@pytest.mark.gpu
def test_the_first_pass_of_a_process_may_be_one_that_is_computed_again():
    config = Mamba2Config(vocab_size=50, d_model=128, n_layer=2, d_state=64)
    model = mamba2.Mamba2LM(config, seed=0).cuda()
    ids = torch.randint(50, (2, 200), generator=torch.Generator().manual_seed(0)).cuda()
    found = []
    for model.recompute in (True, False):
        triton_scan._checked.cache_clear()
        with torch.autocast("cuda", dtype=BF16):
            loss = model.loss(ids[:, :-1], ids[:, 1:])
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for again, kept in zip(*found, strict=True):
        assert relative_error(again.double(), kept.double()) < 2e-2


# -- On a GPU ---------------------------------------------------------------------------------------------------------

TOLERANCE = {BF16: 5e-3, FLOAT32: 5e-6}


def on_gpu(case, dtype):
    low = {k: v if v is None else v.cuda() for k, v in to(case, FLOAT32).items()}
    low.update({name: low[name].to(dtype) for name in ("x", "B", "C")})
    return low, to(low, torch.float64)


def plain_on_gpu(**case):
    return ssd.ssd_plain(**case)


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("dtype", [BF16, FLOAT32], ids=str)
@pytest.mark.parametrize("span", [1, 16], ids=["sections", "one section"])
def test_every_configuration_on_a_gpu(monkeypatch, dtype, documents, span):
    """Values, gradients and bits."""
    monkeypatch.setattr("mamba2_min.ssd.triton_launch._SPAN", span)
    low, wide = on_gpu(make(l=500, h=8, g=2, p=64, n=128, documents=documents), dtype)
    wanted = run(plain_on_gpu, wide)
    for _, tiles in rows(dtype):
        monkeypatch.setattr(triton_scan, "_tiles", lambda *_, tiles=tiles: tiles)
        with ssd.using("triton"):
            got, again = run(ssd_chunked, low), run(ssd_chunked, low)
        for name, value in wanted.items():
            assert relative_error(got[name], value) < TOLERANCE[dtype], (tiles, name)
            assert torch.equal(got[name], again[name]), (tiles, name)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "l, p, n", [(1, 64, 128), (2, 16, 16), (127, 64, 64), (129, 32, 64), (1000, 32, 128), (300, 64, 16)]
)
def test_odd_sizes_on_a_gpu(l, p, n):
    low, wide = on_gpu(make(l=l, h=6, g=3, p=p, n=n, documents=False), BF16)
    with ssd.using("triton"):
        got = run(ssd_chunked, low)
    for name, value in run(plain_on_gpu, wide).items():
        assert relative_error(got[name], value) < (2e-2 if name == "dA" else TOLERANCE[BF16]), name


@pytest.mark.gpu
def test_it_is_chosen_and_compiles_as_one_graph():
    low, _ = on_gpu(make(l=200, h=8, g=2, p=64, n=64, documents=False), BF16)
    with ssd.using("triton"):
        wanted = run(ssd_chunked, low)
    own, whole = run(ssd_chunked, low), run(torch.compile(ssd_chunked, fullgraph=True, dynamic=False), low)
    for name, value in wanted.items():
        assert torch.equal(own[name], value) and relative_error(whole[name], value) < 1e-6, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FLOAT32], ids=str)
def test_operations_on_a_gpu(monkeypatch, dtype):
    """The convolution, the norms, adapters and the loss, against their definitions in float64."""
    from mamba2_min.ops.lora_kernels import mask_bits

    tolerance = {BF16: 4e-3, FLOAT32: 2e-6}[dtype]
    r = torch.Generator("cuda").manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=r, device="cuda").to(dtype)

    def check(function, definition, *inputs, tolerance=tolerance):
        low = [t.detach().requires_grad_() for t in inputs]
        wide = [t.detach().double().requires_grad_() for t in inputs]
        got, wanted = function(*low), definition(*wide)
        dy = normal(*got.shape, dtype=got.dtype)
        assert relative_error(got, wanted) < tolerance
        for a, b in zip(torch.autograd.grad(got, low, dy), torch.autograd.grad(wanted, wide, dy.double()), strict=True):
            assert relative_error(a, b) < tolerance

    zxBCdt = normal(2, 700, 3352)
    check(
        lambda *t: conv.causal_conv_silu(*t)[0],
        lambda u, *t: conv.conv_silu_by_taps(F.pad(u, (0, 0, 3, 0)), *t),
        zxBCdt[..., 1536:3328], normal(1792, 4), normal(1792),
    )  # fmt: skip
    before, seq_idx = normal(2, 3, 1792), (torch.arange(700, device="cuda") // 90)[None].expand(2, -1)
    seq_idx = seq_idx + (torch.arange(700, device="cuda") > 400)  # and a document of one token
    documents = F.pad(document_numbers(seq_idx, 2, 700, seq_idx.device), (3, 0))
    check(
        lambda *t: torch.cat(conv.causal_conv_silu(*t, before, seq_idx), 1),
        lambda u, *t: torch.cat([
            conv.conv_silu_by_taps(torch.cat([before.double(), u], 1), *t, documents), u[:, -3:]
        ], 1),
        zxBCdt[..., 1536:3328], normal(1792, 4), normal(1792),
    )  # fmt: skip
    weight = normal(1536, dtype=FLOAT32)
    for groups in (1, 3):
        check(
            lambda *t, groups=groups: norm.gated_rms_norm(*t, 1e-5, False, groups),
            lambda *t, groups=groups: norm.gated_rms_norm_plain(*t, 1e-5, False, groups),
            normal(2, 700, 1536), zxBCdt[..., :1536], weight,
        )  # fmt: skip
    for last in (False, True):  # after the last norm nobody reads the sum
        check(
            lambda *t, last=last: torch.cat(norm.add_rms_norm(*t, 1e-5)[last:]),
            lambda *t, last=last: torch.cat(norm.add_rms_norm_plain(*t, 1e-5)[last:]),
            normal(2, 700, 1536, dtype=FLOAT32), normal(2, 700, 1536), weight,
        )  # fmt: skip
    check(lambda *t: norm.rms_norm(*t, 1e-5), lambda *t: norm.rms_norm_plain(*t, 1e-5), normal(2, 700, 1536), weight)
    bits = mask_bits(1400, 1536, 0.1, torch.device("cuda"))
    mask = (bits[0][:, :, None] >> torch.arange(32, device="cuda") & 1).flatten(1).view(2, 700, 1536) / bits[1]
    frozen = normal(256, 1536)
    monkeypatch.setattr("mamba2_min.ops.lora_kernels.mask_bits", lambda *args: bits)
    check(
        lambda x, A, B: lora_linear(x, frozen, None, A, B, 2.0, 0.1),
        lambda x, A, B: x @ frozen.to(x.dtype).t() + 2 * (x * mask) @ A.t() @ B.t(),
        normal(2, 700, 1536), normal(16, 1536) / 40, normal(256, 16), tolerance=3 * tolerance,
    )  # fmt: skip
    targets = torch.randint(5000, (2, 300), generator=r, device="cuda")
    targets[0, ::3] = -100
    check(
        lambda hidden, head: linear_cross_entropy(hidden, head, targets, reduction="sum"),
        lambda hidden, head: cross_entropy(hidden @ head.t(), targets),
        normal(2, 300, 64), normal(5000, 64), tolerance=5 * tolerance,  # the logits, up to 30, are rounded to bf16
    )  # fmt: skip


def mixer_gradients(mixer, u, weights, given):
    """The output, the last states and all gradients of a mixer."""
    u = u.detach().requires_grad_()
    with torch.autocast("cuda", dtype=BF16, enabled=u.dtype == FLOAT32):
        out = mixer(u, *given)
    total = sum((value.double() * weight).sum() for value, weight in zip(out, weights, strict=True))
    return [*out, *torch.autograd.grad(total, [u, *mixer.parameters()])]


@pytest.mark.gpu
@pytest.mark.parametrize("b, l, from_states", [(3, 500, False), (8, 2048, False), (3, 500, True)])
def test_a_mixer_between_its_projections_on_a_gpu(monkeypatch, b, l, from_states):
    """One function, and the operations one by one: equally far from float64, and the same text for both states."""
    config = Mamba2Config(vocab_size=9, d_model=256, n_layer=1, d_state=128)
    mixer = mamba2.Mamba2LM(config, seed=0).cuda().backbone.layers[0].mixer
    r = torch.Generator("cuda").manual_seed(0)
    u = torch.randn(b, l, 256, generator=r, device="cuda")
    with torch.no_grad():
        shapes = [t.shape for t in mixer(u[:, :9], None, None, None)]
    shapes[0] = (b, l, 256)
    weights = [torch.randn(shape, generator=r, device="cuda", dtype=torch.float64) for shape in shapes]
    given = wide_given = (None, None, None)
    if from_states:
        states = [torch.randn(shape, generator=r, device="cuda") for shape in shapes[1:]]
        seq_idx = (torch.arange(l, device="cuda") // 90)[None].expand(b, -1)
        given, wide_given = (*states, seq_idx), (*[t.double() for t in states], seq_idx)
    used = []
    monkeypatch.setattr(mamba2, "core", lambda *args: used.append(1) or core.core(*args))
    got, again = (mixer_gradients(mixer, u, weights, given) for _ in range(2))
    assert len(used) == 2 and all(map(torch.equal, got, again))
    monkeypatch.setattr(mamba2, "takes", lambda *args: False)
    apart = mixer_gradients(mixer, u, weights, given)
    assert len(used) == 2
    wanted = mixer_gradients(copy.deepcopy(mixer).double(), u.double(), weights, wide_given)
    for i, (a, b, c) in enumerate(zip(got, apart, wanted, strict=True)):
        assert relative_error(a.double(), c) < 1.2 * relative_error(b.double(), c) + 1e-3, i
        assert relative_error(a.double(), c) < 5e-2, i
