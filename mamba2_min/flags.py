"""Command-line flags made from the fields of settings classes: each setting is described in one place, its field.

And a parser whose errors are one line.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from mamba2_min.errors import UserError
from mamba2_min.settings import kind_of


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, as for every other error, instead of after the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the arguments)")


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
