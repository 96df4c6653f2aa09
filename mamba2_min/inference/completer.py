"""The completer: it reads a prompt into a state, and writes words from that state, each at the same cost.

It does not depend on a terminal; `run.py` and notebooks use it alike:

    completer = Completer.load("runs/demo")
    for piece in completer.complete("Once upon a time", 100, Sampler(seed=1)):
        print(piece, end="", flush=True)
    for piece in completer.continue_(100):
        print(piece, end="", flush=True)

Between two tokens it keeps the model's state, the one token that the model has not read yet, and a few recent ids for
the repetition penalty: nothing that grows. And nothing is lost: the texts of `complete` and of every `continue_` after
it, joined, are what one longer `complete` would have written, wherever and why ever the first one stopped.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba2_min import validate
from mamba2_min.checkpoints import checkpoint
from mamba2_min.data.tokenizer import StreamDecoder, WordTokenizer
from mamba2_min.errors import UserError
from mamba2_min.inference import stepping  # noqa: F401  the fast forms of `Mamba2LM.step`
from mamba2_min.inference.decoding import lay_out_columns
from mamba2_min.inference.known_words import KnownWords, Letters
from mamba2_min.inference.quantize import load_quantized
from mamba2_min.models.mamba2 import Mamba2LM, State
from mamba2_min.ops.sampling import Sampler

_READ = 1024  # tokens of a prompt that are read at once: little memory, and progress that can be shown


@dataclass
class Stats:
    """What a text has cost so far. Seconds are those of the model and the sampler, without those of the display."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0  # written since the prompt, over all continuations
    seconds: float = 0.0
    state_bytes: int = 0

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / max(self.prompt_seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


class Completer:
    """Completes text with a model and its tokenizer, and can go on from where it stopped.

    `stopped_by` says why the last text ended: "end" (of the document), "stop" (one of the stop texts), "length"
    (`max_tokens`) or "interrupted" (Ctrl-C, the iterator was closed, or it is still being read); None before the first.
    `stats` are those of the last prompt and all that followed it. `on_read(done, all)`, if set, is told how many tokens
    of a long prompt are read. The model is put in evaluation mode.
    Raises UserError where the tokenizer is not the model's.
    """

    def __init__(self, model: Mamba2LM, tokenizer: WordTokenizer, known_words: bool = False):
        """With `known_words` only words of the vocabulary and of the prompt are written (known_words.py)."""
        if len(tokenizer) != model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens and the model {model.config.vocab_size}: "
                "they are not of one run"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.known_words = known_words
        self.on_read: Callable[[int, int], None] | None = None
        self.stopped_by: str | None = None
        self.stats = Stats()
        self._session: _Session | None = None
        self._stream: Generator[str, None, None] | None = None

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu", weights: str | None = None) -> Completer:
        """The completer of a run's folder. Raises UserError for whatever is missing, broken or of another run.

        weights: "int8" or "bf16" for narrower ones (quantize.py), on a CPU.
        """
        if weights is None:
            model = lay_out_columns(Mamba2LM.from_pretrained(folder).to(device))
        elif (kind := torch.device(device).type) != "cpu":
            raise UserError(f"{weights} weights are for a CPU, not for {kind}; take the device cpu")
        else:
            model = load_quantized(folder, weights)
        return cls(model, WordTokenizer.load(Path(folder) / checkpoint.TOKENIZER))

    def complete(self, prompt: str, max_tokens: int, sampler: Sampler, stop: Sequence[str] = ()) -> Iterator[str]:
        """Reads the prompt at once, then yields the text that follows it, piece by piece, as it is written.

        The prompt begins a document, even if it is empty: the model first reads an end-of-document token, as it did in
        training. A space at the prompt's end counts as the space before the next word, where the tokenizer puts it. The
        prompt is always text: nothing in it becomes the end-of-document token. A stop text is not yielded, and is
        found even if it spans several tokens. Raises UserError for a lone surrogate, ValueError for a bad `max_tokens`
        or `stop`. If this is interrupted before it returns, the previous text can still be continued.
        """
        stop = _checked(max_tokens, stop)
        word_is_next = self.tokenizer.pattern != "whitespace" and prompt.endswith(" ")
        try:
            ids = self.tokenizer.encode_prompt(prompt[:-1] if word_is_next else prompt)
        except ValueError as error:
            raise UserError(f"the prompt is no text: {error}") from None
        self._read([self.tokenizer.eos_id, *ids], None, sampler, stop, word_is_next)
        return self._start(max_tokens)

    def reply(
        self, ids: Sequence[int], max_tokens: int, sampler: Sampler, stop: Sequence[str] = (), drop_space: bool = False
    ) -> Iterator[str]:
        """Reads the tokens `ids` after all that was read and written before, then yields what follows, to its end.

        This is one turn of a conversation: nothing is read twice, and an answer that was cut off is ended first. The
        first turn begins a document. drop_space: leave out the first character, the space before an answer's first
        word. Raises ValueError for a bad `max_tokens` or `stop`.
        """
        stop = _checked(max_tokens, stop)
        before, eos = self._session, self.tokenizer.eos_id
        unread = [] if before is None else [t for t in (before.unread,) if t is not None and t != eos]
        self._read([*unread, eos, *ids], None if before is None else before.state, sampler, stop, drop_space=drop_space)
        return self._start(max_tokens)

    @property
    def memory(self) -> tuple[State, int] | None:
        """The state and the token that it has not read yet, from which a conversation goes on. None before the
        first."""
        s = self._session
        return None if s is None else (s.state, self.tokenizer.eos_id if s.unread is None else s.unread)

    def remember(self, state: State | None, unread: int = 0) -> None:
        """Goes on from a state and an unread token, as `memory` gives them; None forgets everything."""
        self._session, self._stream = None, None
        if state is not None:
            self._device = next(self.model.parameters()).device
            nothing = torch.zeros(self.model.config.vocab_size)
            decoder = StreamDecoder(self.tokenizer)
            known = KnownWords(self.tokenizer, self._letters)
            self._session = _Session(state, nothing, deque(), decoder, Sampler(), (), False, known, unread)

    def _read(
        self,
        ids: list[int],
        state: State | None,
        sampler: Sampler,
        stop: Sequence[str],
        word_is_next: bool = False,
        drop_space: bool = False,
    ) -> None:
        """Begins a session: reads `ids` from `state`, or from the start where it is None."""
        recent = deque((i for i in ids if i != self.tokenizer.eos_id), maxlen=sampler.window)
        self._device = next(self.model.parameters()).device
        started = time.perf_counter()
        with torch.inference_mode():
            for done in range(0, len(ids), _READ):
                if self.on_read and len(ids) > _READ:
                    self.on_read(done, len(ids))
                part = torch.tensor([ids[done : done + _READ]], device=self._device)
                logits, state = self.model.prefill(part) if state is None else self.model.prefill(part, state)
            logits = logits[0].cpu()  # (vocab,); waits for the device, so that the time measured is the prompt's
            if word_is_next:
                logits = logits.masked_fill(~self._begins_with_space, -torch.inf)
        assert state is not None  # there is always something to read
        self.stats = Stats(len(ids), time.perf_counter() - started, state_bytes=state.nbytes)
        decoder = StreamDecoder(self.tokenizer)
        known = KnownWords(self.tokenizer, self._letters, ids if self.known_words else ())
        self._session = _Session(state, logits, recent, decoder, sampler, stop, word_is_next or drop_space, known)

    def continue_(
        self, max_tokens: int, sampler: Sampler | None = None, stop: Sequence[str] | None = None
    ) -> Iterator[str]:
        """Continues exactly where the last text stopped, without reading anything again; yields text as `complete`
        does.

        `sampler` and `stop` are the last ones unless given. Text that a stop or an interruption held back comes first;
        after the end of a document, the next one begins. Raises UserError where there is nothing to continue.
        """
        if self._session is None:
            raise UserError("there is nothing to continue yet; give a prompt first")
        session = self._session
        stop = session.stop if stop is None else stop
        session.stop = _checked(max_tokens, stop)
        session.sampler = sampler or session.sampler
        session.recent = deque(session.recent, maxlen=session.sampler.window)
        return self._start(max_tokens)

    def _start(self, max_tokens: int) -> Iterator[str]:
        if self._stream is not None:
            self._stream.close()  # two iterators over one state would each get half of the words
        assert self._session is not None
        self.stopped_by = "interrupted"
        self._stream = self._write(self._session, max_tokens)
        return self._stream

    def _write(self, session: _Session, max_tokens: int) -> Generator[str, None, None]:
        ctrl_c = _DeferredCtrlC()
        for k in range(max_tokens + 1):
            with ctrl_c:
                if k == 0:
                    stopped_by = "stop" if session.text.resume(session.stop) else None
                else:
                    stopped_by = self._next_token(session)
                if k == max_tokens and not stopped_by:
                    stopped_by = "length"
                if stopped_by:
                    self.stopped_by = stopped_by
                    if stopped_by != "stop":
                        session.text.release()
            if session.text.ready:
                yield from session.text.hand_over()
            ctrl_c.deliver()
            if stopped_by:
                return

    @torch.inference_mode()
    def _next_token(self, session: _Session) -> str | None:
        """Writes one token into the session's text; returns why the text ends with it, or None."""
        started = time.perf_counter()
        if session.unread is not None:
            logits, session.state = self.model.step(torch.tensor([session.unread], device=self._device), session.state)
            session.logits, session.unread = logits[0], None
        logits = session.known.only(session.logits) if self.known_words else session.logits
        token = session.unread = session.sampler.pick(logits, session.recent)
        session.known.feed(token)
        self.stats.seconds += time.perf_counter() - started
        self.stats.tokens += 1

        ended = token == self.tokenizer.eos_id
        piece = session.decoder.feed(token)
        if ended:
            piece += session.decoder.flush()
        else:
            session.recent.append(token)  # an end of a document does not count as a repetition
        if session.drop_space and piece:
            piece, session.drop_space = piece[1:], False
        if session.text.add(piece, session.stop):
            return "stop"
        return "end" if ended else None

    @cached_property
    def _begins_with_space(self) -> Tensor:
        """(vocab,) bool: the tokens that may follow a space."""
        return torch.tensor([self.tokenizer.token_bytes(i)[:1] == b" " for i in range(len(self.tokenizer))])

    @cached_property
    def _letters(self) -> Letters:
        return Letters(self.tokenizer)


class _Text:
    """The text on its way out. What may be the beginning of a stop text is held back until that is known."""

    def __init__(self) -> None:
        self.ready = ""  # may be yielded
        self._tail = ""  # the last characters, as many as may belong to a stop text
        self._passed = 0  # how many of them have gone through `ready`
        self._stop_end = 0  # where in the tail the stop text ends that was found

    def add(self, piece: str, stop: Sequence[str]) -> bool:
        """Adds a piece. True if it completes a stop text; then only the text before that becomes ready."""
        self._tail += piece
        found = [(at, -len(s)) for s in stop if (at := self._tail.find(s, max(0, self._passed - len(s) + 1))) >= 0]
        if found:
            at, minus_length = min(found)  # the first, and the longest of those
            self._stop_end = at - minus_length
            self._pass(at)
            return True
        longest = max(map(len, stop), default=1)
        waiting = min(longest - 1, len(self._tail))
        while waiting and not any(s.startswith(self._tail[-waiting:]) for s in stop):
            waiting -= 1
        self._pass(len(self._tail) - waiting)
        self._forget(max(0, len(self._tail) - longest + 1))
        return False

    def release(self) -> None:
        """Makes all that was held back ready, because nothing comes after it now."""
        self._pass(len(self._tail))

    def resume(self, stop: Sequence[str]) -> bool:
        """Makes the stop text that was found ready, and searches what came after it, as `add` does."""
        self._pass(self._stop_end)
        self._forget(self._stop_end)
        self._stop_end = 0
        return self.add("", stop)

    def hand_over(self) -> Generator[str, None, None]:
        """Yields what is ready. It counts as handed over even if the iterator is never asked for more."""
        try:
            yield self.ready
        finally:
            self.ready = ""

    def _pass(self, end: int) -> None:
        self.ready += self._tail[self._passed : end]
        self._passed = max(self._passed, end)

    def _forget(self, count: int) -> None:
        self._tail = self._tail[count:]
        self._passed = max(0, self._passed - count)


@dataclass
class _Session:
    """The state of a text. The model's state has read every token except the last one written, which is `unread`."""

    state: State
    logits: Tensor  # (vocab,), for the token after those that the state has read
    recent: deque[int]  # for the repetition penalty
    decoder: StreamDecoder
    sampler: Sampler
    stop: Sequence[str]
    drop_space: bool  # the prompt already ends with the space that the next token begins with
    known: KnownWords
    unread: int | None = None
    text: _Text = field(default_factory=_Text)


class _DeferredCtrlC:
    """Defers Ctrl-C within a `with` block, because a state that is half updated could not be continued.

    `deliver` then does what the Ctrl-C would have done. Only the main thread gets Ctrl-C; in others this does nothing.
    """

    def __init__(self) -> None:
        self._came = False
        self._handler: Any = None

    def __enter__(self) -> None:
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            self._handler = handler
            signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *exception: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)

    def deliver(self) -> None:
        if self._came:
            self._came = False
            self._handler(signal.SIGINT, None)

    def _note(self, signum: int, frame: object) -> None:
        self._came = True


def _checked(max_tokens: int, stop: Sequence[str]) -> tuple[str, ...]:
    validate.integer("max_tokens", max_tokens, 0, 2**63 - 1)
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in stop):
        raise ValueError("a stop text cannot be empty")
    return stop
