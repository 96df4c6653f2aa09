"""The chunked scan by our own kernels, forward and backward, on GPUs that Triton compiles for.

The forward is plain.py's four steps in two kernels: `states` walks through the chunks of a head (steps 1 and 2), and
`outputs` computes the tokens of a chunk (steps 3 and 4), for all chunks and heads at once.

**The backward is the same scan, run backwards.** For one head, with m_ij = exp(a_{j+1} + ... + a_i) for j <= i,

    y_i = sum_{j <= i} m_ij (C_i . B_j) dt_j x_j.

Given dy, the gradient of dt_j x_j is the same sum with the roles exchanged, from the last token to the first:

    d(dt_j x_j) = sum_{i >= j} m_ij (B_j . C_i) dy_i.

So C and B change places, dy takes the place of dt x, and the state that carries it, sum_{i >= j} m_ij dy_i C_i^T, runs
from the end to the start: it is the gradient of the forward's state. What decayed from a chunk's start to a token
decays from the token to the chunk's end. `states` and `outputs` do it with REVERSE. The gradient of C follows from
y = H C and the chunk's own tokens,

    dC_i = sum_heads [ H^T dy_i exp(..) + sum_{j <= i} m_ij (dy_i . dt_j x_j) B_j ],

and the mirror gives dB: `pair_gradients` and `key_gradients`, twice. What is left is the gradient of each a_k, which is
in every exponent a_{j+1} + ... + a_i with j < k <= i. Let E_ij = m_ij (C_i . B_j) (dy_i . dt_j x_j), the derivative by
such an exponent. Then da_k is the sum of E over rows from k on, less the sum over columns from k on; for pairs in
different chunks the state takes the place of one token or both (`step_gradients`).

Between the passes we keep the inputs, the state that enters each chunk (in x's dtype), dt and its sums.
Everything is added up in float32 and in one order, without atomics, so that equal arguments give equal bits.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba2_min.ops.autograd import handwritten_backward
from mamba2_min.ops.gpu_kernels import (
    constant_when_compiled,
    has_triton,
    is_right,
    multiplies_bf16,
    on,
    operator,
    product_precision,
    shared_memory,
)
from mamba2_min.ops.seq_idx import document_numbers
from mamba2_min.ssd.arguments import Shape
from mamba2_min.ssd.plain import ssd_plain
from mamba2_min.ssd.stretches import Crossing

_DTYPES = (torch.bfloat16, torch.float32)
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # of the self-check: an error of a compiler is far above


def supports(device: torch.device, dtype: torch.dtype, shape: Shape) -> bool:
    """bf16 on a GPU with the shared memory for a row of the table, where the self-check finds no fault.

    float32 has to be asked for by name: its exact products leave the matrix units idle.
    """
    if device.type != "cuda" or dtype != torch.bfloat16 or not torch.cuda.is_available():
        return False
    return _works(device.index, dtype, int(shape.p), int(shape.n))


@constant_when_compiled
def _works(index: int | None, dtype: torch.dtype, p: int, n: int) -> bool:
    return _checked(torch.cuda.current_device() if index is None else index, dtype, p, n)


@functools.cache
def _checked(index: int, dtype: torch.dtype, p: int, n: int) -> bool:
    """Whether the kernels run here and are right: once for each device, dtype and size of a state."""
    if not has_triton():
        return False
    device = torch.device("cuda", index)
    if _tiles(device, dtype, p, n) is None:
        return False
    return is_right("the Triton scan", device, lambda: self_check(device, dtype, p, n), _TOLERANCE[dtype])


def _tiles(device: torch.device, dtype: torch.dtype, p: int, n: int):
    from mamba2_min.ssd.triton_launch import tiles_for

    if dtype == torch.bfloat16 and not multiplies_bf16(device):
        return None
    return tiles_for(dtype, p, n, shared_memory(device))


@constant_when_compiled
def _chunk(kind: str, index: int | None, dtype: torch.dtype, p: int, n: int) -> int:
    tiles = _tiles(torch.device(kind if index is None else f"{kind}:{index}"), dtype, p, n)
    assert tiles is not None, "supports() was asked before"
    return tiles.q


def self_check(device: torch.device, dtype: torch.dtype, p: int, n: int) -> list[float]:
    """The relative errors of y, the state and all gradients but A's, against `ssd_plain` in float32."""
    random = torch.Generator().manual_seed(0)
    b, l, h, g = 1, 150, 4, 2

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random).to(device)

    def run(function, narrow: torch.dtype) -> list[Tensor]:
        leaves = [
            t.to(t.dtype if i in (1, 2, 5, 6) else narrow).detach().requires_grad_() for i, t in enumerate(inputs)
        ]
        y, state = function(*leaves)
        total = (y.float() * weights[0]).sum() + (state * weights[1]).sum()
        return [y.detach(), state.detach(), *torch.autograd.grad(total, leaves)]

    inputs = [
        normal(b, l, h, p).to(dtype), F.softplus(normal(b, l, h) - 2), -normal(h).exp(), normal(b, l, g, n).to(dtype),
        normal(b, l, g, n).to(dtype), normal(h), normal(b, h, p, n),
    ]  # fmt: skip
    weights = normal(b, l, h, p).to(dtype).float(), normal(b, h, p, n)
    seq_idx = (torch.arange(l, device=device) // 70)[None]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        got = run(lambda *leaves: scan(*[*leaves, seq_idx, 64]), dtype)
        wanted = run(lambda *leaves: ssd_plain(*leaves, seq_idx), torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)
    pairs = enumerate(zip(got, wanted, strict=True))
    return [float((a.float() - b).norm() / b.norm()) for i, (a, b) in pairs if i != 4]


def scan(x, dt, A, B, C, D, initial_state, seq_idx, chunk_size):
    """As every scan of `ssd.SCANS`; the length of a chunk is the table's. Raises ValueError for other dtypes."""
    if x.dtype not in _DTYPES or dt.dtype != torch.float32:
        raise ValueError(f'the scan "triton" takes x, B and C in bfloat16 or float32, not {x.dtype}')
    if not has_triton():
        raise ValueError('the scan "triton" needs Triton 3.2 or newer, which is not installed')
    documents = None
    if seq_idx is not None:
        documents = document_numbers(seq_idx, x.shape[0], x.shape[1], x.device).int()
    inputs = (x, dt, A, B, C, D, initial_state.contiguous(), documents)
    if torch.is_grad_enabled():
        return _Scan.apply(*inputs)
    return _scan_forward(*inputs)[:2]


def _aligned(t: Tensor) -> Tensor:
    """t, or a copy whose rows all begin where a GPU reads 16 bytes at a time: nothing else was tested on one."""
    aligned = t.stride(-1) == 1 and all(stride % 16 == 0 for stride in t.stride()[:-1])
    return t if aligned and t.storage_offset() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, start, documents):
        y, last, H, *decays = _scan_forward(x, dt, A, B, C, D, start, documents)
        ctx.save_for_backward(x, A, B, C, D, documents, H, *decays)
        return y, last

    @staticmethod
    @handwritten_backward
    def backward(ctx, dy, dlast):
        *gradients, dD = _scan_backward(dy, dlast.contiguous(), *ctx.saved_tensors)
        dx, ddt, dA, dB, dC, dstart = gradients
        return dx, ddt, dA, dB, dC, None if ctx.saved_tensors[4] is None else dD, dstart, None


