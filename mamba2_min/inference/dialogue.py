"""The completer at a terminal: a line is a prompt or, if it begins with "/", a command."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from mamba2_min import console, validate
from mamba2_min.errors import UserError, printable
from mamba2_min.inference.terminal import BOLD, LineEditor, Status, WrappedText, remark
from mamba2_min.inference.writing import OFF, SETTINGS, in_words, shown

if TYPE_CHECKING:  # importing torch takes seconds, and `run.py --help` should not wait for it
    from mamba2_min.inference.completer import Completer
    from mamba2_min.ops.sampling import Sampler

_SHOWN_PROMPT = 1000  # characters; of a longer prompt the terminal shows the end
ACTIONS = {
    "/continue": "goes on exactly where the text stopped",
    "/stats": "speeds, and the size of the model's state",
    "/help": "shows this",
    "/quit": "leaves, as exit and Ctrl-D do",
}


class Dialogue:
    """Answers what is typed until the user leaves."""

    actions = ACTIONS
    greeting = "Type the beginning of a text, or /help. Ctrl-C stops the words, Ctrl-D leaves."
    any_other_line = (
        "Any other line is the beginning of a text;\nwith an empty one, the model begins a document itself."
    )

    def __init__(
        self,
        completer: Completer,
        sampler: Sampler,
        max_tokens: int,
        stop: Sequence[str],
        suggestions: Sequence[str] = (),
    ):
        self.completer, self.sampler, self.max_tokens, self.stop = completer, sampler, max_tokens, stop
        self.suggestions = suggestions

    def run(self) -> None:
        remark(f"\n{self.greeting}")
        if self.suggestions:
            remark("For example (Tab completes):\n" + "\n".join(f"  {line}" for line in self.suggestions))
        with LineEditor([*SETTINGS, *self.actions, *self.suggestions]) as editor:
            while True:
                try:
                    print()
                    line = editor.read("> ")
                    if line.strip(" \t") in ("exit", "/exit", "/quit"):
                        return
                    self.answer(line)
                except EOFError:
                    print()
                    return
                except KeyboardInterrupt:
                    remark("\n(Ctrl-D or /quit leaves)")
                except UnicodeDecodeError:
                    print("error: that line is not UTF-8")
                except NotImplementedError:  # a notebook that is run without a person
                    raise UserError("nobody can type here; give --prompt TEXT") from None
                except (UserError, FloatingPointError) as error:
                    print(f"error: {printable(str(error))}")

    def answer(self, line: str) -> None:
        """Does what one line asks for. Raises UserError, FloatingPointError or KeyboardInterrupt; the state stays."""
        command, _, value = line.strip().partition(" ")
        if not line.startswith("/") or "\n" in line:
            sampler = dataclasses.replace(self.sampler)  # begins with its seed again
            with reading(self.completer):
                pieces = self.completer.complete(line, self.max_tokens, sampler, self.stop)
            self.sampler = sampler
            self._write(pieces, line)
        elif command in SETTINGS:
            self._set(command, value.strip())
        elif command == "/continue":
            self._write(self.completer.continue_(self.max_tokens, self.sampler))
        elif command == "/stats":
            self._print_stats()
        elif command == "/help":
            commands = [(name, self._value(name), what) for name, (_, _, what) in SETTINGS.items()]
            for name, value, what in [*commands, *((name, "", what) for name, what in self.actions.items())]:
                remark(f"  {name:16}{value:>5}  {what}", indent=25)
            remark(f'"off" as a value switches one off. {self.any_other_line}')
        else:
            near = difflib.get_close_matches(command, [*SETTINGS, *self.actions], n=1)
            hint = f"did you mean {near[0]}?" if near else "see /help (a space before the / makes it a text)"
            remark(f"there is no {printable(command[:40])}; {hint}")

    def _write(self, pieces: Iterable[str], prompt: str = "") -> None:
        try:
            show(pieces, prompt)
        except KeyboardInterrupt:
            print()
        remark(f"[{self._how_it_ended()}]")

    def _how_it_ended(self) -> str:
        further = "begins another" if self.completer.stopped_by == "end" else "goes on"
        return f"{how_it_ended(self.completer)}; /continue {further}"

    def _set(self, command: str, text: str) -> None:
        if not text:
            remark(f"{command[1:]} is {self._value(command)}")
            return
        name, read, _ = SETTINGS[command]
        try:
            value = OFF[name] if text == "off" and name in OFF else read(text)
        except ValueError:
            value = text  # of the wrong type: it gets the same answer as any wrong value
        try:
            if name == "max_tokens":
                self.max_tokens = validate.integer("length", value, 1, 2**63 - 1)
            elif name == "known_words":
                self.completer.known_words = validate.one_of("known_words", value, ("on", "off")) == "on"
            else:
                self.sampler = self.sampler.adjusted(**{name: value})
        except ValueError as error:
            remark(f"{printable(in_words(error))}; it stays {self._value(command)}")
        else:
            remark(f"{command[1:]} is {self._value(command)}")

    def _value(self, command: str) -> str:
        name = SETTINGS[command][0]
        if name == "known_words":
            return "on" if self.completer.known_words else "off"
        return str(self.max_tokens) if name == "max_tokens" else shown(self.sampler, name)

    def _print_stats(self) -> None:
        stats = self.completer.stats
        remark(f"prompt  {stats.prompt_tokens:,} tokens, {stats.prompt_tokens_per_second:,.0f} tokens/s")
        remark(f"text    {stats.tokens:,} tokens, {stats.tokens_per_second:,.0f} tokens/s")
        remark(f"state   {stats.state_bytes / 1024:,.0f} KiB, after the first token as after the last")


@contextlib.contextmanager
def reading(completer: Completer) -> Iterator[None]:
    """Shows how much of a long prompt is read, where it is read within this context."""
    with Status() as status:
        completer.on_read = lambda done, count: status(f"reading the prompt: {done:,} of {count:,} tokens")
        try:
            yield
        finally:
            completer.on_read = None


def show(pieces: Iterable[str], prompt: str = "") -> None:
    """Shows a prompt and the text that follows as it comes, with a line end after it. Control characters are shown as
    escapes, and a terminal's lines break between words."""
    text, piece = WrappedText(), "\n"
    try:
        text.write(prompt if len(prompt) <= _SHOWN_PROMPT else "…" + prompt[-_SHOWN_PROMPT:], BOLD)
        for piece in _until_closed(pieces):
            text.write(piece)
    finally:
        text.finish()
    if prompt or not piece.endswith("\n"):
        print(flush=True)


def write_out(pieces: Iterable[str]) -> None:
    """Writes a text to a file or a pipe as it comes: the text itself, with a line end after it."""
    piece = "\n"
    for piece in _until_closed(pieces):
        print(piece, end="", flush=True)
    if not piece.endswith("\n"):
        print(flush=True)


def _until_closed(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces, until nobody reads the output any more."""
    for piece in pieces:
        yield piece
        if console.failure():
            return


def how_it_ended(completer: Completer) -> str:
    stats = completer.stats
    ended = {
        "end": "the document ends here",
        "stop": "a stop text follows",
        "length": "cut at the length",
        "interrupted": "interrupted",
    }
    return f"{stats.tokens:,} tokens at {stats.tokens_per_second:,.0f} a second, {ended[completer.stopped_by or '']}"
