"""How a local model is asked: the `ollama` client, streaming, with a limit on everything that could last forever.

    silence      the first word may take `first_timeout` seconds, since the server may have to load the model or to
                 finish another request first; within an answer, silence may last `timeout` seconds
    length       a whole answer may take `max_seconds`, even if it never pauses, and `max_characters`
    failures     after a status of 500 or more, 408, 425 or 429, a dropped connection, a cut stream or broken JSON, the
                 request is repeated after a pause that doubles. What repeating cannot fix ends the run with a line
                 for the user: any other status, or words such as "model requires more system memory", heard twice

The server's own words are quoted, in whatever form they come. The options, except the seed, and `keep_alive` are the
same in every request: a changed option such as `num_ctx` would make the server load the model again for every document.
"""

from __future__ import annotations

import contextlib
import difflib
import html
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeVar

import httpx

from mamba2_min.datagen.address import connect, default_address, ollama, parse_address
from mamba2_min.errors import UserError
from mamba2_min.printable import one_line

CONNECT_SECONDS = 15.0
LONGEST_PAUSE = 30.0
MOST_BYTES = 64 << 20  # of one answer as it travels, JSON and thoughts included
MOST_BYTES_OF_AN_ERROR = 1 << 20
MOST_TOKENS = 1 << 53  # that a server may claim to have counted
MOST_MODELS = 1000  # of a server's list; what is called by a longer name is not looked for
TOO_LONG = "too long"  # the `done_reason` of an answer that was not read to its end
IN_THE_STREAM = -1  # the status of an error in the middle of an answer
TRANSIENT = {408, 425, 429, IN_THE_STREAM}  # and 500 and above

# What a server says if asking again is useless: the model does not fit or is broken, or a quota is used up.
_HOPELESS = re.compile(
    r"requires? more .{0,20}memory|not enough .{0,20}memory|insufficient .{0,20}memory|out of memory"
    r"|(?:unable|failed) to load|error loading|unsupported|not supported|unknown model architecture|magic|corrupt"
    r"|no space left|usage limit|quota|upgrade|unauthorized|forbidden",
    re.IGNORECASE,
)

T = TypeVar("T")


class NoAnswer(Exception):
    """All retries failed to get a complete answer. The message is the reason, in a few words."""


class Stopped(Exception):
    """The user stopped the run: the answer was dropped."""


@dataclass(frozen=True)
class RequestOptions:
    """How to ask; see the top of this file. Times are in seconds; `options` go to the model unchanged."""

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


