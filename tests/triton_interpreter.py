"""Runs the GPU's kernels in Triton's interpreter, on a CPU and in float32, and prints one JSON line a case.

A program of its own: Triton decides at import whether it interprets. test_triton.py reads the lines.
"""

import copy
import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch  # noqa: E402
from instruments import relative_error  # noqa: E402
from test_graph_decoding import stirred  # noqa: E402
from test_ssd import by_definition, chunked, make, run, to  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from mamba2_min import ssd  # noqa: E402
from mamba2_min.config import Mamba2Config  # noqa: E402
from mamba2_min.finetune.lora import LoRAConfig, adapters, add_lora  # noqa: E402
from mamba2_min.models import mamba2, stream  # noqa: E402
from mamba2_min.models.core import core  # noqa: E402
from mamba2_min.models.stream import through  # noqa: E402
from mamba2_min.ops import conv_kernels, gpu_kernels, lora_kernels, norm  # noqa: E402
from mamba2_min.ops.conv import conv_silu_by_taps  # noqa: E402
from mamba2_min.ops.lora import lora_linear  # noqa: E402
from mamba2_min.ops.lora_kernels import mask_bits  # noqa: E402
from mamba2_min.ops.loss_kernels import softmax_gradient  # noqa: E402
from mamba2_min.ops.norm_kernels import AddRMSNorm, RMSNorm  # noqa: E402
from mamba2_min.ssd import triton_launch  # noqa: E402

# Chunks of 32 tokens in two blocks of rows, read in pieces of 16; states of 32 numbers in two tiles.
SMALL = triton_launch.Tiles(32, 16, 16, 16, (4, 1), (4, 1), (4, 1), (4, 1), 0)
conv_kernels._SEGMENT = 8
triton_launch.TABLE[:] = [(torch.float32, 64, 128, SMALL)]

scan = chunked(64, "triton")


def case(name, started, errors):
    print(json.dumps({"name": name, "errors": errors, "seconds": round(time.perf_counter() - started, 2)}), flush=True)


def scans():
    cases = {
        "documents, D, a state": make(45, b=1, h=2, p=16, n=32),
        "groups": make(17, g=2, b=1, documents=False, skip=False, start=False, p=32, n=16),
        "one token": make(1, b=1, h=2, p=16, n=16),
        "strided": make(33, b=1, h=2, p=16, n=16, documents=False),
        "decays that forget": make(40, b=1, h=2, p=16, n=16, documents=False),
        "sections": make(150, b=1, h=2, p=16, n=32),  # of 3 and 2 chunks
    }
    for name, arguments in cases.items():
        triton_launch._SPAN = 2 if name == "sections" else 16
        if name.startswith("decays"):
            arguments["A"] = torch.tensor([-1e4, -1e-3], dtype=torch.float64)
            arguments["dt"][:, ::7] = 30.0
        low = to(arguments, torch.float32)
        if name == "strided":
            low = {k: v if k not in ("x", "B", "C") else v.mT.contiguous().mT for k, v in low.items()}
        started = time.perf_counter()
        got, wanted = run(scan, low), run(by_definition, arguments)
        errors = {key: relative_error(got[key], value) for key, value in wanted.items()}
        case(name, started, errors)
    started = time.perf_counter()
    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True, dynamic=False)
    arguments = to(make(9, b=1, h=2, p=16, n=16, documents=False), torch.float32)
    got, wanted = run(compiled, arguments), run(scan, arguments)
    case("compiled as one graph", started, {key: relative_error(got[key], value) for key, value in wanted.items()})


def compare(name, got, wanted, inputs, wide, dy):
    started = time.perf_counter()
    gradients = zip(torch.autograd.grad(got, inputs, dy), torch.autograd.grad(wanted, wide, dy.double()), strict=True)
    case(
        name,
        started,
        {"out": relative_error(got, wanted), **{str(i): relative_error(*g) for i, g in enumerate(gradients)}},
    )


def leaves(*tensors):
    inputs = [t.detach().requires_grad_() for t in tensors]
    return inputs, [t.detach().double().requires_grad_() for t in inputs]


