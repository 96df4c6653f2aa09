#!/usr/bin/env python3
"""Complete text with a trained model: once for --prompt or for standard input, otherwise in a dialogue.

python run.py                                          # the completer
python run.py --prompt "Once upon a time"
echo "Once upon a time" | python run.py > story.txt    # standard output holds the completion alone
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mamba2_min import console
from mamba2_min.errors import UserError, printable, run_script

if TYPE_CHECKING:  # importing torch takes seconds, and neither --help nor a mistyped flag should wait for it
    from mamba2_min.inference.completer import Completer
    from mamba2_min.ops.sampling import Sampler

RUNS = Path("runs")
SHOWN_PROMPT = 1000  # characters; of a longer prompt the terminal shows the end
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, "seed": None}  # what changes nothing

# What the dialogue sets: a value's name, how it is read, and a line of help.
SETTINGS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "/temperature": ("temperature", float, "0: always the likeliest; 1: as the model has it"),
    "/top-k": ("top_k", int, "only this many of the likeliest words"),
    "/top-p": ("top_p", float, "only the likeliest, up to this share, say 0.9"),
    "/min-p": ("min_p", float, "only those this likely beside the likeliest, say 0.05"),
    "/repeat-penalty": ("repeat_penalty", float, "above 1, say 1.1: recent words become less likely"),
    "/length": ("max_tokens", int, "at most this many tokens"),
    "/seed": ("seed", int, "a number: a prompt gets the same text every time"),
}
ACTIONS = {
    "/continue": "goes on exactly where the text stopped",
    "/stats": "speeds, and the size of the model's state",
    "/help": "shows this",
    "/quit": "leaves, as exit and Ctrl-D do",
}


def main() -> int:
    args = _parse(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character shows its number
    prompt = args.prompt
    if prompt is None and not _is_terminal(sys.stdin):
        prompt = _read_standard_input()
    folder, found = (args.model, "") if args.model is not None else _find_run()

    # Threads that wait for each other would spin, many times in each word; where other programs have work to do, that
    # made a word take twenty times as long. It is read once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from mamba2_min.devices import pick_device
    from mamba2_min.inference.completer import Completer
    from mamba2_min.ops.sampling import Sampler

    try:
        sampler = Sampler(**{name: getattr(args, name) for name in ("temperature", *OFF)})
    except ValueError as error:
        raise UserError("--" + _in_words(error)) from None
    device = pick_device(args.device)
    completer = Completer.load(folder, device, None if args.quantize == "none" else args.quantize)
    completer.known_words = args.known_words
    print(
        f"model     {printable(str(folder))}{found}, {completer.model.config.num_parameters():,} "
        f"parameters{'' if args.quantize == 'none' else f' in {args.quantize}'}, "
        f"{len(completer.tokenizer):,} tokens known, on {device.type}\n"
        f"sampling  {_described(sampler)}\n"
        f"length    at most {args.max_tokens:,} tokens, to the end of the document"
        + "".join(f" or {stop!r}" for stop in args.stop),
        file=sys.stdout if prompt is None or _is_terminal(sys.stdout) else sys.stderr,
        flush=True,
    )
    if prompt is None:
        Dialogue(completer, sampler, args.max_tokens, args.stop).run()
        return 0
    try:
        pieces = completer.complete(prompt, args.max_tokens, sampler, args.stop)
        _show(pieces, prompt if _is_terminal(sys.stdout) else "")
    except FloatingPointError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        # What is left in the buffer would fail again, and loudly, when Python closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"cannot write the text: {error.strerror}") from None
    print(_how_it_ended(completer), file=sys.stderr)
    return 0


class Dialogue:
    """The completer at a terminal: a line is a prompt or, where it begins with "/", a command."""

    def __init__(self, completer: Completer, sampler: Sampler, max_tokens: int, stop: Sequence[str]):
        self.completer, self.sampler, self.max_tokens, self.stop = completer, sampler, max_tokens, stop

    def run(self) -> None:
        print("\nType the beginning of a text, or /help. Ctrl-C stops the words, Ctrl-D leaves.")
        with _line_editing():
            while True:
                try:
                    print()
                    line = input("> ")
                    if line.strip() in ("exit", "/exit", "/quit"):
                        return
                    self.answer(line)
                except EOFError:
                    print()
                    return
                except KeyboardInterrupt:
                    print("\n(Ctrl-D or /quit leaves)")
                except UnicodeDecodeError:
                    print("error: that line is not UTF-8")
                except (UserError, FloatingPointError) as error:
                    print(f"error: {printable(str(error))}")

    def answer(self, line: str) -> None:
        """Does what one line asks for. Raises UserError, FloatingPointError or KeyboardInterrupt; the state stays."""
        command, _, value = line.strip().partition(" ")
        if not line.startswith("/"):
            sampler = dataclasses.replace(self.sampler)  # begins with its seed again
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
            for name, (_, _, what) in SETTINGS.items():
                print(f"  {name:16}{self._value(name):>5}  {what}")
            for name, what in ACTIONS.items():
                print(f"  {name:16}{'':5}  {what}")
            print('"off" as a value switches one off. Any other line is the beginning of a text;')
            print("with an empty one, the model begins a document itself.")
        else:
            near = difflib.get_close_matches(command, [*SETTINGS, *ACTIONS], n=1)
            hint = f"did you mean {near[0]}?" if near else "see /help (a space before the / makes it a text)"
            print(f"there is no {printable(command[:40])}; {hint}")

    def _write(self, pieces: Iterable[str], prompt: str = "") -> None:
        try:
            _show(pieces, prompt)
        except KeyboardInterrupt:
            print()
        further = "begins another" if self.completer.stopped_by == "end" else "goes on"
        print(_styled(f"[{_how_it_ended(self.completer)}; /continue {further}]", _DIM))

    def _set(self, command: str, text: str) -> None:
        if not text:
            print(f"{command[1:]} is {self._value(command)}")
            return
        name, read, _ = SETTINGS[command]
        try:
            value = OFF[name] if text == "off" and name in OFF else read(text)
        except ValueError:
            value = text  # of the wrong type, which is answered as any wrong value
        try:
            if name == "max_tokens":
                self.max_tokens = _at_least_one(value)
            else:
                self.sampler = self.sampler.adjusted(**{name: value})
        except ValueError as error:
            print(f"{printable(_in_words(error))}; it stays {self._value(command)}")
        else:
            print(f"{command[1:]} is {self._value(command)}")

    def _value(self, command: str) -> str:
        name = SETTINGS[command][0]
        return str(self.max_tokens) if name == "max_tokens" else _value(self.sampler, name)

    def _print_stats(self) -> None:
        stats = self.completer.stats
        print(f"prompt  {stats.prompt_tokens:,} tokens, {stats.prompt_tokens_per_second:,.0f} tokens/s")
        print(f"text    {stats.tokens:,} tokens, {stats.tokens_per_second:,.0f} tokens/s")
        print(f"state   {stats.state_bytes / 1024:,.0f} KiB, after the first token as after the last")


def _show(pieces: Iterable[str], prompt: str = "") -> None:
    """Prints a prompt and the text that follows it as it comes, with a line end after all."""
    shown = prompt if len(prompt) <= SHOWN_PROMPT else "…" + prompt[-SHOWN_PROMPT:]
    sys.stdout.write(_styled(printable(shown, keep="\n\t"), _BOLD))
    sys.stdout.flush()
    piece = "\n"
    for piece in pieces:
        sys.stdout.write(printable(piece, keep="\n\t"))
        sys.stdout.flush()
        if failure := console.failure():  # nobody reads on: there is no use in writing on
            raise failure
    if prompt or not piece.endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()


def _how_it_ended(completer: Completer) -> str:
    stats = completer.stats
    ended = {
        "end": "the document ends here",
        "stop": "a stop text follows",
        "length": "cut at the length",
        "interrupted": "interrupted",
    }
    return f"{stats.tokens:,} tokens at {stats.tokens_per_second:,.0f} a second, {ended[completer.stopped_by]}"


def _described(sampler: Sampler) -> str:
    return ", ".join(f"{name.replace('_', '-')} {_value(sampler, name)}" for name in ("temperature", *OFF))


def _value(sampler: Sampler, name: str) -> str:
    value = getattr(sampler, name)
    return "off" if name in OFF and value == OFF[name] else str(value)


def _in_words(error: ValueError) -> str:
    """A message that begins with a field's name, with that name as the user knows it."""
    name, rest = str(error).split(" ", 1)
    return f"{name.replace('_', '-')} {rest}"