class OllamaClient:
    """One model on one server. `ask` may be called from several threads at once.

    Attributes: `model`; `address`, as the user knows it; `url`, the same in full; `tokens`, pieces of text received so
    far, for the screen.
    """

    def __init__(self, model: str, host: str | None, request: RequestOptions, stop: threading.Event):
        """`host` None: OLLAMA_HOST, or this machine. `stop`: set to have answers dropped. Raises UserError."""
        self.model, self.request, self.tokens = model, request, 0
        address = parse_address(host or default_address())
        self.address, self.url = address.shown, address.url
        self._stop = stop
        self._think: dict[str, Any] = {}
        self._retrying: set[tuple[str, int]] = set()
        patience = httpx.Timeout(request.first_timeout, connect=min(CONNECT_SECONDS, request.first_timeout))
        self._client = connect(address, patience, {"request": [_limit_waiting], "response": [self._check_response]})

    @property
    def retrying(self) -> int:
        """How many requests under way have failed at least once."""
        return len(self._retrying)

    def check_model(self) -> None:
        """Raises UserError with what to do where no server answers, or where it does not have the model."""
        try:
            names = self._names()
        except NoAnswer as error:
            raise UserError(f"{self.address} does not tell which models it has: {error}") from error
        try:
            shown = self._client.show(self.model)
        except (_Failed, httpx.HTTPError, ConnectionError, *_BROKEN) as error:
            # An older server may say less than the client expects; what matters is whether it lists the model.
            if not _has(names, self.model) and (not isinstance(error, _Failed) or error.status == 404):
                raise self._missing(names) from error
            return
        if "thinking" in (getattr(shown, "capabilities", None) or ()):  # clients before 0.5 do not tell
            self._think = {"think": False}  # thoughts would be dropped, so they need not be waited for

    def ask(self, prompt: str, seed: int) -> Answer:
        """The model's answer to `prompt` under `seed`.

        Raises NoAnswer after the last retry, Stopped where the user wants to stop, and UserError where asking again is
        of no use: nobody at the address, no such model, options that the server refuses.
        """
        key = (prompt, seed)
        try:
            return self._retry(lambda: self._ask_once(prompt, seed), key)
        finally:
            self._retrying.discard(key)

    def _retry(self, call: Callable[[], T], key: tuple[str, int] | None = None) -> T:
        """`call()`, and again after a pause where it failed. Without a `key`, only a status counts as passing."""
        for attempt in range(self.request.retries + 1):
            if attempt:
                if key:
                    self._retrying.add(key)
                self._pause(attempt)
            try:
                return call()
            except _Failed as error:
                if key and error.status == 404:
                    names = self._names()
                    if not _has(names, self.model) or re.search(r"model.*not found", error.words):
                        raise self._missing(names) from error
                last = self._failure(error, again=attempt > 0 or not self.request.retries)
            except _TookTooLong:  # the same seed would write the same endless text again
                raise NoAnswer("took too long") from None
            except _TooLarge:
                raise NoAnswer("larger than any text") from None
            except httpx.TooManyRedirects as error:
                raise UserError(f"{self.address} redirects in a circle: no answer is at its end") from error
            except (httpx.HTTPError, *_BROKEN) as error:
                if not key:
                    raise
                unreachable = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
                last = self._unreachable(error) if unreachable else NoAnswer(_reason(error))
        raise last

    def _failure(self, error: _Failed, again: bool) -> Exception:
        """The exception for an unsuccessful answer. Raises UserError if asking again is useless."""
        if error.status == HTTPStatus.OK:
            raise UserError(f"{self.address} does not answer as an Ollama server does: {error.words}") from error
        if error.status < 500 and error.status not in TRANSIENT:
            raise UserError(f"{self.address} refuses the request ({error.status}): {error.words}") from error
        if again and _HOPELESS.search(error.words):
            raise UserError(f"{self.address} cannot answer: {error}") from error
        return NoAnswer(str(error))

    def _names(self) -> list[str]:
        try:
            models = self._retry(self._client.list).models
        except (httpx.ConnectError, httpx.ConnectTimeout, ConnectionError) as error:
            raise self._unreachable(error) from error
        except (httpx.HTTPError, *_BROKEN) as error:
            raise UserError(f"{self.address} does not answer as an Ollama server does: {_reason(error)}") from error
        return [model.model for model in models[:MOST_MODELS] if model.model and len(model.model) <= 200]

    def _ask_once(self, prompt: str, seed: int) -> Answer:
        stream = self._client.chat(
            self.model,
            [{"role": "user", "content": prompt}],
            stream=True,
            options={**self.request.options, "seed": seed},
            keep_alive=self.request.keep_alive,
            **self._think,
        )
        # Closing lets go of the connection at once, upon which the server stops writing.
        with contextlib.closing(stream):  # type: ignore[type-var]
            try:
                return self._read(stream)
            except ollama.ResponseError as error:
                raise _Failed(IN_THE_STREAM, one_line(error.error)) from error

    def _read(self, stream: Iterator[ollama.ChatResponse]) -> Answer:
        pieces, characters = [], 0
        for part in stream:
            if self._stop.is_set():
                raise Stopped
            piece = part.message.content or ""  # thoughts come in part.message.thinking, and stay there
            pieces.append(piece)
            characters += len(piece)
            self.tokens += 1
            if characters > self.request.max_characters:
                return Answer("", TOO_LONG, None)
            if part.done:
                count = part.eval_count if 0 <= (part.eval_count or 0) < MOST_TOKENS else None
                return Answer("".join(pieces), part.done_reason or "unknown", count)
        raise httpx.ReadError("the stream ended before the answer did")

    def _pause(self, attempt: int) -> None:
        if self._stop.wait(min(self.request.backoff * 2.0 ** min(attempt - 1, 30), LONGEST_PAUSE)):
            raise Stopped

    def _check_response(self, response: httpx.Response) -> None:
        """Called by httpx between an answer's head and its body: limits the body, and raises for an error status.

        The client itself would drop an error's words if they do not have the form that it expects.
        """
        is_chat = response.request.url.path.endswith("/api/chat")
        if is_chat:
            response.request.extensions.get("timeout", {})["read"] = self.request.timeout
        assert isinstance(response.stream, httpx.SyncByteStream)
        response.stream = _Bounded(response.stream, self.request.max_seconds if is_chat else CONNECT_SECONDS)
        if response.has_redirect_location:
            return
        encoding = response.headers.get("content-encoding", "identity").lower()
        if encoding != "identity":  # a few kilobytes can unfold to gigabytes
            raise _Failed(response.status_code, f"the answer is compressed ({encoding}), which was not asked for")
        if response.status_code != HTTPStatus.OK or "html" in response.headers.get("content-type", ""):
            raise _Failed(response.status_code, _words(response))

    def _unreachable(self, error: BaseException) -> UserError:
        said = error if isinstance(error, httpx.HTTPError) else error.__context__  # the client's own words are longer
        return UserError(
            f"no Ollama server answers at {self.address} ({one_line(said or error)}): start one with `ollama serve`, "
            "or name --host"
        )

    def _missing(self, names: list[str]) -> UserError:
        nearest = _nearest(self.model, names)
        there = (
            f"nearest there: {', '.join(nearest)}" if nearest else "it has " + (", ".join(names[:5]) or "none at all")
        )
        return UserError(f"{self.address} has no model {self.model!r} ({there}); to get it: ollama pull {self.model}")