def operations():
    r = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=r)

    for b, l, c, bias in ((1, 37, 24, True), (1, 2, 300, False)):
        inputs, wide = leaves(normal(b, l, c + 7)[..., 3 : 3 + c], normal(c, 4), *([normal(c)] if bias else []))
        got = conv_kernels.ConvSiLU.apply(*inputs, *([] if bias else [None]))
        padded = F.pad(wide[0], (0, 0, 3, 0))
        wanted = conv_silu_by_taps(padded, wide[1], wide[2] if bias else None)
        compare(f"convolution, {l} tokens", got, wanted, inputs, wide, normal(b, l, c))
    # After other inputs, and with documents of which some are shorter than the taps.
    documents = torch.tensor([0] * 2 + [1] + [2] * 9 + [3] * 2 + [4] * 6)[None].expand(2, -1).contiguous()
    before = normal(2, 3, 24)
    for seq_idx in (documents, None):
        inputs, wide = leaves(normal(2, 20, 24), normal(24, 4), normal(24))
        past = before.double()
        wanted = conv_silu_by_taps(
            torch.cat([past, wide[0]], 1), *wide[1:], None if seq_idx is None else F.pad(seq_idx, (3, 0))
        )
        got = conv_kernels.ConvSiLU.apply(*inputs, before, None if seq_idx is None else seq_idx.int())
        compare(f"convolution after others, {seq_idx is not None}", got, wanted, inputs, wide, normal(2, 20, 24))
    for groups, width in ((1, 100), (2, 64)):
        inputs, wide = leaves(normal(3, 5, width + 8)[..., 8:], normal(3, 5, width), normal(width))
        got = RMSNorm.apply(*inputs, 1e-5, groups, False)
        wanted = norm.gated_rms_norm_plain(*wide, 1e-5, False, groups)
        compare(f"gated norm, {groups} groups", got, wanted, inputs, wide, normal(3, 5, width))
    inputs, wide = leaves(normal(7, 40), normal(40))
    got = RMSNorm.apply(inputs[0], None, inputs[1], 1e-5, 1, False)
    compare("norm", got, norm.rms_norm_plain(*wide, 1e-5), inputs, wide, normal(7, 40))
    for with_more in (True, False):
        inputs, wide = leaves(normal(7, 40), *([normal(7, 47)[:, 7:]] if with_more else []), normal(40))
        shown, meant = [
            function(*(t if with_more else [t[0], None, t[1]]), 1e-5, *last)
            for function, t, last in ((AddRMSNorm.apply, inputs, [False]), (norm.add_rms_norm_plain, wide, []))
        ]
        name = "sum and norm" if with_more else "stream and norm"
        compare(name, torch.cat(shown), torch.cat(meant), inputs, wide, normal(14, 40))
    started, logits = time.perf_counter(), normal(5, 4200) * 5
    index = torch.tensor([[0], [4159], [3], [4], [5]])
    logp = torch.log_softmax(logits[:, :4160].double(), -1)
    wanted = F.pad(logp.exp() - F.one_hot(index[:, 0], 4160), (0, 40))
    got = softmax_gradient(logits, index, 4160)
    case(
        "softmax",
        started,
        {"loss": relative_error(got, logp.gather(1, index)), "gradient": relative_error(logits, wanted)},
    )


def adapters_with_dropout():
    """A projection with its adapter, by the kernels and by its definition with the bits that they drew."""
    r = torch.Generator().manual_seed(0)
    for tokens, width, out, rank, dx in ((70, 45, 33, 3, True), (600, 160, 20, 9, True), (33, 64, 16, 16, False)):
        started, drawn = time.perf_counter(), mask_bits(tokens, width, 0.3, torch.device("cpu"))
        x, weight, A, B = (
            torch.randn(size, generator=r) for size in ((tokens, width + 5), (out, width), (rank, width), (out, rank))
        )
        with (
            mock.patch.object(gpu_kernels, "takes", lambda t: t.dtype == torch.float32),
            mock.patch.object(lora_kernels, "mask_bits", mock.Mock(return_value=drawn)),
        ):
            inputs = [x[:, 5:].requires_grad_(dx), A.requires_grad_(), B.requires_grad_()]
            y = lora_linear(inputs[0], weight, None, *inputs[1:], 2.0, 0.3)
            dy = torch.randn(y.shape, generator=r)
            got = [y, *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], dy)]
        bits, kept = drawn
        mask = (bits[:, :, None] >> torch.arange(32) & 1).flatten(1)[:, :width].double() / kept
        wide = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
        y = F.linear(wide[0], weight.double()) + 2 * F.linear(F.linear(wide[0] * mask, wide[1]), wide[2])
        wanted = [y, *torch.autograd.grad(y, [t for t in wide if t.requires_grad], dy.double())]
        errors = {str(i): relative_error(*pair) for i, pair in enumerate(zip(got, wanted, strict=True))}
        case(f"LoRA, {tokens} tokens", started, errors)
    started, found = time.perf_counter(), {}
    for p in (0.1, 0.5):
        bits, kept = mask_bits(100, 1600, p, torch.device("cpu"))
        ones = (bits[:, :, None] >> torch.arange(32) & 1).flatten(1).double()
        found[f"{p} exact"] = abs(kept - (1 - p)) / 100
        # In standard deviations: sums of all, of rows, of columns, and how neighbours go together.
        centred = (ones - kept) / (p * (1 - p)) ** 0.5
        for name, sums in {
            "all": centred.sum() / 400,
            "rows": centred.sum(1) / 40,
            "columns": centred.sum(0) / 10,
            "neighbours": (centred[:, 1:] * centred[:, :-1]).sum() / 400,
            "rows below": (centred[1:] * centred[:-1]).sum() / 400,
        }.items():
            found[f"{p} {name}"] = float(sums.abs().max() > 7)
    again, _ = mask_bits(100, 1600, 0.5, torch.device("cpu"))
    found["another mask each time"] = float(torch.equal(bits, again))
    case("bits of dropout", started, found)


