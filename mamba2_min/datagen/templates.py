"""The user's own: a kind in a TOML or JSON file, and topics in a text file (docs/data_generator.md has the format).

A template may come from a stranger. It names nothing but lists: written out, or regular files that lie beside it.
"""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mamba2_min import files
from mamba2_min.datagen.builtin import KINDS, SHARED_LISTS
from mamba2_min.datagen.kinds import Kind, list_of, slug
from mamba2_min.errors import UserError
from mamba2_min.printable import folded, one_line

TEMPLATE_BYTES, LIST_BYTES = 4 << 20, 64 << 20
_ENTRIES = ("answer", "lists", "max_words", "min_words", "prompt")


def find_kind(name_or_file: str) -> Kind:
    """The built-in kind of that name, or the one that a .toml or .json file describes. Raises UserError."""
    if name_or_file in KINDS:
        return KINDS[name_or_file]
    path = Path(name_or_file)
    if path.suffix.lower() in (".toml", ".json"):
        return load_template(path)
    raise UserError(
        f"--kind {name_or_file}: neither a kind ({', '.join(KINDS)}) nor a .toml or .json file"
        + _nearest(name_or_file, KINDS)
    )


def load_topics(path: Path) -> tuple[str, ...]:
    """The subjects in a text file, one per line; empty lines and lines that start with `#` do not count."""
    topics = _items(files.read_text(path, LIST_BYTES))
    if not topics:
        raise UserError(f"--topics {path}: the file names no subject (one per line is wanted)")
    return topics


def load_template(path: Path) -> Kind:
    """The kind that the file at `path` describes. Raises UserError, in one line, for whatever is wrong with it."""
    table = _parse(path)
    for key in table:
        if key not in _ENTRIES:
            raise UserError(
                f"{path}: unknown entry {key!r}" + (_nearest(key, _ENTRIES) or f" (known are {', '.join(_ENTRIES)})")
            )
    prompts = _strings(path, "prompt", table.get("prompt"))
    answer = table.get("answer")
    if answer is not None:
        if not isinstance(answer, str) or "{request}" not in answer:
            raise UserError(f"{path}: answer has to be a text in which {{request}} occurs")
        answer = folded(answer)
    own = table.get("lists", {})
    if not isinstance(own, dict):
        raise UserError(f"{path}: lists has to be a table of lists")
    lists = {**SHARED_LISTS, **{name: _list(path, name, value) for name, value in own.items()}}
    for wording in prompts:
        _check_fields(path, wording, lists)
    if answer:
        _check_fields(path, answer.replace("{request}", ""), lists)
    kind = Kind(
        slug(path.stem) or "documents",
        prompts,
        lists,
        answer,
        _bound(path, table, "min_words"),
        _bound(path, table, "max_words"),
    )
    kind.check_lists(str(path))
    return kind


def _parse(path: Path) -> dict[str, Any]:
    text = files.read_text(path, TEMPLATE_BYTES).removeprefix("\ufeff")
    try:
        table = files.parse_json(text) if path.suffix.lower() == ".json" else _parse_toml(path, text)
    except (ValueError, RecursionError) as error:  # the errors of both parsers are ValueErrors
        raise UserError(f"{path}: {one_line(error) or 'it cannot be parsed'}") from error
    if not isinstance(table, dict):
        raise UserError(f"{path}: a table with `prompt` and `lists` is wanted")
    return table


def _parse_toml(path: Path, text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:
        raise UserError(f"{path}: TOML needs Python 3.11; write the same template as a .json file") from None
    return tomllib.loads(text)


def _strings(path: Path, name: str, value: object) -> tuple[str, ...]:
    """`value`, a text or a list of texts, as a tuple without repeats."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise UserError(f"{path}: {name} has to be a text, or a list of texts, none of them empty")
    return tuple(dict.fromkeys(folded(v).strip() for v in values))


def _list(path: Path, name: str, value: object) -> tuple[str, ...]:
    """A list of the template: written out, or the name of a file beside the template with one item per line."""
    if name == "request" or not re.fullmatch(r"[a-z](?:[a-z_]*[a-z])?", name):
        raise UserError(f"{path}: a list cannot be called {name!r} (small letters and _, not `request`)")
    if not isinstance(value, str):
        return _strings(path, f"list {name}", value)
    if value in ("", ".", "..") or not value == PurePosixPath(value).name == PureWindowsPath(value).name:
        raise UserError(f"{path}: list {name} names {value!r}; only a file beside the template may be named")
    items = _items(files.read_text(path.parent / value, LIST_BYTES, follow=False))
    if not items:
        raise UserError(f"{path}: list {name}: {value} is empty")
    return items


def _items(text: str) -> tuple[str, ...]:
    lines = (line.strip() for line in folded(text.removeprefix("\ufeff")).split("\n"))
    return tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


def _check_fields(path: Path, wording: str, lists: Mapping[str, tuple[str, ...]]) -> None:
    try:
        parts = list(string.Formatter().parse(wording))
    except ValueError as error:
        raise UserError(f"{path}: {error} in {wording[:60]!r} (a brace itself is written {{{{ or }}}})") from error
    for _, name, spec, conversion in parts:
        if name is not None and (spec or conversion or list_of(name) not in lists):
            raise UserError(f"{path}: unknown field {{{name}}}: no list of that name{_nearest(name, lists)}")


def _bound(path: Path, table: Mapping[str, Any], name: str) -> int | None:
    value = table.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise UserError(f"{path}: {name} has to be an integer of 1 or more")
    return value


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name[:100], list(known), 1, 0.5)
    return f"; did you mean {close[0]}?" if close else ""
