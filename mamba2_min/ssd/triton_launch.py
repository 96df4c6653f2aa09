"""How the kernels of triton_kernels.py are launched: sizes of tiles, grids, memory for results."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba2_min.ssd import triton_kernels as kernels


class Tiles(NamedTuple):
    """The sizes of the tiles, and (warps, stages of software pipelining) of each kernel.

    q: tokens in a chunk. rows: of it that a program of `outputs`, `pair_gradients` and `key_gradients` computes.
    columns: of the state that a program of `states` holds, and piece: tokens that it reads at a time. shared: bytes of
    shared memory that a block of threads needs at most.
    """

    q: int
    rows: int
    columns: int
    piece: int
    states: tuple[int, int]
    outputs: tuple[int, int]
    pair_gradients: tuple[int, int]
    key_gradients: tuple[int, int]
    shared: int


# By dtype and the largest p and n, the first that the device has the shared memory for. Constant, not tuned at run
# time: sums in another order would be other bits. Measured on an H200.
TABLE: list[tuple[torch.dtype, int, int, Tiles]] = [
    (torch.bfloat16, 64, 128, Tiles(128, 64, 64, 64, (4, 3), (4, 2), (4, 2), (4, 3), 101_376)),
    (torch.bfloat16, 64, 128, Tiles(64, 64, 64, 64, (4, 2), (4, 1), (4, 1), (4, 1), 65_536)),
    (torch.float32, 64, 128, Tiles(64, 32, 32, 32, (4, 1), (4, 1), (4, 1), (4, 1), 101_376)),
]


_PROGRAMS = 256  # of `states`, that keep a GPU busy; a constant, for sums of sections are other bits
_SPAN = 16  # chunks in a section, at the least


def tiles_for(dtype: torch.dtype, p: int, n: int, shared: int) -> Tiles | None:
    """The row of the table for this dtype and these sizes, on a device with so much shared memory for a block.

    p and n are powers of two from 16 on, as those of all published models are: others end in an illegal access to
    memory on a GPU, with Triton 3.6, though in the interpreter no access leaves its tensor.
    """
    if p != _power(p) or n != _power(n):
        return None
    for row_dtype, most_p, most_n, tiles in TABLE:
        if row_dtype == dtype and p <= most_p and n <= most_n and tiles.shared <= shared:
            return tiles
    return None


def _power(size: int) -> int:
    """The next power of two from 16 on: the least that a matrix unit takes."""
    return max(16, 1 << (size - 1).bit_length())


def _heads(programs: int, heads_a_group: int, enough: int) -> int:
    """How many heads of a group one program computes: as many as leave `enough` programs. By shapes alone."""
    divisors = [k for k in range(heads_a_group, 0, -1) if heads_a_group % k == 0]
    return next((k for k in divisors if programs * (heads_a_group // k) >= enough), 1)


class Decays(NamedTuple):
    """What `prepare` makes of dt and A; see triton_kernels.py."""

    s: Tensor
    s_dt: Tensor
    enter: Tensor
    leave: Tensor
    dt: Tensor
    across: Tensor


class Launch:
    """The launches of one scan: x (b, l, h, p), B (b, l, g, n)."""

    def __init__(self, x: Tensor, B: Tensor, documents: Tensor | None, tiles: Tiles, precision: str):
        self.b, self.l, self.h, self.p = x.shape
        self.g, self.n = B.shape[2:]
        self.tiles, self.device = tiles, x.device
        self.r = self.h // self.g
        self.chunks = -(-self.l // tiles.q)
        # The chunks of a head follow one another. Where few heads leave a GPU idle, sections of them run side by side,
        # at the price of reading the tokens twice.
        self.columns = min(tiles.columns, _power(self.n))  # of a state, that a program of `states` holds
        self.parts = -(-self.n // self.columns)
        programs = self.b * self.h * self.parts
        sections = max(1, min(-(-_PROGRAMS // programs), self.chunks // _SPAN))
        self.span = -(-self.chunks // sections)
        self.sections = -(-self.chunks // self.span)
        self.padded = self.chunks * tiles.q
        self.size = self.b * self.h * self.padded
        self.documents = documents
        self.exact = x.dtype == torch.float32
        self.sizes = {"Q": tiles.q, "BP": _power(self.p), "PRECISION": precision}
        self.flags = {"DOCUMENTS": documents is not None, "EXACT": self.exact}

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def prepare(self, dt: Tensor, A: Tensor, dt_bias: Tensor | None = None) -> Decays:
        """The decays of all tokens. With a dt_bias, dt and A are a mixer's: see RAW in triton_kernels.py."""
        s = self.empty(2 if self.exact else 1, self.b, self.h, self.padded)
        s_dt, enter, leave, steps = (self.empty(self.b, self.h, self.padded) for _ in range(4))
        across = self.empty(self.b, self.h, self.chunks)
        heads = 8
        kernels.prepare[(self.b * self.chunks, -(-self.h // heads))](
            dt, A, A if dt_bias is None else dt_bias, self._documents(s), s, s_dt, enter, leave, steps, across,
            *dt.stride(), self.l, self.h, self.chunks, self.size, RAW=dt_bias is not None, **self.flags,
            Q=self.tiles.q, BH=heads, num_warps=4,
        )  # fmt: skip
        return Decays(s, s_dt, enter, leave, steps, across)

    def states(
        self, v: Tensor, K: Tensor, decays: Decays, start: Tensor, forward: Tensor | None, sums: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """H (b, chunks, h, p, n), the last state, and in reverse (with the `forward` states) `carried`.

        sums: what the function of that name gives, if the caller has it.
        """
        reverse = forward is not None
        if self.sections == 1:
            H, last, carried = self._states(v, K, decays, start, forward, reverse)
            return H, last[0], carried
        if sums is None:
            sums = self.sums(v, K, decays, reverse)
        starts, last = self.starts(sums, decays, start, reverse)
        H, _, carried = self._states(v, K, decays, starts, forward, reverse)
        return H, last, carried

    def sums(self, v: Tensor, K: Tensor, decays: Decays, reverse: bool) -> Tensor:
        """What the chunks of each section add to the state: (sections, b, h, p, n)."""
        empty = torch.zeros(self.sections, self.b, self.h, self.p, self.n, device=self.device)
        return self._states(v, K, decays, empty, None, reverse, write=False)[1]

    def starts(self, sums: Tensor, decays: Decays, start: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        """The state that comes to each section, as `sums`, and the last (b, h, p, n)."""
        across = F.pad(decays.across, (0, self.sections * self.span - self.chunks), value=1.0)
        across = across.unflatten(-1, (self.sections, self.span)).prod(-1)[..., None, None]
        starts = torch.empty_like(sums)
        for k in reversed(range(self.sections)) if reverse else range(self.sections):
            starts[k] = start
            start = torch.addcmul(sums[k], across[:, :, k], start)
        return starts, start

    def _states(
        self, v: Tensor, K: Tensor, decays: Decays, start: Tensor, forward: Tensor | None, reverse: bool,
        write: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        last = self.empty(self.sections, self.b, self.h, self.p, self.n)
        H = self.empty(self.b, self.chunks, self.h, self.p, self.n, dtype=v.dtype) if write else last
        carried = self.empty(self.parts, self.b, self.chunks, self.h) if write and reverse else last
        warps, stages = self.tiles.states
        kernels.states[(self.b * self.h, self.parts, self.sections)](
            v, K, decays.enter if reverse else decays.leave, decays.dt, decays.across, start,
            H if forward is None else forward, H, last, carried, *v.stride()[:3], *K.stride()[:3], self.l, self.chunks,
            self.h, self.r, self.p, self.n, self.b * self.h, self.span,
            REVERSE=reverse, WRITE=write, **self.sizes, BQ=self.tiles.piece, BN=self.columns, num_warps=warps,
            num_stages=stages,
        )  # fmt: skip
        return H, last, carried

    def outputs(
        self, R: Tensor, K: Tensor, v: Tensor, H: Tensor, decays: Decays, D: Tensor | None, reverse: bool,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """y, or in reverse dx (b, l, h, p); in `out`, whose heads lie side by side, where it is given."""
        blocks = self.tiles.q // self.tiles.rows
        if out is None:
            out = self.empty(self.b, self.l, self.h, self.p, dtype=v.dtype)
        programs = self.b * self.chunks * blocks
        heads = _heads(programs * self.g, self.r, 1024)
        warps, stages = self.tiles.outputs
        kernels.outputs[(programs, self.h // heads)](
            R, K, v, H, decays.s, decays.s_dt, decays.leave if reverse else decays.enter, decays.dt,
            self._documents(decays.s), decays.s if D is None else D, out, *R.stride()[:3], *K.stride()[:3],
            *v.stride()[:3], *out.stride()[:2], self.l, self.chunks, self.h, self.r, heads, self.p, self.n, self.size,
            REVERSE=reverse, SKIP=D is not None, **self.flags, **self.sizes, BR=self.tiles.rows, BN=_power(self.n),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return out

    def key_gradients(
        self, R: Tensor, K: Tensor, u: Tensor, v: Tensor, H: Tensor, decays: Decays, reverse: bool,
        dR: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """The gradient of R (b, l, g, n), in `dR`, whose groups lie side by side, where it is given; and E's sums
        `pairs` and `through`, and in reverse `own` (b, h, L)."""
        rows = self.tiles.rows
        programs = self.b * self.chunks * (self.tiles.q // rows)
        heads = _heads(programs * self.g, self.r, 256)
        parts = self.r // heads
        by_pairs = self.empty(parts, self.b, self.l, self.g, self.n)
        if dR is None:
            dR = self.empty(*by_pairs.shape[1:], dtype=R.dtype)
        out = dR if parts == 1 else by_pairs[0]  # parts are added up below
        pairs, through = (self.empty(self.b, self.h, self.padded) for _ in range(2))
        own = self.empty(self.b, self.h, self.padded) if reverse else pairs
        grid, strides = (programs, self.g * parts), (*R.stride()[:3], *K.stride()[:3])
        counts = (self.l, self.chunks, self.h, self.r, heads, self.p, self.n)
        warps, stages = self.tiles.pair_gradients
        kernels.pair_gradients[grid](
            R, K, u, v, decays.s, decays.s_dt, decays.dt, self._documents(decays.s), by_pairs, pairs, own, *strides,
            *u.stride()[:3], *v.stride()[:3], *counts, self.size, by_pairs.stride(0),
            REVERSE=reverse, **self.flags, **self.sizes, BR=rows, BN=_power(self.n), num_warps=warps, num_stages=stages,
        )  # fmt: skip
        warps, stages = self.tiles.key_gradients
        kernels.key_gradients[grid](
            R, u, H, decays.leave if reverse else decays.enter, decays.dt, by_pairs, out, through, *strides[:3],
            *u.stride()[:3], *out.stride()[:2], *counts, by_pairs.stride(0),
            REVERSE=reverse, **self.sizes, BR=rows, BN=_power(self.n), num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return (dR if parts == 1 else dR.copy_(by_pairs.sum(0))), pairs, through, own

    def step_gradients(
        self, B: Tensor, C: Tensor, steps: Tensor, A: Tensor, read: tuple[Tensor, Tensor],
        written: tuple[Tensor, Tensor, Tensor], carried: Tensor, ddt: Tensor | None = None,
        trained: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """The gradients of dt (b, l, h) and A (h,); read and written are what `key_gradients` gave, without R's.

        With memory for `ddt`, they are those of a mixer's dt and A, and the third that of its dt_bias. Only the first
        is computed where the parameters are not `trained`.
        """
        raw, (A_part, bias_part) = ddt is not None, self.empty(2, self.b * self.chunks, self.h)
        if ddt is None:
            ddt = self.empty(self.b, self.l, self.h)
        heads = 8
        kernels.step_gradients[(self.b * self.chunks, self.g, -(-self.r // heads))](
            B, C, steps, A, *read, *written, carried, ddt, A_part, bias_part, *B.stride()[:3], *C.stride()[:3],
            *ddt.stride()[:2], self.l, self.h, self.chunks, self.r, self.n, len(carried), carried.stride(0), RAW=raw,
            Q=self.tiles.q, BH=heads, BN=_power(self.n), num_warps=4,
        )  # fmt: skip
        if not trained:
            return ddt, None, None
        return ddt, A_part.sum(0), bias_part.sum(0) if raw else bias_part

    def _documents(self, other: Tensor) -> Tensor:
        return other if self.documents is None else self.documents
