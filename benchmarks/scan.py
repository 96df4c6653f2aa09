"""The scan alone, against sequence length: time, what it keeps between forward and backward, and peak memory.

    mamba2_min       ssd_chunked, the fastest scan for the device
    plain-autograd   ssd_plain, the chunked scan as one reads it, with autograd's backward pass
    quadratic        ssd_quadratic, the attention-like dual, as long as its (l, l) matrices are small
    attention        causal scaled_dot_product_attention with as many heads and channels, for scale: another function
    mamba_ssm-q128   mamba_chunk_scan_combined of the `mamba_ssm` package, where it can be imported; -q256 likewise
    floor            the matrix products of the chunked scan alone, once forward and twice backward

"forward" settings run without gradients; "both" settings run forward and backward. On a GPU the work is a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import harness
from benchmarks.harness import FLOOR, MemoryMeter, Options, Unavailable
from mamba2_min.ssd import ssd_chunked, ssd_plain, ssd_quadratic

PEERS = ("mamba2_min", "plain-autograd", "quadratic", "attention", "mamba_ssm-q128", "mamba_ssm-q256")
LONGEST_QUADRATIC = 2048
REPEATED = {"cpu": 1, "cuda": 20}  # how often a round does the work


@dataclass(frozen=True)
class Setting:
    """Sizes of a scan, in the letters of mamba2_min/ssd/plain.py; `backward`: whether it is timed too."""

    b: int
    l: int
    h: int
    p: int = 64
    n: int = 64
    q: int = 64
    backward: bool = True

    @property
    def name(self) -> str:
        return f"{'both' if self.backward else 'forward'}-b{self.b}-l{self.l}-h{self.h}"


def _both_ways(shapes: list[Setting]) -> dict[str, Setting]:
    """Settings by name, each shape with and without the backward."""
    return {s.name: s for shape in shapes for s in (replace(shape, backward=False), shape)}


SETTINGS = {
    "cpu": _both_ways([Setting(1, l, 8) for l in (512, 1024, 2048, 4096, 8192, 16384)]),
    "cuda": _both_ways([Setting(8, 2048, 24, n=128), Setting(4, 4096, 64, n=128), Setting(1, 65536, 24, n=128)]),
}
QUICK = _both_ways([Setting(2, 128, 2, p=8, n=8, q=32)])


def inputs_of(setting: Setting, options: Options) -> tuple[Tensor, ...]:
    """x, dt, A, B, C, D of a usual scale, one group; x, B and C in the dtype of projections, the others float32."""
    s, dtype = setting, options.operand_dtype
    generator = torch.Generator(options.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=options.device)

    tensors = (
        draw(s.b, s.l, s.h, s.p).to(dtype),
        F.softplus(draw(s.b, s.l, s.h) - 4),
        -torch.arange(1.0, s.h + 1, device=options.device),
        draw(s.b, s.l, 1, s.n).to(dtype),
        draw(s.b, s.l, 1, s.n).to(dtype),
        draw(s.h),
    )
    return tuple(t.requires_grad_(s.backward) for t in tensors)


def scan_of(name: str, setting: Setting) -> Callable[..., Tensor]:
    """The peer of that name as a function of x, dt, A, B, C, D. Raises Unavailable."""
    q = setting.q
    if name == "mamba2_min":
        return lambda *inputs: ssd_chunked(*inputs, chunk_size=q)[0]
    if name == "plain-autograd":
        return lambda *inputs: ssd_plain(*inputs, chunk_size=q)[0]
    if name == "quadratic":
        if setting.l > LONGEST_QUADRATIC:
            raise Unavailable(f"too long: its matrices would have {setting.l} x {setting.l} elements a head")
        return lambda *inputs: ssd_quadratic(*inputs)[0]
    if name == "attention":
        return _attention
    if name.startswith("mamba_ssm-q"):
        chunk = int(name.removeprefix("mamba_ssm-q"))
        try:
            from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
        except Exception as error:  # besides a missing package: a GPU library or a version that it cannot do without
            raise Unavailable(f"cannot be imported here: {str(error).splitlines()[0]}") from None
        return lambda x, dt, A, B, C, D: mamba_chunk_scan_combined(x, dt, A, B, C, chunk, D)
    raise ValueError(f"unknown peer {name}; there are {', '.join(PEERS)}")


def _attention(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    heads = x.transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2)


def run_of(name: str, setting: Setting, options: Options) -> tuple[Callable[[], None], Callable[[], Tensor], list]:
    """A round's work, its forward alone, and the tensors that go in."""
    scan = scan_of(name, setting)
    inputs = inputs_of(setting, options)
    dy = torch.randn_like(inputs[0])

    def forward() -> Tensor:
        return scan(*inputs)

    def run() -> None:
        if setting.backward:
            torch.autograd.grad(forward(), inputs, dy, allow_unused=True)
        else:
            with torch.no_grad():
                forward()

    return run, forward, [*inputs, dy]


