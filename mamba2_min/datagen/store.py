"""How documents lie on disk: a folder, one file each, and `manifest.jsonl` with one line for each file.

The order of the steps that keep a document is what makes the folder safe to be killed over:

    1. `.pending.json`   the line of the manifest that is about to be written
    2. `.NAME.tmp`       the text, flushed to the disk, then renamed to NAME: it is there in full or not at all
    3. `manifest.jsonl`  the line is appended, and flushed
    4. `.pending.json`   is removed

Whatever step was the last, the next start can tell: a pending line whose file is there in full gets into the manifest,
one whose file is not is dropped, and so is half a line at the end of the manifest. (The note is not flushed: after a
power cut it may be missing. Then the last document has no line, and is set aside.) Anything else that does not fit was
done by somebody's hand; that is said in one line, and nothing is touched.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock: there, nothing keeps two generators off one folder
    fcntl = None

from mamba2_min.errors import UserError

MANIFEST, REJECTED, PENDING, LOCK = "manifest.jsonl", "rejected.jsonl", ".pending.json", ".lock"
REQUEST_END = "<start>"  # between a request and the text that answers it, in a document's file

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
_FILE_NAME = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*-(\d{6,})\.md")


class Store:
    """The folder, held by this process alone until `close()` or its end.

    Attributes: `folder`; `entries`, the manifest's lines as dicts, in order; `rejected`, a Counter of the reasons
    recorded so far; `tried`, the (kind, base seed, index) of every attempt on record; `notes`, one line for each
    thing that was put right at the start.
    """

    def __init__(self, folder: Path):
        """Makes the folder where it is missing, locks it, and recovers it. Raises UserError where that cannot be."""
        self.folder = Path(folder)
        self.notes: list[str] = []
        self._manifest = self.folder / MANIFEST
        with _explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder)
        try:
            with _explained(self.folder):
                self.entries = self._recover()
                self.rejected, self.tried = self._read_rejected()
                self.tried.update(_attempt(entry) for entry in self.entries)
                # Unbuffered: what is written once is not written again on closing, should the disk be full.
                self._log = open(self.folder / REJECTED, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        except BaseException:
            os.close(self._lock)
            raise
        self._next_number = 1 + max(map(_number, (path.name for path in self.folder.iterdir())), default=0)

    def close(self) -> None:
        """Lets go of the folder."""
        self._log.close()
        os.close(self._lock)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, slug: str, text: str, request: str | None, record: Mapping) -> dict:
        """Keeps a document under the next number; returns its line. `slug` has to be one already (`kinds.slug`).

        `record` holds what the line says besides `file` and `sha256`. When this raises, the folder is as before, or
        will be after the next start.
        """
        content = ((request + REQUEST_END if request else "") + text + "\n").encode("utf-8")
        name = f"{slug}-{self._next_number:06d}.md"
        entry = {"file": name, "sha256": hashlib.sha256(content).hexdigest(), **record}
        line = _line(entry)
        pending, path = self.folder / PENDING, self.folder / name
        with _explained(path):
            pending.write_bytes(line)
            _write(path, content)
            _append(self._manifest, line)
            pending.unlink()
        self._next_number += 1
        self.entries.append(entry)
        self.tried.add(_attempt(entry))
        return entry

    def reject(self, kind: str, seed: int, index: int, reason: str, detail: str = "") -> None:
        """Puts a rejection on record, so that the same attempt is not made again after a restart."""
        with _explained(self.folder / REJECTED):
            record = {"kind": kind, "seed": seed, "index": index, "reason": reason, "detail": detail}
            self._log.write(_line(record))
        self.rejected[reason] += 1
        self.tried.add((kind, seed - index, index))

    def contents(self) -> Iterator[tuple[str, str]]:
        """The (file name, content) of each document, as it lies on disk."""
        for entry in self.entries:
            yield entry["file"], self._read(self.folder / entry["file"])

    def texts(self) -> Iterator[tuple[str, str]]:
        """The (file name, text) of each document: its own words, without the request before them."""
        for name, content in self.contents():
            yield name, text_of(content)

    def texts_of_others(self) -> Iterator[tuple[str, str]]:
        """The same for texts that somebody else put into the folder: not counted, but not to be repeated either."""
        ours = {entry["file"] for entry in self.entries}
        for path in sorted(self.folder.rglob("*")):
            if path.suffix in (".md", ".txt") and path.name not in ours and path.is_file():
                yield path.name, text_of(self._read(path))

    def _read(self, path: Path) -> str:
        with _explained(path):
            return path.read_text(encoding="utf-8", errors="replace")

    # --- recovery ---

    def _recover(self) -> list[dict]:
        for path in self.folder.glob(".*.tmp"):
            path.unlink()
        entries = self._finish_pending(self._read_manifest())
        entries = self._without_deleted(entries)
        self._check_contents(entries)
        self._set_aside_unlisted(entries)
        return entries

    def _read_manifest(self) -> list[dict]:
        """The lines; a torn one at the end is cut off. Raises UserError for any other fault."""
        if not self._manifest.exists():
            found = [path.name for path in self.folder.iterdir() if _number(path.name) and path.suffix == ".md"]
            if len(found) > (self.folder / PENDING).exists():
                raise UserError(
                    f"{self.folder} holds {len(found)} generated documents but no {MANIFEST}: put it back, or name "
                    "another folder with --out"
                )
            self._manifest.touch()
        content = self._manifest.read_bytes()
        whole, _, tail = content.rpartition(b"\n")
        entries = [self._parsed(line, number) for number, line in enumerate(whole.split(b"\n"), 1) if line.strip()]
        if tail:
            try:
                entries.append(self._parsed(tail, len(entries) + 1))  # only its end was missing, as after an editor
            except UserError:
                self.notes.append(f"{MANIFEST}: the last line was cut off in the middle, and has been removed")
            self._rewrite(entries)
        repeated = [name for name, count in Counter(entry["file"] for entry in entries).items() if count > 1]
        if repeated:
            raise self._edited(f"{repeated[0]} has more than one line")
        return entries

    def _parsed(self, line: bytes, number: int) -> dict:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise self._edited(f"line {number} is not JSON") from None
        if not isinstance(entry, dict):
            raise self._edited(f"line {number} is not an object")
        for name, kind in _REQUIRED.items():
            value = entry.get(name)
            if name not in entry or not isinstance(value, kind) or isinstance(value, bool):
                raise self._edited(f"line {number} has no proper {name!r}")
        if not _FILE_NAME.fullmatch(entry["file"]):
            raise self._edited(f"line {number} names a file that is none of this folder's: {entry['file'][:80]!r}")
        return entry

    def _edited(self, what: str) -> UserError:
        return UserError(f"{self._manifest} was edited: {what}; nothing was changed, mend it or name another --out")

    def _finish_pending(self, entries: list[dict]) -> list[dict]:
        """Ends what a kill interrupted: see the steps at the head of this file."""
        pending = self.folder / PENDING
        if not pending.exists():
            return entries
        try:
            entry = self._parsed(pending.read_bytes(), 1)
        except UserError:  # an empty or torn note is older than its document, which so was never renamed
            entry = None
        if entry and entry not in entries and _digest(self.folder / entry["file"]) == entry["sha256"]:
            _append(self._manifest, _line(entry))
            entries = [*entries, entry]
            self.notes.append(f"{entry['file']}: was finished just before the last run ended, and is now on record")
        pending.unlink()
        return entries

    def _without_deleted(self, entries: list[dict]) -> list[dict]:
        """Takes the lines of files that somebody deleted out of the manifest; their attempts stay used up."""
        gone = [entry for entry in entries if not (self.folder / entry["file"]).exists()]
        if not gone:
            return entries
        with open(self.folder / REJECTED, "ab") as log:
            for entry in gone:
                record = {name: entry[name] for name in ("kind", "seed", "index")}
                log.write(_line({**record, "reason": "deleted by hand", "detail": entry["file"]}))
        names = {entry["file"] for entry in gone}
        entries = [entry for entry in entries if entry["file"] not in names]
        self._rewrite(entries)
        self.notes.append(f"{len(gone)} documents were deleted since the last run; others will take their place")
        return entries

    def _check_contents(self, entries: list[dict]) -> None:
        for number, entry in enumerate(entries, 1):
            if _digest(self.folder / entry["file"]) != entry["sha256"]:
                raise UserError(
                    f"{self.folder / entry['file']} is not what line {number} of {MANIFEST} says (sha256): one of them "
                    "was edited; undo that, or delete the document to have another one written"
                )

    def _set_aside_unlisted(self, entries: list[dict]) -> None:
        """A lost last line explains one document without a line: it is kept, as NAME.orphan, but not trained on."""
        listed = {entry["file"] for entry in entries}
        unlisted = sorted(p for p in self.folder.iterdir() if _FILE_NAME.fullmatch(p.name) and p.name not in listed)
        latest = max(map(_number, listed), default=0)
        if len(unlisted) > 1 or any(_number(path.name) < latest for path in unlisted):
            names = ", ".join(path.name for path in unlisted[:3])
            raise self._edited(f"{len(unlisted)} documents have no line in it ({names}{', …' * (len(unlisted) > 3)})")
        for path in unlisted:
            path.rename(path.with_name(path.name + ".orphan"))
            self.notes.append(f"{path.name}: its line is lost, so it was renamed to {path.name}.orphan")

    def _rewrite(self, entries: list[dict]) -> None:
        _write(self._manifest, b"".join(map(_line, entries)))

    def _read_rejected(self) -> tuple[Counter, set[tuple[str, int, int]]]:
        """What is on record of earlier rejections. A line that cannot be read costs no more than one more attempt."""
        reasons, tried = Counter(), set()
        path = self.folder / REJECTED
        content = path.read_bytes() if path.exists() else b""
        if content and not content.endswith(b"\n"):
            content = content[: content.rfind(b"\n") + 1]
            _write(path, content)
        for line in content.splitlines():
            try:
                record = json.loads(line)
                attempt = _attempt(record)
                reasons[str(record["reason"])] += 1
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            tried.add(attempt)
        return reasons, tried


def text_of(content: str) -> str:
    """A document's own words: what stands after the request, if one does, and before an end marker, if one does."""
    return content.rpartition(REQUEST_END)[2].replace("<end>", "").strip()


