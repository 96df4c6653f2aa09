"""llama.cpp in a process of its own, as `make test-llama` installs it: what the tests of exported models ask."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent / "llama"


def missing() -> str:
    """Why llama.cpp cannot be asked here; "" where it can."""
    if shutil.which("node") is None:
        return "needs Node.js"
    return "" if (FOLDER / "node_modules").is_dir() else "needs llama.cpp from npm: make test-llama"


class LlamaCpp:
    """One model in llama.cpp. In a `with`: the process ends with it."""

    def __init__(self, path: str | Path, context: int = 4096):
        self._process = subprocess.Popen(
            ["node", "llama.mjs"],
            cwd=FOLDER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self.suppressed = self._ask("load", path=str(Path(path).resolve()), context=context)["suppressed"]

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, special words included, without the token that begins a document."""
        return self._ask("tokenize", texts=texts)

    def probabilities(self, ids: list[int]) -> list[list[float]]:
        """(l, vocab): for each place of `ids` (l,) what may follow it."""
        return self._ask("probabilities", ids=ids)

    def nats(self, ids: list[int]) -> float:
        """The sum of -log p over ids[1:]."""
        return self._ask("nats", ids=ids)

    def generate(self, ids: list[int], count: int, temperature: float = 0.0, seed: int = 0) -> list[int]:
        """At most `count` ids that follow `ids`, until the end of the document, without what the file suppresses."""
        return self._ask("generate", ids=ids, count=count, temperature=temperature, seed=seed)["ids"]

    def _ask(self, operation: str, **values):
        self._process.stdin.write(json.dumps({"operation": operation, **values}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended in {operation!r} with status {self._process.wait()}")
        return json.loads(line)
