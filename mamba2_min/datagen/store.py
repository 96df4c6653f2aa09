"""How documents are stored: a folder, one file each, and `manifest.jsonl` with one line for each file.

The order of these steps makes it safe to be killed while a document is saved:

    1. `.pending.json`   the line of the manifest that is about to be written
    2. NAME              the text: under another name, flushed to the disk, then renamed; so it is there in full or not
    3. `manifest.jsonl`  the line is appended, and flushed
    4. `.pending.json`   is removed

Whatever step was the last, the next start can tell: a pending line whose file is complete is added to the manifest, one
whose file is not is dropped, and so is half a line at the end of the manifest. Any other inconsistency was made by an
edit; one line reports it, and nothing is changed. None of these files may be a link.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no flock: there, nothing keeps two generators off one folder
    fcntl = None  # type: ignore[assignment]

from mamba2_min import files
from mamba2_min.datagen.lines import (
    LOCK,
    MANIFEST,
    MOST_BYTES,
    MOST_REASON,
    PENDING,
    REJECTED,
    Entry,
    attempt_of,
    line_of,
    number_of,
)
from mamba2_min.datagen.recovery import Recovery
from mamba2_min.errors import UserError

REQUEST_END = "<start>"  # between a request and the text that answers it, in a document's file
MOST_BYTES_OF_OTHERS = 64 << 20  # of a text of somebody else that new ones are compared with


class Store:
    """The folder, locked by this process until `close()` or its end.

    Attributes: `folder`; `entries`, the manifest's lines as dicts, in order; `rejected`, a Counter of the reasons
    recorded so far; `tried`, the (kind, base seed, index) of every attempt on record; `notes`, one line for each
    thing that was put right at the start.
    """

    def __init__(self, folder: Path):
        """Creates the folder if it is missing, locks it, and recovers it. Raises UserError if that fails."""
        self.folder = files.make_folder(folder)
        self.notes: list[str] = []
        self._manifest = self.folder / MANIFEST
        with _explained(self.folder):
            self._lock = self._locked()
            try:
                found = Recovery(self.folder, self.notes)
                self.entries = found.entries()
                self.rejected, self.tried = found.rejected()
                self.tried.update(attempt_of(entry) for entry in self.entries)
                self._others = self._find_others()
            except BaseException:
                os.close(self._lock)
                raise
        self._next_number = 1 + max(map(number_of, files.names_in(self.folder)), default=0)

    def close(self) -> None:
        """Unlocks the folder."""
        os.close(self._lock)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, slug: str, text: str, request: str | None, record: Mapping[str, Any]) -> Entry:
        """Keeps a document under the next number; returns its line. `slug` has to be one already (`kinds.slug`).

        `record` holds what the line says besides `file` and `sha256`. When this raises, the folder is as before, or
        will be after the next start.
        """
        content = ((request + REQUEST_END if request else "") + text + "\n").encode("utf-8")
        name = f"{slug}-{self._next_number:06d}.md"
        entry = {"file": name, "sha256": hashlib.sha256(content).hexdigest(), **record}
        line = line_of(entry)
        path = self.folder / name
        with _explained(path):
            files.write_atomically(self.folder / PENDING, lambda file: file.write(line))
            files.write_atomically(path, lambda file: file.write(content))
            files.append_line(self._manifest, line, flush=True)
            files.remove(self.folder / PENDING)
        self._next_number += 1
        self.entries.append(entry)
        self.tried.add(attempt_of(entry))
        return entry

    def reject(self, kind: str, seed: int, index: int, reason: str, detail: str = "") -> None:
        """Records a rejection, so that the same attempt is not repeated after a restart."""
        record = {"kind": kind, "seed": seed, "index": index, "reason": reason[:MOST_REASON], "detail": detail}
        with _explained(self.folder / REJECTED):
            files.append_line(self.folder / REJECTED, line_of(record))
        self.rejected[reason] += 1
        self.tried.add(attempt_of(record))

    def contents(self) -> Iterator[tuple[str, str]]:
        """The (file name, content) of each document, as stored."""
        for entry in self.entries:
            content = files.read_bytes(self.folder / entry["file"], MOST_BYTES, follow=False)
            yield entry["file"], content.decode("utf-8", "replace")

    def texts(self) -> Iterator[tuple[str, str]]:
        """The (file name, text) of each document: its own words, without the request before them."""
        for name, content in self.contents():
            yield name, text_of(content)

    def texts_of_others(self) -> Iterator[tuple[str, str]]:
        """The same for texts that somebody else put into the folder: not counted, but not to be repeated either."""
        for path in self._others:
            yield path.name, text_of(files.read_bytes(path, MOST_BYTES_OF_OTHERS).decode("utf-8", "replace"))

    def _find_others(self) -> list[Path]:
        ours = {entry["file"] for entry in self.entries}
        found, too_large = [], 0
        for folder, _, names in os.walk(self.folder):
            for path in (Path(folder, name) for name in names if name not in ours and name.endswith((".md", ".txt"))):
                if files.is_file(path):
                    fits = path.stat().st_size <= MOST_BYTES_OF_OTHERS
                    found += [path] if fits else []
                    too_large += not fits
        if too_large:
            self.notes.append(f"{too_large} of the other texts are too large for new ones to be compared with them")
        return sorted(found)

    def _locked(self) -> int:
        """An open file that holds the folder's lock, which ends with the process, however that ends."""
        handle = files.open_own(self.folder / LOCK, os.O_RDWR | os.O_CREAT)
        try:
            if fcntl:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 32).decode("ascii", "replace").strip()
            os.close(handle)
            raise UserError(
                f"{self.folder} is being written by another data_generator.py (process {holder or '?'})"
            ) from None
        except OSError as error:
            self.notes.append(f"this drive knows no locks ({error.strerror}): start no second generator in this folder")
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        return handle


def text_of(content: str) -> str:
    """A document's own words: what stands after the request, if one does, and before an end marker, if one does."""
    return content.rpartition(REQUEST_END)[2].replace("<end>", "").strip()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what the system says about `path` into a line for the user."""
    try:
        yield
    except (OSError, UserError) as error:
        cause = error.__cause__ if isinstance(error, UserError) else error
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full: {path} could not be written; what was kept is safe: make room and start again"
            ) from error
        if isinstance(error, UserError):
            raise
        raise UserError(f"{error.filename or path}: {error.strerror or error}") from error
