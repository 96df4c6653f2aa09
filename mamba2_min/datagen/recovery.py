"""Opening a folder of documents: completes what a kill interrupted, and detects what was edited by hand.

See the steps at the top of store.py. Where a change would lose anything, nothing is changed and one line says why.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from mamba2_min import files
from mamba2_min.datagen.lines import (
    FILE_NAME,
    MANIFEST,
    MOST_BYTES,
    PENDING,
    REJECTED,
    Attempt,
    Entry,
    line_of,
    number_of,
    parse_entry,
    parse_rejection,
)
from mamba2_min.errors import UserError


class Recovery:
    """The folder as it was found. `notes` gets one line for each repair."""

    def __init__(self, folder: Path, notes: list[str]):
        """Raises UserError where one of the folder's files is a link, or no regular file."""
        self.folder, self.notes = folder, notes
        self._manifest = folder / MANIFEST
        for name in files.names_in(folder):
            if name in (MANIFEST, REJECTED, PENDING) or number_of(name):
                files.refuse_link(folder / name)

    def entries(self) -> list[Entry]:
        """The lines of the manifest, repaired. Raises UserError if the folder was edited so that they are wrong."""
        for path in self.folder.glob(".*.tmp"):
            files.remove(path)
        entries, lines = self._read_manifest()
        entries = self._finish_pending(entries)
        entries = self._without_deleted(entries, lines)
        self._check_contents(entries)
        self._set_aside_unlisted(entries)
        return entries

    def _read_manifest(self) -> tuple[list[Entry], dict[str, bytes]]:
        """The entries and their lines, without an incomplete one at the end. Raises UserError for any other fault."""
        if not files.exists(self._manifest):
            found = [name for name in files.names_in(self.folder) if FILE_NAME.fullmatch(name)]
            if len(found) > files.exists(self.folder / PENDING):
                raise UserError(
                    f"{self.folder} holds {len(found)} generated documents but no {MANIFEST}: put it back, or name "
                    "another folder with --out"
                )
            files.append_line(self._manifest, b"")
        content = files.read_bytes(self._manifest, MOST_BYTES, follow=False)
        whole, _, tail = content.rpartition(b"\n")
        entries, lines = [], {}
        for number, line in enumerate(whole.split(b"\n"), 1):
            if line.strip():
                entries.append(self._parsed(line, number))
                lines[entries[-1]["file"]] = line + b"\n"
        if tail:
            try:
                entries.append(self._parsed(tail, len(entries) + 1))  # only its end was missing, as after an editor
                lines[entries[-1]["file"]] = tail + b"\n"
            except UserError:
                self.notes.append(f"{MANIFEST}: the last line was cut off in the middle, and has been removed")
        repeated = [name for name, count in Counter(entry["file"] for entry in entries).items() if count > 1]
        if repeated:
            raise self._edited(f"{repeated[0]} has more than one line")
        if tail:
            self._rewrite(entries, lines)
        return entries, lines

    def _parsed(self, line: bytes, number: int) -> Entry:
        try:
            return parse_entry(line)
        except ValueError as error:
            raise self._edited(f"line {number} {error}") from None

    def _edited(self, what: str) -> UserError:
        return UserError(f"{self._manifest} was edited: {what}; nothing was changed, mend it or name another --out")

    def _finish_pending(self, entries: list[Entry]) -> list[Entry]:
        """Completes the document that a kill interrupted: see the steps at the top of store.py."""
        pending = self.folder / PENDING
        if not files.exists(pending):
            return entries
        try:
            entry = self._parsed(files.read_bytes(pending, MOST_BYTES, follow=False), 1)
            line = line_of(entry)
        except (UserError, RecursionError):  # an incomplete note: its document was not renamed yet
            entry = {}
        if entry and all(entry["file"] != other["file"] for other in entries) and self._is_whole(entry):
            files.append_line(self._manifest, line, flush=True)
            entries = [*entries, entry]
            self.notes.append(f"{entry['file']}: was finished just before the last run ended, and is now on record")
        files.remove(pending)
        return entries

    def _without_deleted(self, entries: list[Entry], lines: Mapping[str, bytes]) -> list[Entry]:
        """Removes the lines of deleted files from the manifest; their attempts stay used."""
        gone = [entry for entry in entries if not files.exists(self.folder / entry["file"])]
        if not gone:
            return entries
        for entry in gone:
            record = {name: entry[name] for name in ("kind", "seed", "index")}
            line = line_of({**record, "reason": "deleted by hand", "detail": entry["file"]})
            files.append_line(self.folder / REJECTED, line)
        names = {entry["file"] for entry in gone}
        entries = [entry for entry in entries if entry["file"] not in names]
        self._rewrite(entries, lines)
        self.notes.append(f"{len(gone)} documents were deleted since the last run; others will take their place")
        return entries

    def _check_contents(self, entries: list[Entry]) -> None:
        for number, entry in enumerate(entries, 1):
            if not self._is_whole(entry):
                raise UserError(
                    f"{self.folder / entry['file']} is not what line {number} of {MANIFEST} says (sha256): one of them "
                    "was edited; undo that, or delete the document to have another one written"
                )

    def _is_whole(self, entry: Entry) -> bool:
        path = self.folder / entry["file"]
        if not files.exists(path):
            return False
        return hashlib.sha256(files.read_bytes(path, MOST_BYTES, follow=False)).hexdigest() == entry["sha256"]

    def _set_aside_unlisted(self, entries: list[Entry]) -> None:
        """One document without a line can come from a lost last line: it is renamed to NAME.orphan, not deleted."""
        listed = {entry["file"] for entry in entries}
        unlisted = [n for n in files.names_in(self.folder) if FILE_NAME.fullmatch(n) and n not in listed]
        latest = max(map(number_of, listed), default=0)
        taken = [name for name in unlisted if files.exists(self.folder / f"{name}.orphan")]
        if len(unlisted) > 1 or taken or any(number_of(name) < latest for name in unlisted):
            names = ", ".join(unlisted[:3]) + ", …" * (len(unlisted) > 3)
            raise self._edited(f"{len(unlisted)} documents have no line in it ({names})")
        for name in unlisted:
            (self.folder / name).rename(self.folder / f"{name}.orphan")
            self.notes.append(f"{name}: its line is lost, so it was renamed to {name}.orphan")

    def _rewrite(self, entries: list[Entry], lines: Mapping[str, bytes]) -> None:
        content = b"".join(lines.get(entry["file"]) or line_of(entry) for entry in entries)
        files.write_atomically(self._manifest, lambda file: file.write(content))

    def rejected(self) -> tuple[Counter[str], set[Attempt]]:
        """The recorded reasons and attempts. A line that cannot be read only means that its attempt is repeated."""
        reasons: Counter[str] = Counter()
        tried: set[Attempt] = set()
        path = self.folder / REJECTED
        content = files.read_bytes(path, MOST_BYTES, follow=False) if files.exists(path) else b""
        if content and not content.endswith(b"\n"):
            content = content[: content.rfind(b"\n") + 1]
            files.write_atomically(path, lambda file: file.write(content))
        forgotten = 0
        for line in filter(bytes.strip, content.split(b"\n")):
            try:
                attempt, reason = parse_rejection(line)
            except ValueError:
                forgotten += 1
            else:
                tried.add(attempt)
                reasons[reason] += 1
        if forgotten:
            self.notes.append(f"{REJECTED}: {forgotten} lines cannot be read, and are forgotten")
        return reasons, tried
