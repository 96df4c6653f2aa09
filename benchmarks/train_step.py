"""One training step: forward, loss, backward, gradient clipping, AdamW. Tokens per second and peak memory.

Beside the peers runs the floor: the matrix products of the Mamba-2's projections and head alone, forward and backward,
in the same dtype. No step can be faster than they are; the floor's share says how much of the time they take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from benchmarks import harness, peers
from benchmarks.harness import FLOOR, MemoryMeter, Options
from mamba2_min.config import Mamba2Config
from mamba2_min.models.base import decay_groups
from mamba2_min.training.step_graph import StepGraph


@dataclass(frozen=True)
class Setting:
    """The sizes of a step."""

    config: Mamba2Config
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def about(self) -> dict[str, Any]:
        return {"batch": self.batch, "length": self.length, "model": self.config.to_dict()}


SETTINGS = {
    "cpu": {
        "small-b8-l256": Setting(peers.SMALL, 8, 256),
        "small-b2-l1024": Setting(peers.SMALL, 2, 1024),
        "small-b1-l4096": Setting(peers.SMALL, 1, 4096),
    },
    "cuda": {
        "base-b8-l2048": Setting(peers.BASE, 8, 2048),
        "small-b64-l768": Setting(peers.SMALL, 64, 768),
        # The same number of tokens in texts of every length: where the cost of attention outgrows that of a scan.
        **{f"base-b{32768 // l}-l{l}": Setting(peers.BASE, 32768 // l, l) for l in (512, 4096, 8192, 16384, 32768)},
        # Alone, with --peers mamba2_min+graph: beside others it does not fit into a GPU's memory.
        "large-b4-l4096": Setting(peers.LARGE, 4, 4096),
    },
}
QUICK = {"tiny-b2-l48": Setting(peers.TINY, 2, 48)}
STEPS = {"cpu": 1, "cuda": 5}  # in a round, one after another: a GPU that has been waited for begins late


def step_of(peer: peers.Peer, ids: Tensor, targets: Tensor, options: Options) -> Callable[[], None]:
    """One training step as a function: what `train.py` does, for every peer alike."""
    weights = list(peer.model.parameters())
    optimizer = torch.optim.AdamW(decay_groups(peer.model, 0.1), lr=1e-3, betas=(0.9, 0.95), fused=True)
    peer.model.train()

    def backward(ids: Tensor, targets: Tensor) -> Tensor:
        with options.autocast():
            loss = peer.loss(ids, targets)
        loss.backward()
        return loss.detach()

    graph = None
    if getattr(peer, "graph", False):
        with options.products():
            graph = StepGraph(weights, backward, (ids, targets))

    def step() -> None:
        if graph is None:
            backward(ids, targets)
        else:
            graph((ids, targets))
        clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def floor_of(setting: Setting, options: Options) -> Callable[[], None]:
    """The products that the parameters take part in: y = x W^T, and in the backward dx = dy W, dW = dy^T x."""
    c, dtype = setting.config, options.operand_dtype
    shapes = [(c.d_model, c.d_in_proj, c.n_layer), (c.d_inner, c.d_model, c.n_layer), (c.d_model, c.vocab_size, 1)]
    new = partial(torch.randn, device=options.device, dtype=dtype)
    operands = [
        (new(setting.tokens, inputs), new(outputs, inputs), new(setting.tokens, outputs), times)
        for inputs, outputs, times in shapes
    ]
    results = [tuple(map(torch.empty_like, tensors[:3])) for tensors in operands]

    def products() -> None:
        for (x, w, dy, times), (dx, dw, y) in zip(operands, results, strict=True):
            for _ in range(times):
                torch.mm(x, w.t(), out=y)
                torch.mm(dy, w, out=dx)
                torch.mm(dy.t(), x, out=dw)

    return products


def batch_of(setting: Setting, device: str) -> tuple[Tensor, Tensor]:
    """Random ids and targets (b, l): what a step costs does not depend on which tokens they are."""
    ids = torch.randint(setting.config.vocab_size, (setting.batch, setting.length + 1), device=device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def peak_memory(name: str, setting: Setting, options: Options) -> int:
    """Bytes that a peer's model, gradients, optimiser state and activations take at their highest, in a third step."""
    name = name.replace("+graph", "")  # the same passes; the allocator counts what a recorded graph holds as free
    rehearsal = QUICK["tiny-b2-l48"]  # loads libraries and starts threads, which are not the model's
    rehearsed = name if options.device == "cpu" else name.partition("+")[0]  # a GPU's memory has no compiler in it
    peer = peers.build(rehearsed, rehearsal.config, options.device)
    step_of(peer, *batch_of(rehearsal, options.device), options)()
    meter = MemoryMeter(options.device)
    peer = peers.build(name, setting.config, options.device)
    step = step_of(peer, *batch_of(setting, options.device), options)
    for _ in range(2):
        step()
    meter.start()
    step()
    options.synchronize()
    return meter.peak()


def prepare(name: str, setting: Setting, options: Options) -> tuple[Callable[[], None], dict[str, Any]]:
    """STEPS steps of a peer, or as often the floor's products, and the number of parameters."""
    if name == FLOOR:
        step, facts = floor_of(setting, options), {}
    else:
        peer = peers.build(name, setting.config, options.device)
        step = step_of(peer, *batch_of(setting, options.device), options)
        facts = {"parameters": peers.parameters(peer.model)}

    def steps() -> None:
        for _ in range(STEPS[options.device]):
            step()

    return steps, facts


def main() -> None:
    args = harness.parser("train_step", __doc__, peers.DEFAULT).parse_args()
    options = harness.options(args)
    options.prepare()
    for name, setting in harness.choose(QUICK if args.quick else SETTINGS[args.device], args).items():
        names = [*args.peers, FLOOR]
        things = STEPS[args.device]
        entries = harness.compare(names, setting, options, peak_memory, prepare, things, setting.tokens)
        harness.finish(harness.measurement("train_step", name, setting.about(), options, entries), args)


if __name__ == "__main__":
    main()