_BOLD, _DIM = "\033[1m", "\033[2m"


def _styled(text: str, style: str) -> str:
    plain = not _is_terminal(sys.stdout) or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return text if plain or not text else f"{style}{text}\033[0m"


def _is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Arrow keys and a history that outlives the session, where the system has them; where not, it works without."""
    try:
        import readline
    except ImportError:
        yield
        return
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    file = Path(home, "mamba2-min", "history")
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            readline.write_history_file(file)


def _find_run() -> tuple[Path, str]:
    """runs/demo, or else the run whose model was saved last; and how to say which it is."""
    models = [path for path in RUNS.glob("*/model.pt") if (path.parent / "config.json").is_file()]
    if RUNS / "demo" / "model.pt" in models:
        return RUNS / "demo", ""
    if not models:
        raise UserError(f"there is no trained model in {RUNS}/; train one with train.py, or name it with --model")
    return max(models, key=lambda path: path.stat().st_mtime).parent, " (the newest run)"


def _read_standard_input() -> str:
    """All of it, less the line end with which `echo` and editors close a text."""
    if sys.stdin is None:
        raise UserError("there is neither a prompt nor a terminal; give --prompt TEXT")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"standard input is not UTF-8: byte 0x{byte:02X} at offset {error.start:,}") from None
    return text.replace("\r\n", "\n").removesuffix("\n")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    model = parser.add_argument_group("the model")
    model.add_argument("--model", metavar="DIR", type=Path, help="a run's folder (default: runs/demo or the newest)")
    model.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: auto")
    model.add_argument(
        "--quantize",
        choices=["none", "int8", "bf16"],
        default="none",
        help="narrower weights, on a CPU: a quarter (int8) or half (bf16) of the memory, and faster (default: none)",
    )
    text = parser.add_argument_group("the text")
    text.add_argument("--prompt", metavar="TEXT", type=_text, help='how it begins; "" lets the model begin a document')
    text.add_argument("--max-tokens", metavar="N", type=_count, default=200, help="at most this many (default: 200)")
    text.add_argument(
        "--stop",
        metavar="TEXT",
        type=_stop,
        action="append",
        default=[],
        help="stop before this text; may be given several times (the end of the document always stops)",
    )
    sampling = parser.add_argument_group("which word comes next")
    sampling.add_argument(
        "--known-words", action="store_true", help="only words of the vocabulary; none spelled out byte by byte"
    )
    defaults = {"temperature": 0.8, **OFF}
    for command, (name, read, what) in SETTINGS.items():
        if name in defaults:
            sampling.add_argument(
                "-" + command.replace("/", "-"),
                metavar="N" if read is int else "X",
                type=read,
                default=defaults[name],
                help=f"{what} (default: {'off' if name in OFF else defaults[name]})",
            )
    return parser.parse_args(arguments)


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"character {error.start + 1} is not UTF-8") from None
    return value


def _stop(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("a stop text cannot be empty")
    return _text(value)


def _count(value: str) -> int:
    try:
        return _at_least_one(int(value))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {value!r}") from None


def _at_least_one(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"length must be a whole number of at least 1, not {value!r}")
    return value


if __name__ == "__main__":
    run_script(main)