def kept_bytes(forward: Callable[[], Tensor], inputs: list[Tensor]) -> int:
    """What autograd holds on to between forward and backward, beyond the inputs themselves."""
    given = {t.untyped_storage().data_ptr() for t in inputs}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = forward()
    del y  # only now, so that no address was used twice
    return sum(kept.values())


def floor_of(setting: Setting, options: Options) -> Callable[[], None]:
    """The products of every chunk: C B^T once; M x, B^T x and C H once a head. All dense, though M is triangular."""
    s, dtype = setting, options.operand_dtype
    m = s.b * (s.l // s.q)  # chunks
    width = s.h * s.p
    shapes = [(m, s.q, s.n, s.q), (m * s.h, s.q, s.q, s.p), (m, s.n, s.q, width), (m, s.q, s.n, width)]
    operands = []
    for batch, rows, inner, columns in shapes:
        left = torch.randn(batch, rows, inner, device=options.device, dtype=dtype)
        right = torch.randn(batch, inner, columns, device=options.device, dtype=dtype)
        operands.append((left, right, left @ right))

    def products() -> None:
        for left, right, out in operands:
            torch.bmm(left, right, out=out)
            if s.backward:
                torch.bmm(out, right.mT)
                torch.bmm(left.mT, out)

    return products


def peak_memory(name: str, setting: Setting, options: Options) -> int:
    """Bytes beyond inputs and dy that the work takes at its highest, results and gradients included."""
    run_of(name, replace(setting, l=2 * setting.q), options)[0]()  # loads libraries and starts threads
    run, _, _inputs = run_of(name, setting, options)
    meter = MemoryMeter(options.device)
    meter.start()
    run()
    options.synchronize()
    return meter.peak()


def prepare(name: str, setting: Setting, options: Options) -> tuple[Callable[[], None], dict[str, Any]]:
    """A peer's work and, where there is a backward, the bytes kept for it."""
    if name == FLOOR:
        floor = floor_of(setting, options)
        return (as_graph(floor, options) if options.device == "cuda" else floor), {}
    run, forward, inputs = run_of(name, setting, options)
    if options.device == "cuda":
        run = as_graph(run, options)
    return run, {"kept_bytes": kept_bytes(forward, inputs)} if setting.backward else {}


def as_graph(run: Callable[[], None], options: Options) -> Callable[[], None]:
    """The work as one CUDA graph, REPEATED times: launching its kernels from Python would take longer than they do."""
    with options.products():
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(REPEATED["cuda"]):
                run()

    def replay(keeps: Callable[[], None] = run) -> None:  # the tensors of `run` must live as long as the graph
        graph.replay()

    return replay


def main() -> None:
    args = harness.parser("scan", __doc__, PEERS).parse_args()
    options = harness.options(args)
    options.prepare()
    for name, setting in harness.choose(QUICK if args.quick else SETTINGS[args.device], args).items():
        tokens = setting.b * setting.l
        things = REPEATED[args.device]
        entries = harness.compare([*args.peers, FLOOR], setting, options, peak_memory, prepare, things, tokens)
        harness.finish(harness.measurement("scan", name, asdict(setting), options, entries), args)


if __name__ == "__main__":
    main()
