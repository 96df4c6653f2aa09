"""One of several processes that share sequences, by the GPU's kernels in Triton's interpreter, on a CPU in float32.

python stretches_interpreter.py RANK MEETING: prints the error of each case. test_stretches.py starts both processes.
"""

import copy
import os
import sys
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch  # noqa: E402
from instruments import relative_error  # noqa: E402
from test_graph_decoding import stirred  # noqa: E402
from torch import distributed as dist  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from mamba2_min import ssd  # noqa: E402
from mamba2_min.config import Mamba2Config  # noqa: E402
from mamba2_min.models import mamba2  # noqa: E402
from mamba2_min.models.core import core  # noqa: E402
from mamba2_min.ops import conv_kernels, gpu_kernels  # noqa: E402
from mamba2_min.ssd import triton_launch  # noqa: E402
from mamba2_min.ssd.stretches import spread_over  # noqa: E402

SMALL = triton_launch.Tiles(32, 16, 16, 16, (4, 1), (4, 1), (4, 1), (4, 1), 0)  # chunks of 32 tokens
conv_kernels._SEGMENT = 8
triton_launch.TABLE[:] = [(torch.float32, 64, 128, SMALL)]
triton_launch._SPAN = 1  # a section for each chunk

# The lengths of both stretches; rows; whether documents are packed; whether a state goes before; whether blocks run
# again.
CASES = [((40, 7), 1, False, False, False), ((2, 35), 2, True, True, False), ((18, 17), 1, True, False, True)]


def case(rank, lengths, rows, packed, begun, again):
    config = Mamba2Config(vocab_size=31, d_model=16, n_layer=2, d_state=16, headdim=16, ngroups=2)
    model, r = stirred(config).train(), torch.Generator().manual_seed(sum(lengths))
    wide = copy.deepcopy(model).double()
    ids, targets = (torch.randint(31, (rows, sum(lengths)), generator=r) for _ in range(2))
    seq_idx = state = None
    if packed:
        begins = torch.rand(rows, sum(lengths), generator=r) < 0.2
        begins[:, lengths[0]] = torch.arange(rows) == 1  # of two rows, one goes on into the second stretch
        seq_idx = begins.cumsum(1)
    if begun:
        with torch.no_grad():
            state = wide(torch.randint(31, (rows, 5), generator=r))[1]

    def results(m, part, share):
        given, kept = None, []
        if state is not None:
            dtype = m.lm_head.weight.dtype
            given = mamba2.State(
                *([t.detach().to(dtype).requires_grad_() for t in ts] for ts in (state.conv, state.ssm))
            )
            kept = [*given.conv, *given.ssm]
        logits, end = m(ids[:, part], given, None if seq_idx is None else seq_idx[:, part])
        loss = F.cross_entropy(logits.flatten(0, 1), targets[:, part].flatten(), reduction="sum")
        (loss + share * sum((t**2).sum() for t in (*end.conv, *end.ssm))).backward()
        return logits.detach(), [*end.conv, *end.ssm], [t.grad for t in (*m.parameters(), *kept)]

    logits, end, wanted = results(wide, slice(None), 1)
    start, used = sum(lengths[:rank]), []
    part = slice(start, start + lengths[rank])
    model.recompute = again
    with (
        spread_over(dist.group.WORLD),
        ssd.using("triton"),
        mock.patch.object(gpu_kernels, "takes", lambda t: t.dtype == torch.float32),
        mock.patch.object(mamba2, "core", lambda *args: used.append(1) or core(*args)),
    ):
        mine, last, got = results(model, part, 0.5)
    assert len(used) == 2 * (1 + again), used
    errors = [relative_error(mine, logits[:, part])]
    errors += [relative_error(a, b) for a, b in zip(last, end, strict=True)]
    for a, b in zip(got, wanted, strict=True):
        dist.all_reduce(a)
        errors.append(relative_error(a, b))
    return torch.tensor(errors).max()  # NaN where one is


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
    for one in CASES:
        print(float(case(rank, *one)), flush=True)
    dist.destroy_process_group()
