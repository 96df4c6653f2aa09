"""A whole training step against context: peak memory and time, as docs/benchmarks.md shows them.

The step is `benchmarks.train_step`'s. A peer is left out from the context on at which its memory, which grows at least
in proportion, would pass --limit-gb.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from benchmarks import harness, peers
from benchmarks.train_step import STEPS, Setting, peak_memory, prepare

CONTEXTS = {"cpu": (128, 256, 512, 1024, 2048, 4096, 8192), "cuda": (5, 20, 128, 256, 768)}
BATCH = {"cpu": 1, "cuda": 64}


def default_limit_gb(device: str) -> float:
    """Three quarters of the memory there is."""
    if device == "cuda":
        return 0.75 * torch.cuda.get_device_properties(0).total_memory / 1e9
    return 0.75 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def can_go_on(entry: dict[str, Any], growth: float, limit_gb: float) -> bool:
    """Whether a peer whose entry this is would stay within the limit at `growth` times the context."""
    return "skipped" not in entry and entry.get("peak_bytes", 0) * growth <= limit_gb * 1e9


def main() -> None:
    p = harness.parser("memory", __doc__, peers.DEFAULT)
    p.add_argument("--model", choices=("small", "base"), default="small", help="d 256, 4 layers; or d 768, 24 layers")
    p.add_argument("--batch", type=int, help="default: 1 on a CPU, 64 on a GPU")
    p.add_argument("--contexts", type=int, nargs="+", help="default: 128 ... 8192 on a CPU, 5 ... 768 on a GPU")
    p.add_argument("--limit-gb", type=float, help="default: three quarters of the memory there is")
    p.set_defaults(rounds=3)
    args = p.parse_args()
    options = harness.options(args)
    options.prepare()

    size, batch = args.model, args.batch or BATCH[args.device]
    contexts = sorted(args.contexts or CONTEXTS[args.device])
    if args.quick:
        size, batch, contexts = "tiny", 1, [32, 64]
    settings = {f"{size}-b{batch}-l{l}": Setting(peers.MODELS[size], batch, l) for l in contexts}

    chosen = list(harness.choose(settings, args).items())
    names = list(args.peers)
    for i, (name, setting) in enumerate(chosen):
        things = STEPS[args.device]
        entries = harness.compare(names, setting, options, peak_memory, prepare, things, setting.tokens)
        harness.finish(harness.measurement("memory", name, setting.about(), options, entries), args)
        if i + 1 < len(chosen):
            growth = chosen[i + 1][1].length / setting.length
            limit_gb = args.limit_gb or default_limit_gb(args.device)
            names = [peer for peer in names if can_go_on(entries[peer], growth, limit_gb)]
        if not names:
            break


if __name__ == "__main__":
    main()
