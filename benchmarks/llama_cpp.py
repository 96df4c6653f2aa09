"""Writing and reading text: this package beside llama.cpp on the exported model, with the same cores.

A round reads a prompt and writes some tokens greedily, through the end of a document. "+f16" and "+q8_0" are narrower
matrices in llama.cpp, "+int8" in this package: they show what a token costs that reads fewer bytes. `make test-llama`
installs llama.cpp. It runs in a process of its own; the time includes asking it, which is well below a millisecond.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
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


def prepare(name: str, setting: Setting, options: Options) -> tuple[Callable[[], Any], dict[str, Any]]:
    """What a peer does in a round, and the size of its model. Raises Unavailable without llama.cpp."""
    base, _, kind = name.partition("+")
    model = Mamba2LM(setting.config, seed=0).eval()
    prompt = torch.randint(257, setting.config.vocab_size, (setting.prompt,)).tolist()
    facts = {"parameters": peers.parameters(model)}
    if base == OURS:
        model = quantize(model, kind) if kind else lay_out_columns(model)
        return lambda: list(model.generate(prompt, setting.written, temperature=0)), facts
    if base != "llama.cpp" or kind not in llama_cpp.KINDS:
        raise ValueError(f"unknown peer {name!r}; there are {', '.join(PEERS)}")
    if reason := missing():
        raise harness.Unavailable(reason)
    words = [f" w{i}" for i in range(setting.config.vocab_size - 257)]
    values = llama_cpp.metadata(setting.config, WordTokenizer(words, pattern="llama3"), kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        gguf.write_gguf(path, values, llama_cpp.tensors(setting.config, model.state_dict(), kind))
        llama = LlamaCpp(path, threads=options.threads)
    return lambda: llama.generate(prompt, setting.written, through=True), facts


def main() -> None:
    args = harness.parser("llama_cpp", __doc__, PEERS).parse_args()
    args.no_memory = True
    options = harness.options(args)
    options.prepare()
    for name, setting in harness.choose(QUICK if args.quick else SETTINGS, args).items():
        entries = harness.compare(args.peers, setting, options, lambda *_: 0, prepare, things=setting.counted, tokens=1)
        harness.finish(harness.measurement("llama_cpp", name, setting.about(), options, entries), args)


if __name__ == "__main__":
    main()
