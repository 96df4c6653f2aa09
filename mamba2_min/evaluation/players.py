"""Who writes for a referee: a run of this package or a model behind Ollama, with one method for both."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mamba2_min import files
from mamba2_min.errors import UserError

if TYPE_CHECKING:
    from mamba2_min.datagen.client import OllamaClient
    from mamba2_min.inference.completer import Completer

OLLAMA = "ollama:"
START = "<start>"  # between a request and its answer, in documents of the data generator
_CONTINUE = (
    "Below is the beginning of a text. Continue it, in its style and language, as its author would. Write only what "
    "follows the beginning: do not repeat it, and say nothing about it.\n\n"
)


@dataclass(frozen=True)
class Writing:
    """How all players write: at most `max_tokens`, at `temperature`; `requests`: prompts are requests to be answered,
    not beginnings to be continued; `host`: the Ollama server; `device`: for runs."""

    max_tokens: int = 150
    temperature: float = 0.7
    requests: bool = False
    host: str | None = None
    device: str = "auto"


class Player(Protocol):
    """A model under the name that the user gave it."""

    name: str

    def identity(self) -> str:
        """What tells this model from another one under the same name. Raises UserError where it is not there."""

    def write(self, prompt: str, seed: int) -> str:
        """Its text for a prompt. Raises NoAnswer (mamba2_min.datagen.client) where there is none."""


def player(name: str, writing: Writing) -> Player:
    """The player that a name stands for: `ollama:NAME`, or the folder of a run."""
    if name.startswith(OLLAMA):
        return OllamaPlayer(name, writing)
    return RunPlayer(name, writing)


class RunPlayer:
    """A run of this package. It is loaded when it first writes."""

    def __init__(self, name: str, writing: Writing):
        self.name, self._writing = name, writing
        self._completer: Completer | None = None

    def identity(self) -> str:
        from mamba2_min.checkpoints import checkpoint

        digest = hashlib.sha256()
        for part in (checkpoint.WEIGHTS, checkpoint.TOKENIZER):
            with files.open_regular(Path(self.name) / part) as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()

    def write(self, prompt: str, seed: int) -> str:
        from mamba2_min.ops.sampling import Sampler

        completer = self._loaded()
        if self._writing.requests:
            prompt += START
        sampler = Sampler(temperature=self._writing.temperature, seed=seed)
        return "".join(completer.complete(prompt, self._writing.max_tokens, sampler))

    def _loaded(self) -> Completer:
        if self._completer is None:
            from mamba2_min import devices
            from mamba2_min.inference.completer import Completer

            self._completer = Completer.load(self.name, devices.pick_device(self._writing.device))
            if self._writing.requests and START not in self._completer.tokenizer.special_words:
                raise UserError(f"{self.name} was not trained on requests: its vocabulary has no word {START}")
        return self._completer


class OllamaPlayer:
    """A model behind Ollama."""

    def __init__(self, name: str, writing: Writing):
        self.name, self._writing = name, writing
        options = {"temperature": writing.temperature, "num_predict": writing.max_tokens, "num_ctx": 4096}
        self._client = ollama_client(name.removeprefix(OLLAMA), writing.host, options)

    def identity(self) -> str:
        self._client.check_model()
        return self._client.model

    def write(self, prompt: str, seed: int) -> str:
        from mamba2_min.datagen.client import TOO_LONG, NoAnswer
        from mamba2_min.datagen.thoughts import without_thoughts

        answer = self._client.ask(prompt if self._writing.requests else _CONTINUE + prompt, seed)
        if answer.done_reason == TOO_LONG:
            raise NoAnswer(TOO_LONG)
        return without_thoughts(answer.text).strip("\n")


def ollama_client(model: str, host: str | None, options: dict[str, float]) -> OllamaClient:
    """A client of the generator's, with its bounds on waiting. Raises UserError for an address that is none."""
    from mamba2_min.datagen.client import OllamaClient, RequestOptions

    return OllamaClient(model, host, RequestOptions(options), threading.Event())
