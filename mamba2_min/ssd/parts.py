"""The plain scan in parts: the memory of one part, for any decays, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mamba2_min.ops.autograd import no_compile
from mamba2_min.ssd.arguments import Shape
from mamba2_min.ssd.plain import ssd_plain

# Elements of L, the decays between the tokens of a chunk, that exist at a time: what fits in a core's second-level
# cache on a CPU, and enough to fill a GPU.
_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 19, 1 << 26


def supports(device: torch.device, dtype: torch.dtype, shape: Shape) -> bool:
    """Always: every device, dtype and shape."""
    return True


@no_compile  # a compiler would unroll the loop over parts
def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """`ssd_plain`, some rows and chunks at a time, each part computed again in the backward pass.

    Arguments and results as for every scan of `ssd.SCANS`. Between forward and backward it keeps the inputs and the
    state at the start of each part.
    """
    b, l, h, _ = x.shape
    q = min(chunk_size, l)
    chunks = max(1, (_CPU_ELEMENTS if x.device.type == "cpu" else _GPU_ELEMENTS) // (h * q * q))  # that fit in a part
    rows, tokens = min(b, chunks), q * max(1, chunks // b)
    results = []
    for i in range(0, b, rows):
        state, ys = initial_state[i : i + rows], []
        for k in range(0, l, tokens):
            x_, dt_, B_, C_ = (t[i : i + rows, k : k + tokens] for t in (x, dt, B, C))
            documents = None if seq_idx is None else seq_idx[i : i + rows, k : k + tokens]
            if seq_idx is not None and k:  # the state that enters a part belongs to the document before it
                continues = documents[:, 0] == seq_idx[i : i + rows, k - 1]
                state = state.where(continues[:, None, None, None], 0)
            arguments = (x_, dt_, A, B_, C_, D, state, documents, q)
            if torch.is_grad_enabled():
                y, state = checkpoint(ssd_plain, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                y, state = ssd_plain(*arguments)
            ys.append(y)
        results.append((torch.cat(ys, dim=1), state))
    ys, states = zip(*results, strict=True)
    return torch.cat(ys), torch.cat(states)