# --- what can go wrong ---


class _Failed(Exception):
    """An unsuccessful answer: its `status`, and the server's own `words`."""

    def __init__(self, status: int, words: str):
        where = "error in the stream" if status == IN_THE_STREAM else f"server error {status}"
        super().__init__(f"{where}: {words}")
        self.status, self.words = status, words


class _TookTooLong(httpx.ReadTimeout):
    """The whole answer took too long, not a silence within it."""


class _TooLarge(httpx.ReadError):
    """The answer went over MOST_BYTES."""


class _Bounded(httpx.SyncByteStream):
    """A body that ends with an error if it takes too long in total, or becomes too large.

    A timeout for silence is not enough: a server that sends a space every ten seconds is never silent.
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
                raise _TooLarge("the answer is too large")
            yield chunk

    def close(self) -> None:
        self._stream.close()


# What the client lets through when the server's JSON is broken (ValueError, of the parser and of pydantic both), nested
# too deeply, or not the object that it expects.
_BROKEN = (ValueError, TypeError, AttributeError, RecursionError)


def _reason(error: Exception) -> str:
    """What went wrong with a connection or an answer, in a few words."""
    if isinstance(error, httpx.TimeoutException):
        return "stalled"
    if isinstance(error, httpx.ProxyError):
        return f"refused by the proxy: {one_line(error, 100)}"
    if isinstance(error, httpx.NetworkError) or re.search("closed|disconnected", str(error)):
        return "cut off by the connection"
    if isinstance(error, httpx.HTTPError):
        return f"not as HTTP has it: {one_line(error, 100)}"
    return "broken JSON" if isinstance(error, json.JSONDecodeError) else "not in the form of an Ollama server"


def _words(response: httpx.Response) -> str:
    """What the body of an error says: in JSON as Ollama and others have it, on a web page, or as plain text."""
    body = b""
    with contextlib.suppress(httpx.HTTPError):
        for chunk in response.stream:  # type: ignore[union-attr]
            body += chunk
            if len(body) > MOST_BYTES_OF_AN_ERROR:
                break
    text = body[:MOST_BYTES_OF_AN_ERROR].decode("utf-8", "replace")
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        for name in ("error", "message", "detail"):
            if isinstance(value, dict) and value.get(name):
                value = value[name]
        text = value if isinstance(value, str) else text
    if re.match(r"\s*<", text):
        title = re.search(r"<title[^>]*>([^<]*)", text, re.IGNORECASE)
        text = html.unescape(title[1] if title else re.sub(r"<[^>]*>", " ", text))
    try:
        return one_line(text) or HTTPStatus(response.status_code).phrase
    except ValueError:
        return "no words with it"


def _limit_waiting(request: httpx.Request) -> None:
    """Called by httpx before each request: only writing takes time, what models there are is known at once."""
    if not request.url.path.endswith("/api/chat"):
        request.extensions["timeout"] = httpx.Timeout(CONNECT_SECONDS).as_dict()


# --- names of models ---


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
