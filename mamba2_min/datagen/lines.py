"""The files of a generator's folder: their names, and the lines of `manifest.jsonl` and `rejected.jsonl`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from mamba2_min import files

MANIFEST, REJECTED, PENDING, LOCK = "manifest.jsonl", "rejected.jsonl", ".pending.json", ".lock"
MOST_BYTES = 1 << 30  # of a document, or of one of the folder's own files
MOST_REASON = 300  # characters

_REQUIRED: Mapping[str, type | tuple[type, ...]] = {
    "file": str,
    "sha256": str,
    "kind": str,
    "prompt": str,
    "model": str,
    "options": dict,
    "seed": int,
    "index": int,
    "created": str,
    "eval_count": (int, type(None)),
}
FILE_NAME = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*-([0-9]{6,})\.md")

Entry = dict[str, Any]  # a line of the manifest
Attempt = tuple[str, int, int]  # kind, base seed, index


def parse_entry(line: bytes) -> Entry:
    """A line of the manifest. Raises ValueError, which says what is wrong with it."""
    try:
        entry = files.parse_json(line)
    except ValueError:
        raise ValueError("is not JSON") from None
    if not isinstance(entry, dict):
        raise ValueError("is not an object")
    for name, kind in _REQUIRED.items():
        value = entry.get(name)
        if name not in entry or not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"has no proper {name!r}")
    if not FILE_NAME.fullmatch(entry["file"]):
        raise ValueError(f"names a file that is none of this folder's: {entry['file'][:80]!r}")
    return entry


def parse_rejection(line: bytes) -> tuple[Attempt, str]:
    """A line of the rejections: which attempt, and why. Raises ValueError if it is not one."""
    record = files.parse_json(line)
    if not isinstance(record, dict):
        raise ValueError("not an object")
    reason = record.get("reason")
    kinds = [type(record.get(name)) for name in ("kind", "seed", "index")]
    if kinds != [str, int, int] or not isinstance(reason, str) or len(reason) > MOST_REASON:
        raise ValueError("not a rejection")
    return attempt_of(record), reason


def line_of(entry: Mapping[str, Any]) -> bytes:
    """`entry` as a line of its file."""
    try:
        return (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
        return (json.dumps(entry) + "\n").encode("utf-8")


def attempt_of(entry: Mapping[str, Any]) -> Attempt:
    """What `entry` is a document or a rejection of."""
    return entry["kind"], entry["seed"] - entry["index"], entry["index"]


def number_of(name: str) -> int:
    """The number in the file name of a document (or of an orphan); 0 if there is none."""
    found = FILE_NAME.fullmatch(name.removesuffix(".orphan"))
    return int(found[1]) if found else 0