def _launch(x: Tensor, B: Tensor, documents: Tensor | None):
    from mamba2_min.ssd.triton_launch import Launch

    tiles = _tiles(x.device, x.dtype, x.shape[3], B.shape[3])
    if tiles is None:
        raise ValueError(f'the scan "triton" has no tiles for p {x.shape[3]} and n {B.shape[3]} on {x.device}')
    if documents is not None:
        l = documents.shape[1]
        documents = F.pad(documents, (0, -documents.shape[1] % tiles.q), mode="constant")
        documents[:, l:] = documents[:, l - 1 : l]
    return Launch(x, B, documents, tiles, product_precision(x.dtype))


def forward(x, dt, A, B, C, D, start, documents, *, dt_bias=None, crossing: Crossing | None = None):
    """dt_bias: dt and A are then a mixer's, softplus(dt + dt_bias) the steps and -exp(A) the rates. crossing: the
    tokens are a stretch of the sequence; `start` and the state at the end are the whole sequence's."""
    x, B, C = map(_aligned, (x, B, C))
    with on(x):
        launch = _launch(x, B, documents)
        decays = launch.prepare(dt, A, dt_bias)
        end = sums = None
        if crossing is not None:
            sums = launch.sums(x, B, decays, reverse=False)
            _, added = launch.starts(sums, decays, torch.zeros_like(start), reverse=False)
            start, end = crossing.forward(added, decays.across.prod(-1), start)
        H, last, _ = launch.states(x, B, decays, start.contiguous(), None, sums)
        return launch.outputs(C, B, x, H, decays, D, reverse=False), last if end is None else end, H, *decays