def between_projections():
    """A mixer without its projections, by one function and by its definition: values and gradients."""
    config = Mamba2Config(vocab_size=61, d_model=16, n_layer=1, d_state=16, headdim=16, ngroups=2)
    model = stirred(config).train()
    mixer, wide = (m.backbone.layers[0].mixer for m in (model, copy.deepcopy(model).double()))
    wide.in_proj = wide.out_proj = torch.nn.Identity()
    r = torch.Generator().manual_seed(0)
    zxBCdt, window = torch.randn(2, 37, config.d_in_proj, generator=r), torch.randn(2, 3, config.conv_dim, generator=r)
    state = torch.randn(2, config.nheads, 16, 16, generator=r)
    documents = (torch.arange(37) // 11)[None].expand(2, -1)
    cases = {"": (1, None, None, None), ", from states, documents": (2, window, state, documents)}
    cases[", frozen"] = cases[", from states, documents"]
    for name, (b, *given) in cases.items():
        started, found = time.perf_counter(), []
        if name == ", frozen":
            model.requires_grad_(False)
            wide.requires_grad_(False)
        for m, computed in ((mixer, lambda *t: core(mixer, *t)), (wide, wide)):
            r = torch.Generator().manual_seed(1)
            t = zxBCdt[-b:].to(m.D.dtype).requires_grad_()
            before, start, seq_idx = (None if v is None else v.to(m.D.dtype) for v in given)
            leaves = [t, *m.conv1d.parameters(), m.dt_bias, m.A_log, m.D, m.norm.weight]
            leaves = [leaf for leaf in leaves if leaf.requires_grad]
            if start is not None:
                leaves += [start.requires_grad_(), before.requires_grad_()]
            out = computed(t, before, start, seq_idx)
            total = sum((value * torch.randn(value.shape, generator=r).to(value.dtype)).sum() for value in out)
            found.append([*out, *torch.autograd.grad(total, leaves)])
        errors = {str(i): relative_error(got, wanted) for i, (got, wanted) in enumerate(zip(*found, strict=True))}
        if name != ", frozen":
            errors["dA"], errors["dD"] = errors.pop("7"), errors.pop("8")
        case("between the projections" + name, started, errors)


def a_whole_model(lora=False):
    """The loss's gradients as a GPU computes them: all of a model's training that our kernels do."""
    config = Mamba2Config(vocab_size=61, d_model=16, n_layer=2, d_state=16, headdim=16, ngroups=2)
    model = stirred(config).train()
    if lora:
        add_lora(model, LoRAConfig(r=3, dropout=0.0))
        generator = torch.Generator().manual_seed(1)
        for _, module in adapters(model):
            torch.nn.init.normal_(module.lora_B.weight, generator=generator)
    wide, ids = copy.deepcopy(model).double(), torch.randint(61, (1, 18), generator=torch.Generator().manual_seed(0))
    started, used = time.perf_counter(), []
    with mock.patch.object(gpu_kernels, "takes", lambda t: t.dtype == torch.float32), ssd.using("triton"):
        spies = [mock.patch.object(mamba2, "core", lambda *args: used.append("core") or core(*args))]
        spies.append(mock.patch.object(stream, "through", lambda *args: used.append("stream") or through(*args)))
        with spies[0], spies[1]:
            model.loss(ids[:, :-1], ids[:, 1:]).backward()
    assert used == ["stream", "core", "core"], used
    wide.loss(ids[:, :-1], ids[:, 1:]).backward()
    pairs = zip(model.named_parameters(), wide.parameters(), strict=True)
    errors = {name: relative_error(p.grad, q.grad) for (name, p), q in pairs if p.requires_grad}
    case("a whole model" + (", LoRA" if lora else ""), started, errors)


if __name__ == "__main__":
    torch.set_num_threads(1)
    scans()
    operations()
    adapters_with_dropout()
    between_projections()
    a_whole_model()
    a_whole_model(lora=True)
