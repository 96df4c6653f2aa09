"""Writing and reading text: this package beside llama.cpp on the exported model, with one core.

A round reads a prompt and writes some tokens greedily, through the end of a document. "+f16" and "+q8_0" are narrower
matrices in llama.cpp, "+int8" in this package: they show what a token costs that reads fewer bytes. llama.cpp runs in a
process of its own (`make test-llama` installs it), so a time is processor time, of one thread and both processes: other
work on the machine counts little.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, peers
from benchmarks.harness import OURS, Options
from mamba2_min.checkpoints import gguf, llama_cpp
from mamba2_min.config import Mamba2Config
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.inference.decoding import lay_out_columns
from mamba2_min.inference.quantize import quantize
from mamba2_min.models.mamba2 import Mamba2LM
from tests.llama_cpp import LlamaCpp, missing

PEERS = (OURS, "mamba2_min+int8", "llama.cpp+f32", "llama.cpp+f16", "llama.cpp+q8_0")


@dataclass(frozen=True)
class Setting:
    """A model, the tokens of the prompt, and how many are written after it."""

    config: Mamba2Config
    prompt: int
    written: int

    @property
    def counted(self) -> int:
        """The tokens that a speed is about."""
        return self.prompt if self.written == 1 else self.written

    def about(self) -> dict[str, Any]:
        return {"batch": 1, "prompt": self.prompt, "written": self.written, "model": self.config.to_dict()}


SETTINGS = {
    "small-write": Setting(peers.SMALL, 10, 256),
    "small-read": Setting(peers.SMALL, 2048, 1),
    "base-write": Setting(peers.BASE, 10, 32),
    "base-read": Setting(peers.BASE, 512, 1),
}
QUICK = {"tiny-write": Setting(peers.TINY, 10, 8), "tiny-read": Setting(peers.TINY, 64, 1)}


@dataclass(frozen=True)
class Work:
    """What a peer does in a round, the processor time that it has taken so far, and the parameters of its model."""

    run: Callable[[], Any]
    clock: Callable[[], float]
    parameters: int


def prepare(name: str, setting: Setting) -> Work:
    """Raises Unavailable without llama.cpp, ValueError for an unknown name."""
    base, _, kind = name.partition("+")
    model = Mamba2LM(setting.config, seed=0).eval()
    prompt = torch.randint(257, setting.config.vocab_size, (setting.prompt,)).tolist()
    parameters = peers.parameters(model)
    if base == OURS:
        model = quantize(model, kind) if kind else lay_out_columns(model)
        return Work(lambda: list(model.generate(prompt, setting.written, temperature=0)), time.process_time, parameters)
    if base != "llama.cpp" or kind not in llama_cpp.KINDS:
        raise ValueError(f"unknown peer {name!r}; there are {', '.join(PEERS)}")
    if reason := missing():
        raise harness.Unavailable(reason)
    words = [f" w{i}" for i in range(setting.config.vocab_size - 257)]
    values = llama_cpp.metadata(setting.config, WordTokenizer(words, pattern="llama3"), kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        gguf.write_gguf(path, values, llama_cpp.tensors(setting.config, model.state_dict(), kind))
        llama = LlamaCpp(path)
    return Work(lambda: llama.generate(prompt, setting.written, through=True), llama.processor_seconds, parameters)


def compare(names: Sequence[str], setting: Setting, options: Options) -> dict[str, dict[str, Any]]:
    """An entry for each peer. They take turns, and each round begins with another one; warm-up rounds are dropped."""
    works = {name: prepare(name, setting) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(options.warmup + options.rounds):
        first = i % len(names)
        for name in [*names[first:], *names[:first]]:
            before = works[name].clock()
            works[name].run()
            if i >= options.warmup:
                seconds[name].append(works[name].clock() - before)
    return {
        name: {"parameters": works[name].parameters, **harness.timed(seconds[name], setting.counted, 1)}
        for name in names
    }


def main() -> None:
    args = harness.parser("llama_cpp", __doc__, PEERS).parse_args()
    options = dataclasses.replace(harness.options(args), threads=1)
    options.prepare()
    for name, setting in harness.choose(QUICK if args.quick else SETTINGS, args).items():
        entries = compare(args.peers, setting, options)
        harness.finish(harness.measurement("llama_cpp", name, setting.about(), options, entries), args)


if __name__ == "__main__":
    main()
