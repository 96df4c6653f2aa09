"""How a local model is asked: the `ollama` client, streaming, with a bound on everything that could last for ever.

    silence      the first word may take `first_timeout` seconds, since the server may have to load the model or to
                 finish somebody else's request first; in the middle of an answer `timeout` seconds are the most
    length       a whole answer may take `max_seconds`, however evenly it trickles in, and `max_characters`
    failures     a server that is busy (503), a dropped connection, a cut stream and broken JSON are asked again, after
                 a pause that doubles; a fault that asking again cannot mend ends the run with a line for the user

The options are the same in every request but for the seed, and so is `keep_alive`: a changed option such as `num_ctx`
makes the server load the model anew, for every document.
"""

from __future__ import annotations

import difflib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import httpx
import ollama

from mamba2_min.errors import UserError

DEFAULT_HOST = "http://127.0.0.1:11434"
CONNECT_SECONDS = 15.0
LONGEST_PAUSE = 30.0
MOST_BYTES = 64 * 2**20  # of one answer as it travels, JSON and thinking included
TOO_LONG = "too long"  # the `done_reason` of an answer that was not read to its end
TRANSIENT = {408, 425, 429, 500, 502, 503, 504, -1}  # -1 is what the client calls an error in the middle of a stream


class NoAnswer(Exception):
    """The server was asked as often as agreed and gave no whole answer. Its text is the reason, in a few words."""


class Stopped(Exception):
    """The user wants to stop: the answer was dropped."""


@dataclass(frozen=True)
class RequestOptions:
    """How to ask; see the head of this file. Times in seconds; `options` go to the model as they are."""

    options: Mapping[str, float] = field(default_factory=dict)
    keep_alive: str | int = "30m"
    timeout: float = 60.0
    first_timeout: float = 300.0
    max_seconds: float = 900.0
    max_characters: int = 100_000
    retries: int = 6
    backoff: float = 1.0


@dataclass(frozen=True)
class Answer:
    """What came back: the `text`, why it ended, and the tokens that it took.

    `done_reason` is `stop` where the model ended it, the server's other word (`length`, ...), or TOO_LONG.
    """

    text: str
    done_reason: str
    eval_count: int | None


class Asker:
    """One model on one server. `ask` may be called from several threads at once.

    Attributes: `model`; `address`, as the user knows it; `tokens`, pieces of text received so far, for the screen.
    """

    def __init__(self, model: str, host: str | None, manner: RequestOptions, stop: threading.Event):
        """`host` None: OLLAMA_HOST, or the client's default. Raises UserError where that is no address."""
        self.model, self.manner, self.tokens = model, manner, 0
        self.address = host or os.environ.get("OLLAMA_HOST") or DEFAULT_HOST
        self._stop = stop
        self._think: bool | None = None
        patience = httpx.Timeout(manner.first_timeout, connect=min(CONNECT_SECONDS, manner.first_timeout))
        try:
            hooks = {"request": [_hurry_the_rest], "response": [self._bound_the_answer]}
            self._client = ollama.Client(self.address, timeout=patience, event_hooks=hooks)
        except (ValueError, httpx.InvalidURL) as error:
            raise UserError(f"{self.address!r} is not the address of a server ({error})") from error

    def check_model(self) -> None:
        """Raises UserError with what to do where no server answers, or where it does not have the model."""
        names = self._names()
        try:
            shown = self._client.show(self.model)
        except ollama.ResponseError as error:
            if error.status_code == 404 and not _has(names, self.model):
                raise self._missing(names) from error
            return
        except (httpx.HTTPError, ConnectionError, *_BROKEN):  # an older server may say less than the client expects
            if not _has(names, self.model):
                raise self._missing(names) from None
            return
        if "thinking" in (shown.capabilities or ()):
            self._think = False  # thoughts would be dropped, so they need not be waited for

    def _names(self) -> list[str]:
        try:
            return [model.model for model in self._client.list().models if model.model]
        except (httpx.ConnectError, httpx.ConnectTimeout, ConnectionError) as error:
            raise self._unreachable() from error
        except (ollama.ResponseError, httpx.HTTPError, *_BROKEN) as error:
            said = error.error if isinstance(error, ollama.ResponseError) else _reason(error)
            raise UserError(f"{self.address} does not answer as an Ollama server does: {_one_line(said)}") from error

    def ask(self, prompt: str, seed: int) -> Answer:
        """The model's answer to `prompt` under `seed`.

        Raises NoAnswer after the last retry, Stopped where the user wants to stop, and UserError where asking again is
        of no use: nobody at the address, no such model, options that the server refuses.
        """
        for attempt in range(self.manner.retries + 1):
            if attempt:
                self._pause(attempt)
            try:
                return self._ask_once(prompt, seed)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                last: Exception = self._unreachable()
            except ollama.ResponseError as error:
                if error.status_code == 404:
                    raise self._missing(self._names()) from error
                if error.status_code not in TRANSIENT:
                    said = _one_line(error.error)
                    raise UserError(f"{self.address} refuses the request ({error.status_code}): {said}") from error
                last = NoAnswer(_status(error.status_code))
            except _TookTooLong:  # the same seed would write the same endless text again
                raise NoAnswer("took too long") from None
            except (httpx.HTTPError, *_BROKEN) as error:
                last = NoAnswer(_reason(error))
        raise last

    def _ask_once(self, prompt: str, seed: int) -> Answer:
        stream = self._client.chat(
            self.model,
            [{"role": "user", "content": prompt}],
            stream=True,
            think=self._think,
            options={**self.manner.options, "seed": seed},
            keep_alive=self.manner.keep_alive,
        )
        try:
            return self._read(stream)
        finally:
            stream.close()  # lets go of the connection at once, upon which the server stops writing

    def _read(self, stream: Iterator[ollama.ChatResponse]) -> Answer:
        pieces, characters = [], 0
        for part in stream:
            if self._stop.is_set():
                raise Stopped
            piece = part.message.content or ""  # thoughts come in part.message.thinking, and stay there
            pieces.append(piece)
            characters += len(piece)
            self.tokens += 1
            if characters > self.manner.max_characters:
                return Answer("", TOO_LONG, None)
            if part.done:
                return Answer("".join(pieces), part.done_reason or "unknown", part.eval_count)
        raise httpx.RemoteProtocolError("the stream ended before the answer did")

    def _pause(self, attempt: int) -> None:
        if self._stop.wait(min(self.manner.backoff * 2 ** (attempt - 1), LONGEST_PAUSE)):
            raise Stopped

    def _bound_the_answer(self, response: httpx.Response) -> None:
        """Called by httpx between the head of an answer and its body: from here on the other timeouts hold."""
        response.request.extensions.get("timeout", {})["read"] = self.manner.timeout
        response.stream = _Bounded(response.stream, self.manner.max_seconds)

    def _unreachable(self) -> UserError:
        return UserError(f"no Ollama server answers at {self.address}: start one with `ollama serve`, or name --host")

    def _missing(self, names: list[str]) -> UserError:
        nearest = _nearest(self.model, names)
        there = (
            f"nearest there: {', '.join(nearest)}" if nearest else "it has " + (", ".join(names[:5]) or "none at all")
        )
        return UserError(f"{self.address} has no model {self.model!r} ({there}); to get it: ollama pull {self.model}")


