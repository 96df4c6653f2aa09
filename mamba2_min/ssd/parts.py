"""The plain scan in parts: the memory of one part, for any decays, on any device."""

from __future__ import annotations

import torch
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
def scan(x, dt, A, B, C, D, initial_state, seq_idx, chunk_size):
    """`ssd_plain`, some rows and chunks at a time, each part computed again in the backward pass.

    As every scan of `ssd.SCANS`. Between forward and backward it keeps the inputs and the
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
            documents = None
            if seq_idx is not None:
                documents = seq_idx[i : i + rows, k : k + tokens]
                if k:  # the state that enters belongs to the document of the token before
                    continues = documents[:, 0] == seq_idx[i : i + rows, k - 1]
                    state = state.where(continues[:, None, None, None], 0)
            arguments = (x_, dt_, A, B_, C_, D, state, documents, q)
            if torch.is_grad_enabled():
                y, state = checkpoint(ssd_plain, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                y, state = ssd_plain(*arguments)
            ys.append(y)
        results.append((torch.cat(ys, dim=1), state))
    return torch.cat([y for y, _ in results]), torch.cat([state for _, state in results])