def backward(
    dy, dlast, x, A, B, C, D, documents, H, *decays, into=(None, None, None, None), trained=True,
    crossing: Crossing | None = None,
):  # fmt: skip
    """into: memory for the gradients of x, B, C and dt. With the last, dt and A are a mixer's, and the gradient of
    dt_bias comes in the place of that of dt. trained: whether those of A, D and dt_bias are wanted; else they are
    None."""
    from mamba2_min.ssd.triton_launch import Decays

    dy, x, B, C = map(_aligned, (dy, x, B, C))
    with on(x):
        launch, decays = _launch(x, B, documents), Decays(*decays)
        dinitial = sums = None
        if crossing is not None:
            sums = launch.sums(dy, C, decays, reverse=True)
            _, read = launch.starts(sums, decays, torch.zeros_like(dlast), reverse=True)
            dlast, dinitial = crossing.backward(read, dlast)
        dH, dstart, carried = launch.states(dy, C, decays, dlast.contiguous(), H, sums)
        dx = launch.outputs(B, C, dy, dH, decays, D, True, into[0])
        dC, *read, _ = launch.key_gradients(C, B, dy, x, H, decays, False, into[2])
        dB, *written = launch.key_gradients(B, C, x, dy, dH, decays, True, into[1])
        ddt, dA, dbias = launch.step_gradients(B, C, decays.dt, A, read, written, carried, into[3], trained)
        dD = written[-1].sum((0, 2)) if trained else None
        return dx, ddt if into[3] is None else dbias, dA, dB, dC, dstart if crossing is None else dinitial, dD


def _fake_forward(x, dt, A, B, C, D, start, documents):
    (b, l, h, p), n = x.shape, B.shape[3]
    q = _chunk(x.device.type, x.device.index, x.dtype, int(p), int(n))
    chunks = (l + q - 1) // q
    wide = torch.float32
    s = x.new_empty(2 if x.dtype == wide else 1, b, h, chunks * q, dtype=wide)
    by_token = [x.new_empty(b, h, chunks * q, dtype=wide) for _ in range(4)]
    last, across = x.new_empty(b, h, p, n, dtype=wide), x.new_empty(b, h, chunks, dtype=wide)
    return x.new_empty(b, l, h, p), last, x.new_empty(b, chunks, h, p, n), s, *by_token, across


def _fake_backward(dy, dlast, x, A, B, C, D, documents, H, *decays):
    b, l, h, _ = x.shape
    contiguous = torch.contiguous_format
    dx, dB, dC = (torch.empty_like(t, memory_format=contiguous) for t in (x, B, C))
    ddt = x.new_empty(b, l, h, dtype=torch.float32)
    return dx, ddt, torch.empty_like(A), dB, dC, torch.empty_like(dlast), torch.empty_like(A)


_scan_forward = operator(
    "scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor start, Tensor? documents) -> ("
    + ", ".join(["Tensor"] * 9) + ")",
    forward, _fake_forward,
)  # fmt: skip
_scan_backward = operator(
    "scan_backward(Tensor dy, Tensor dlast, Tensor x, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? documents,"
    " Tensor H, Tensor s, Tensor s_dt, Tensor enter, Tensor leave, Tensor steps, Tensor across) -> ("
    + ", ".join(["Tensor"] * 7) + ")",
    backward, _fake_backward,
)  # fmt: skip