def _hurry_the_rest(request: httpx.Request) -> None:
    """Called by httpx before each request: only writing takes time, what models there are is known at once."""
    if not request.url.path.endswith("/api/chat"):
        request.extensions["timeout"] = httpx.Timeout(CONNECT_SECONDS).as_dict()


class _TookTooLong(httpx.ReadTimeout):
    """The whole answer, not a silence within it, went over its time."""


class _Bounded(httpx.SyncByteStream):
    """A body that ends with an error when it has taken too long in all, or has grown too large.

    A timeout on silence alone is not enough: a server that sends a space every ten seconds is never silent.
    """

    def __init__(self, stream: httpx.SyncByteStream, seconds: float):
        self._stream, self._end = stream, time.monotonic() + seconds

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for chunk in self._stream:
            size += len(chunk)
            if time.monotonic() > self._end:
                raise _TookTooLong("the answer as a whole took too long")
            if size > MOST_BYTES:
                raise httpx.RemoteProtocolError("the answer is too large")
            yield chunk

    def close(self) -> None:
        self._stream.close()


# What the client lets through when the server's JSON is broken (ValueError, of the parser and of pydantic both) or is
# not the object that it expects.
_BROKEN = (ValueError, TypeError, AttributeError)


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "stalled"
    if isinstance(error, httpx.HTTPError):
        return "cut off by the connection"
    return "broken JSON"


def _status(code: int) -> str:
    return {503: "server busy", 429: "server busy", -1: "error in the stream"}.get(code, f"server error {code}")


def _has(names: list[str], model: str) -> bool:
    """A name without a tag means `:latest`, and letter case does not matter, as for the server itself."""
    wanted = _full(model)
    return any(_full(name) == wanted for name in names)


def _full(name: str) -> str:
    return (name if ":" in name.rpartition("/")[2] else f"{name}:latest").casefold()


def _nearest(model: str, names: list[str], most: int = 3) -> list[str]:
    """The names of which `model` is a part, such as its other tags, then those that are spelled nearly so."""
    stem = model.casefold().partition(":")[0]
    tags = [name for name in names if stem and stem in name.casefold()]
    close = difflib.get_close_matches(model, names, most, 0.4)
    # A tag of its own hides how close the rest of the name is: compare without it as well.
    bare: dict[str, str] = {name.partition(":")[0]: name for name in names}
    close += [bare[name] for name in difflib.get_close_matches(stem, list(bare), most, 0.5)]
    return list(dict.fromkeys(tags + close))[:most]


def _one_line(text: object, most: int = 200) -> str:
    return " ".join(str(text).split())[:most]
