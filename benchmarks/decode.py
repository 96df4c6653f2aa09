"""Decoding, token by token and greedily: seconds a token and memory, after a short and after a long context.

A round writes the same number of tokens with every peer; a cache is wound back after it, so that each round begins at
the same place. Peak memory is that of the model, its state and the writing, once the context has been read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import harness, peers
from benchmarks.harness import MemoryMeter, Options
from mamba2_min.config import Mamba2Config
from mamba2_min.inference.decoding import lay_out_columns
from mamba2_min.models.mamba2 import Mamba2LM


@dataclass(frozen=True)
class Setting:
    """A model, how many texts it writes at once, after how many tokens, and how many of them a round."""

    config: Mamba2Config
    batch: int
    context: int
    tokens: int

    def about(self) -> dict[str, Any]:
        return {"batch": self.batch, "context": self.context, "tokens": self.tokens, "model": self.config.to_dict()}


SETTINGS = {
    "cpu": {
        "small-b1-after10": Setting(peers.SMALL, 1, 10, 64),
        "small-b1-after10000": Setting(peers.SMALL, 1, 10_000, 64),
        "base-b1-after10": Setting(peers.BASE, 1, 10, 8),
        "base-b1-after10000": Setting(peers.BASE, 1, 10_000, 8),
    },
    "cuda": {
        "base-b1-after10": Setting(peers.BASE, 1, 10, 128),
        "base-b1-after10000": Setting(peers.BASE, 1, 10_000, 128),
        "base-b64-after10": Setting(peers.BASE, 64, 10, 128),
        "base-b64-after10000": Setting(peers.BASE, 64, 10_000, 128),
    },
}
QUICK = {"tiny-b2-after10": Setting(peers.TINY, 2, 10, 4), "tiny-b2-after700": Setting(peers.TINY, 2, 700, 4)}


@torch.inference_mode()
def writer_of(peer: peers.Peer, setting: Setting, options: Options) -> tuple[Callable[[], None], int]:
    """One round's writing as a function, after the context has been read; and the bytes of the state then."""
    peer.model.eval()
    prompt = torch.randint(setting.config.vocab_size, (setting.batch, setting.context), device=options.device)
    logits, state = peer.prefill(prompt)
    first = logits.argmax(-1)
    _, state = peer.step(first, state)  # prepares what is prepared for a text, and lays the state out
    peer.rewind(state, setting.context)

    @torch.inference_mode()
    def write() -> None:
        nonlocal state
        ids = first
        peer.rewind(state, setting.context)
        for _ in range(setting.tokens):
            logits, state = peer.step(ids, state)
            ids = logits.argmax(-1)

    return write, peer.state_bytes(state)


def build(name: str, setting: Setting, options: Options) -> peers.Peer:
    """Weights are of the dtype asked for, as those who decode keep them; autocast would convert them every token."""
    peer = peers.build(name, setting.config, options.device, options.weight_dtype)
    if isinstance(peer.model, Mamba2LM) and options.device == "cpu":
        lay_out_columns(peer.model)  # as run.py has it
    return peer


def peak_memory(name: str, setting: Setting, options: Options) -> int:
    """Bytes that the model, its state and a round's writing take at their highest."""
    rehearsal = QUICK["tiny-b2-after10"]
    writer_of(build(name, rehearsal, options), rehearsal, options)[0]()
    meter = MemoryMeter(options.device)
    write, _ = writer_of(build(name, setting, options), setting, options)
    meter.start()
    write()
    options.synchronize()
    return meter.peak()


def prepare(name: str, setting: Setting, options: Options) -> tuple[Callable[[], None], dict[str, Any]]:
    """A peer's writing, and the sizes of its model and state."""
    peer = build(name, setting, options)
    write, state_bytes = writer_of(peer, setting, options)
    return write, {"parameters": peers.parameters(peer.model), "state_bytes": state_bytes}


def captured_anew(args: argparse.Namespace, setting: Setting, options: Options) -> dict[str, dict[str, Any]]:
    """An entry for each peer from --captures measurements, each with everything built, compiled and recorded anew."""
    things = {"things": setting.tokens, "tokens": setting.batch}
    runs = []
    for i in range(args.captures):
        runs.append(harness.compare(args.peers, setting, options, peak_memory, prepare, **things))
        if i == 0:
            options = replace(options, memory=False)
    entries = runs[0]
    for name, entry in entries.items():
        if "seconds" in entry and len(runs) > 1:
            each = [run[name] for run in runs]
            seconds = [s * setting.tokens for one in each for s in one["seconds"]]
            entry |= harness.timed(seconds, **things)
            entry["by_capture"] = [one["tokens_per_second"] for one in each]
    return entries


def main() -> None:
    parser = harness.parser("decode", __doc__, (*peers.DEFAULT, "mamba2_min+int8", "mamba2_min+bf16state"))
    parser.add_argument("--captures", type=int, help="begin anew so often (default: 5 on a GPU, 1 on a CPU)")
    args = parser.parse_args()
    if args.captures is None:
        args.captures = 5 if args.device == "cuda" and not args.quick else 1
    elif args.captures < 1:
        sys.exit("error: --captures must be at least 1")
    options = harness.options(args)
    options.prepare()
    for name, setting in harness.choose(QUICK if args.quick else SETTINGS[args.device], args).items():
        entries = captured_anew(args, setting, options)
        harness.finish(harness.measurement("decode", name, setting.about(), options, entries), args)


if __name__ == "__main__":
    main()
