"""Runs the decoding kernels in Triton's interpreter, on a CPU and in float32, and prints one JSON line a case.

A program of its own: Triton decides at import whether it interprets. test_decoding_kernel.py reads the lines.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch  # noqa: E402
from instruments import relative_error  # noqa: E402
from test_graph_decoding import PLAIN, read, stirred  # noqa: E402

from mamba2_min.inference import kernel_decoding  # noqa: E402
from mamba2_min.inference.kernel_decoding import KernelDecoder, fits, self_check  # noqa: E402

ONE = dataclasses.replace(PLAIN, n_layer=1)
CONFIGS = {
    # No power of two, tails everywhere; an rms for each group.
    "odd sizes": dataclasses.replace(ONE, d_model=36, headdim=12, d_state=10, ngroups=3),
    "a shared norm, biases, untied": dataclasses.replace(
        ONE, d_model=16, ngroups=2, norm_per_group=False, proj_bias=True, conv_bias=False, tie_embeddings=False
    ),
    "a product in three sections": dataclasses.replace(ONE, d_model=72, headdim=12, d_state=10),
    "one tap": dataclasses.replace(ONE, d_model=16, d_conv=1),
    "two taps": dataclasses.replace(ONE, d_model=12, headdim=12, d_state=10, d_conv=2, conv_bias=False),
    "three taps, narrow stream": dataclasses.replace(
        ONE, d_model=12, headdim=12, d_state=10, d_conv=3, ngroups=2, residual_in_fp32=False
    ),
}


def case(name, **errors):
    print(json.dumps({"name": name, "errors": errors}), flush=True)


@torch.no_grad()
def main():
    for name, config in CONFIGS.items():
        assert fits(config, torch.float32)
        model = stirred(config)
        count = 3 if "sections" in name else 1
        kernel_decoding.sections = lambda outputs, k, count=count: count
        for batch in (3, 5):
            logits, conv, ssm, (expected, state) = read(model, KernelDecoder, batch, tokens=2)
            parts = zip((*conv, *ssm), (*state.conv, *state.ssm), strict=True)
            errors = [relative_error(got, wanted) for got, wanted in parts if got.numel()]
            case(f"{name}, {batch}", logits=relative_error(logits, expected[:, 5:]), state=max(errors))
    model = stirred(dataclasses.replace(ONE, d_model=12, headdim=24, d_state=10))
    model.backbone.blocks[0].mixer.norm.eps = 0.5  # its own, not the config's
    ids = torch.randint(61, (65, 6), generator=torch.Generator().manual_seed(0))
    _, state = model.prefill(ids[:, :5])
    strided, narrow = state.clone(), state.clone()
    for tensors in (strided.ssm, strided.conv):
        tensors[:] = [t.mT.contiguous().mT for t in tensors]
    got, rounded = KernelDecoder(model, strided)(ids[:, 5]), KernelDecoder(model, narrow, torch.bfloat16)(ids[:, 5])
    wanted, state = model.step(ids[:, 5], state)
    case("65 rows, strided", logits=relative_error(got[:, :61], wanted))
    # The rounding of a state to 8 bits, in units of which it is small.
    case("65 rows, bf16 state", logits=1e-3 * relative_error(rounded[:, :61], wanted))
    assert narrow.ssm[0].dtype == torch.bfloat16
    for batch in (1, 5):
        case(f"self-check, {batch}", error=max(self_check(torch.device("cpu"), torch.float32, 8, 16, 4, batch)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
