"""Command-line flags made from the fields of settings classes: each setting is described in one place, its field.

And a parser whose errors are one line, and help that fits the terminal.
"""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from mamba2_min.errors import UserError
from mamba2_min.settings import kind_of


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, as for every other error, instead of after the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the arguments)")


class HelpFormatter(argparse.HelpFormatter):
    """Fills the paragraphs of a description to the terminal's width. Indented lines and commands stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        paragraph: list[str] = []
        for line in [*text.strip().splitlines(), ""]:
            if line and not line.startswith((" ", "python ", "echo ")):
                paragraph.append(line)
                continue
            if paragraph:
                lines.append(textwrap.fill(" ".join(paragraph), width, break_on_hyphens=False))
                paragraph = []
            lines.append(line)
        return "\n".join(lines).rstrip()


def add_flags(
    group: argparse._ArgumentGroup, fields: Iterable[dataclasses.Field[Any]], shown: Mapping[str, Any] | None = None
) -> None:
    """Adds a flag for each field whose metadata has a `help` text; a flag that is left out is None.

    The flag's type is the field's annotation. Further metadata: `choices`, `metavar`, `shown` (printed in place of the
    default) and `auto` (the flag takes the word "auto" too). `shown` has other defaults for the fields that it names.
    """
    for field in fields:
        about = field.metadata
        if not about.get("help"):
            continue
        kind = kind_of(field)
        default = _shown((shown or {}).get(field.name, about.get("shown", field.default)))
        options: dict[str, Any] = {"help": f"{about['help']} ({default})".replace("%", "%%")}
        if kind == "bool":
            options["action"] = argparse.BooleanOptionalAction
        elif "choices" in about:
            options["choices"] = about["choices"]
        else:
            options["type"] = _integer_or_auto if "auto" in about else _TYPES[kind]
            options["metavar"] = about.get("metavar", {"int": "N", "float": "X"}.get(kind, "TEXT"))
        group.add_argument(flag(field.name), default=None, **options)


def asked_for(args: argparse.Namespace, *classes: type) -> dict[str, Any]:
    """{field name: value} of the flags that were given, for the fields of these classes."""
    asked = {}
    for field in (field for cls in classes for field in dataclasses.fields(cls)):
        value = getattr(args, field.name, None)
        if value == "auto" and "auto" in field.metadata:
            asked[field.metadata["auto"]] = True
        elif value is not None:
            asked[field.name] = value
    return asked


def folder(text: str) -> Path:
    """The type of a flag that names a folder to write into. "" is no name, though a path would take it for this one."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a folder is wanted, and it is empty")
    return Path(text)


def check_integers(args: argparse.Namespace, most: int = 2**31 - 1, **least: int) -> None:
    """Raises UserError for an integer, by the name of its flag, below its `least` or above `most`; None is fine."""
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= most:
            raise UserError(f"{flag(name)} must be at least {low} and at most {most:,}")


def check_threads(args: argparse.Namespace) -> None:
    """Raises UserError for a --threads that no machine can start; 0 stands for the default."""
    check_integers(args, most=1024, threads=1 if args.threads else 0)


def flag(name: str) -> str:
    """How a field is called on the command line: --batch-size for batch_size."""
    return "--" + name.replace("_", "-")


def _integer_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


_integer_or_auto.__name__ = "integer"  # argparse shows it: "invalid integer value"
_TYPES: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:g}" if isinstance(default, float) else str(default)
