"""How a text is written: what can be set, what is on unless one asks for something else, and the flags for it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mamba2_min.errors import UserError

if TYPE_CHECKING:  # importing torch takes seconds: not for --help
    from mamba2_min.inference.completer import Completer
    from mamba2_min.ops.sampling import Sampler

# What changes nothing; and what reads best (docs/LOG.md has the comparison), beside known words.
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, "seed": None, "no_repeat": 0}
TEMPERATURE = 0.8
WRITING: dict[str, Any] = {"min_p": 0.1, "no_repeat": 6}
FEW_WORDS = 500  # a vocabulary with fewer words spells what it writes, which known words alone would silence

# What can be set: a value's name, how it is read, and a line of help.
SETTINGS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "/temperature": ("temperature", float, "0: always the likeliest; 1: as the model has it"),
    "/top-k": ("top_k", int, "only this many of the likeliest words"),
    "/top-p": ("top_p", float, "only the likeliest, up to this share, e.g. 0.9"),
    "/min-p": ("min_p", float, "only those this likely beside the likeliest, e.g. 0.05"),
    "/no-repeat": ("no_repeat", int, "so many tokens in a row are not written twice"),
    "/repeat-penalty": ("repeat_penalty", float, "above 1, e.g. 1.1: recent words become less likely"),
    "/known-words": ("known_words", str, "on: words of the vocabulary and the prompt alone"),
    "/length": ("max_tokens", int, "at most this many tokens"),
    "/seed": ("seed", int, "a number: a prompt gets the same text every time"),
}


def add_flags(group: argparse._ArgumentGroup) -> None:
    """The flags of run.py that choose the next word; one that is left out is None."""
    group.add_argument(
        "--raw",
        action="store_true",
        help="the model as it is: temperature 1, any word, and none of the rest, but for what is given beside it",
    )
    group.add_argument(
        "--known-words",
        action=argparse.BooleanOptionalAction,
        help="only words of the vocabulary and of the prompt; none is spelled byte by byte (default: on; off with "
        f"--raw, at temperature 0, and for vocabularies of fewer than {FEW_WORDS} words)",
    )
    shown = {"temperature": f"{TEMPERATURE}"} | {k: f"{v}, or off as known words are" for k, v in WRITING.items()}
    for command, (name, read, what) in SETTINGS.items():
        if name == "temperature" or name in OFF:
            group.add_argument(
                "-" + command.replace("/", "-"),
                metavar="N" if read is int else "X",
                type=read,
                help=f"{what} (default: {shown.get(name, 'off')})",
            )


def sampler_of(args: argparse.Namespace) -> Sampler:
    """The sampler that the flags ask for. Raises UserError for an impossible value."""
    from mamba2_min.ops.sampling import Sampler

    try:
        return Sampler(**{"temperature": 1.0 if args.raw else TEMPERATURE, **_asked(args)})
    except ValueError as error:
        raise UserError("--" + in_words(error)) from None


def prepare(args: argparse.Namespace, sampler: Sampler, completer: Completer) -> Sampler:
    """Switches on for a model what reads best and was not decided by a flag; the sampler to write with."""
    as_it_is = args.raw or sampler.temperature == 0 or len(completer.tokenizer.words) < FEW_WORDS
    completer.known_words = not as_it_is if args.known_words is None else args.known_words
    if as_it_is:
        return sampler
    return sampler.adjusted(**{name: value for name, value in WRITING.items() if name not in _asked(args)})


def described(sampler: Sampler, known_words: bool, all_of_it: bool = True) -> str:
    """The settings in words, or of them those that are on."""
    values = {name: shown(sampler, name) for name in ("temperature", *OFF)}
    values["known_words"] = "on" if known_words else "off"
    chosen = {name: value for name, value in values.items() if all_of_it or value != "off"}
    return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in chosen.items())


def shown(sampler: Sampler, name: str) -> str:
    """One of a sampler's values, or "off"."""
    value = getattr(sampler, name)
    return "off" if name in OFF and value == OFF[name] else str(value)


def in_words(error: ValueError) -> str:
    """A message that begins with a field's name, with that name as the user knows it."""
    name, rest = str(error).split(" ", 1)
    return f"{name.replace('_', '-')} {rest}"


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in ("temperature", *OFF) if (value := getattr(args, name)) is not None}