def _attempt(record: Mapping) -> tuple[str, int, int]:
    return record["kind"], record["seed"] - record["index"], record["index"]


def _number(name: str) -> int:
    """The number in a document's file name (or in that of one set aside); 0 where it is none."""
    found = _FILE_NAME.fullmatch(name.removesuffix(".orphan"))
    return int(found[1]) if found else 0


def _line(entry: Mapping) -> bytes:
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8")


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _write(path: Path, content: bytes) -> None:
    """Replaces the file at `path`, all at once: a reader, or a start after a kill, sees the old or the new one."""
    temporary = path.with_name(f".{path.name.lstrip('.')}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _append(path: Path, line: bytes) -> None:
    """Adds `line` and flushes it to the disk; on an error the file is cut back to what it was."""
    with open(path, "ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise


def _flush_folder(folder: Path) -> None:
    """Makes a rename last through a power cut as well, where folders can be opened (not on Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _locked(folder: Path) -> int:
    """An open file that holds the folder's lock: the system takes it back when the process ends, however it ends."""
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 32).decode("ascii", "replace").strip()
        os.close(handle)
        raise UserError(f"{folder} is being written by another data_generator.py (process {holder or '?'})") from None
    os.ftruncate(handle, 0)
    os.write(handle, f"{os.getpid()}\n".encode())
    return handle


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what the system says about `path` into a line for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full: {path} could not be written; what was kept is safe: make room and start again"
            ) from error
        raise UserError(f"{error.filename or path}: {error.strerror or error}") from error
