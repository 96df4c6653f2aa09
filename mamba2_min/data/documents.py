"""From a file or a folder to documents: which files are read, how bytes become text, where a document ends.

    .md .txt                       a document each, or several with <end> between them
    .jsonl .ndjson .json .csv .tsv     a document per record (records.py)
    anything else                  not read; counted and named

docs/preparing_documents.md is the page for users.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from mamba2_min.data import clean, records
from mamba2_min.data.encodings import Guess, Undecodable, advice, check_encoding, decode, decode_as
from mamba2_min.data.findings import GUIDE, Findings, Tally, counted, listed
from mamba2_min.errors import UserError
from mamba2_min.files import open_regular

PROSE = (".md", ".txt")
SUFFIXES = PROSE + records.SUFFIXES
NOT_DOCUMENTS = ("readme.md", "readme.txt", "license.md", "license.txt")  # at the top of the folder, in any case
RULES = 2  # how documents are read and split; 1 is the first version's way, for runs that began with it

_MARKUP = (".html", ".htm", ".xhtml", ".rtf", ".ipynb", ".svg")  # text, but not prose
_BEGINNINGS_OF_MARKUP = ("<!doctype html", "<html", "<?xml", "{\\rtf", '{"', '[{"')
_END_OF_DOCUMENT = re.compile(r"<end>|<\|endoftext\|>")
_BASE64_LENGTH = 60  # characters without a space: a string of this length may be part of a picture
_SECONDS_WITHOUT_BAR = 2


@dataclass(frozen=True)
class Document:
    """One document: its `text`, and its `source`, "path/of/file.md#k", the k-th of that file, counted from 1."""

    text: str
    source: str

    @cached_property
    def key(self) -> str:
        """sha256 of the text, in hexadecimal: the same wherever the document lies and whatever its file is called."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def file(self) -> str:
        return self.source.rpartition("#")[0]


def read_documents(
    path: str | os.PathLike,
    strip: bool = True,
    notes: list[str] | None = None,
    encoding: str | None = None,
    suffixes: Collection[str] = SUFFIXES,
) -> list[Document]:
    """Every document below the folder `path`, or in the one file `path`, as `Reader` reads them.

    Lines about what was skipped or changed are appended to `notes`. Raises UserError if there is no such path, nothing
    to read, or a file that cannot be read or is not text.
    """
    reader = Reader(path, strip, encoding, suffixes=suffixes)
    documents = list(reader)
    if notes is not None:
        notes += reader.notes()
    return documents


@dataclass(frozen=True)
class File:
    """A file to read: `name` is its path within the folder; of its `size` in bytes the first `limit` are read."""

    path: Path
    name: str
    size: int
    limit: int

    @property
    def suffix(self) -> str:
        return self.path.suffix.lower()


class Reader:
    """The documents of a folder or a file, one at a time; after that, `notes()` tells what was skipped or changed.

    Files come in the order of their paths within the folder. Not read are hidden files and folders, symbolic links (so
    that nothing outside of the folder is read), files without one of `suffixes`, and at the top README.md, LICENSE.md
    and their .txt forms. A `path` that is a file is read whatever its name is.
    A file is UTF-8, or UTF-16 or UTF-32 with its mark; any other file is in `encoding`. `<end>` or `<|endoftext|>`
    stand between documents, or after each. Front matter, data in base64 and control characters are left out (clean.py).
    White space at both ends of a document is dropped, unless `strip` is False; a blank document is skipped.
    With `max_bytes` only so many bytes are read: of files in the order of a hash of their names, the last one cut.

    Raises UserError where there is no such path; and while reading, where there are no documents, where a file cannot
    be read, and, all at once, for the files that are not text.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        strip: bool = True,
        encoding: str | None = None,
        max_bytes: int | None = None,
        rules: int = RULES,
        suffixes: Collection[str] = SUFFIXES,
    ):
        self.path, self.strip, self.encoding, self.rules = Path(path), strip, encoding, rules
        self.suffixes = suffixes if rules > 1 else PROSE
        if encoding is not None:
            check_encoding(encoding)
        if max_bytes is not None and max_bytes < 1:
            raise UserError(f"the documents to read must have at least 1 byte, not {max_bytes}")
        self.found = Findings()
        everything = self._find()
        self.files = everything if max_bytes is None else _part(everything, max_bytes)
        self.n_bytes = sum(file.limit for file in self.files)
        self._part_note = ""
        if self.n_bytes < (size := sum(file.size for file in everything)):
            files = f"{len(self.files):,} of {counted(len(everything), 'file')}"
            self._part_note = f"a part of the documents: {self.n_bytes:,} of {size:,} bytes, in {files}"

    def __iter__(self) -> Iterator[Document]:
        undecodable: list[tuple[File, Undecodable]] = []
        n_documents = 0
        with progress_bar(self.n_bytes, "reading") as bar:
            for file in self.files:
                try:
                    documents = self._documents(file, self._decode(_read(file), file))
                except Undecodable as error:
                    undecodable.append((file, error))
                    continue
                if not undecodable:  # after the first one, only the names of the others matter
                    for document in documents:
                        n_documents += 1
                        yield document
                bar.update(file.limit)
        if undecodable:
            raise self._not_text(undecodable)
        if not n_documents:
            raise self._nothing()

    def notes(self) -> list[str]:
        """A line for each kind of thing that was left out or changed."""
        return self.found.notes() + ([self._part_note] if self._part_note else [])

    # Files

    def _find(self) -> list[File]:
        """The files to read, in order. Raises UserError where `path` or a folder below it cannot be read."""
        path = self.path
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no path at all
            raise UserError(f"no such file or folder: {path}") from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        if stat.S_ISREG(found.st_mode):
            if self.rules > 1 and path.suffix.lower() in _MARKUP:
                kind = path.suffix[1:].upper()
                raise UserError(f"{path} is {kind}, which is not read; {GUIDE} tells how to turn it into text")
            return [File(path, path.name, found.st_size, found.st_size)]
        if not stat.S_ISDIR(found.st_mode):
            raise UserError(f"{path} is neither a file nor a folder, but a pipe or a device")

        def fail(error: OSError) -> None:
            raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")

        files = []
        for folder, subfolders, names in os.walk(path, onerror=fail):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            for name in subfolders:  # os.walk does not enter links
                self.found.links.add(name, os.path.islink(os.path.join(folder, name)))
            at_top = Path(folder) == path
            for name in names:
                if not name.startswith(".") and not (at_top and name.lower() in NOT_DOCUMENTS):
                    file = self._file(Path(folder, name))
                    files += [file] if file else []
        return sorted(files, key=lambda file: file.name)

    def _file(self, path: Path) -> File | None:
        """The file, if it is one to read; otherwise it is counted."""
        name = path.relative_to(self.path).as_posix()
        suffix = path.suffix.lower()
        if suffix not in self.suffixes:
            if self.rules > 1:
                self.found.other_types.setdefault(suffix, Tally()).add(name)
            return None
        try:
            found = path.lstat()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        if stat.S_ISREG(found.st_mode):
            return File(path, name, found.st_size, found.st_size)
        (self.found.links if stat.S_ISLNK(found.st_mode) else self.found.not_regular).add(name)
        return None

    # Text

    def _decode(self, content: bytes, file: File) -> str:
        if self.rules == 1:
            return decode_as(content, "utf-8").removeprefix("\ufeff")
        partial = file.limit < file.size
        text = decode(content, self.encoding, partial)
        return _up_to_a_break(text) if partial and file.suffix not in records.SUFFIXES else text

    def _documents(self, file: File, text: str) -> Iterator[Document]:
        count = 0
        if file.suffix in records.SUFFIXES and file.suffix in self.suffixes:
            wholes = self._records(file, text)
        else:
            wholes = iter([self._prose(file, text)])
        del text  # a file may take a good part of the memory: no second copy
        for whole in wholes:
            parts = _END_OF_DOCUMENT.split(whole)[::-1]
            del whole
            while parts:
                part = parts.pop()
                part = part.strip() if self.strip else part
                if part and not part.isspace():
                    count += 1
                    yield Document(part, f"{file.name}#{count}")
        if not count and file.name not in self.found.bad_records.files:
            self.found.empty.add(file.name)

    def _prose(self, file: File, text: str) -> str:
        if self.rules == 1:
            return text.replace("\r\n", "\n")
        self.found.not_prose.add(file.name, text[:500].lstrip().lower().startswith(_BEGINNINGS_OF_MARKUP))
        text = self._clean(file, text)
        if file.suffix != ".md":
            return text
        body = clean.strip_front_matter(text)
        self.found.front_matter.add(file.name, body != text)
        return body

    def _records(self, file: File, text: str) -> Iterator[str]:
        for record in records.read_records(text.replace("\r\n", "\n"), file.suffix, partial=file.limit < file.size):
            if record.problem:
                self.found.bad_record(file.name, record.where, record.problem)
            else:
                self.found.record(file.name, record.shape)
                yield self._clean(file, record.text)

    def _clean(self, file: File, text: str) -> str:
        text, count = clean.fold_controls(text)
        self.found.controls.add(file.name, count)
        longest = clean.longest_string(text)
        if longest >= _BASE64_LENGTH:
            text, count, size = clean.drop_base64(text)
            self.found.base64.add(file.name, count)
            self.found.base64_size += size
            if longest >= clean.LONG:
                self.found.unbroken.add(file.name, clean.count_unbroken(text))
        return text

    def _nothing(self) -> UserError:
        if [file.path for file in self.files] == [self.path]:
            reason = f"{self.found.first_problems()} ({GUIDE})" if self.found.problems else "the file has no text"
            return UserError(f"no documents in {self.path}: {reason}")
        looked = f"{' and '.join(PROSE)} files with text in them"
        tables = [suffix for suffix in records.SUFFIXES if suffix in self.suffixes]
        looked += f", and records in {', '.join(tables)} files" if tables else ""
        found = "".join(f"; {note}" for note in self.notes())
        return UserError(
            f"no documents in {self.path}: looked for {looked}, in all folders below"
            f" (hidden files, symbolic links, and README and LICENSE at the top do not count){found}"
        )

    def _not_text(self, files: list[tuple[File, Undecodable]]) -> UserError:
        """One error that names every file which cannot be decoded, with what it seems to be."""
        expected = "UTF-8" if self.encoding is None else f"UTF-8 or {self.encoding}"
        if len(files) == 1:
            file, error = files[0]
            return UserError(f"{file.path} is not {expected}: {error}; it looks like {advice(error.guess)} ({GUIDE})")
        kinds: dict[Guess, list[str]] = {}
        for file, error in files:
            kinds.setdefault(error.guess, []).append(file.name)
        told = [
            f"{len(names):,} {'looks' if len(names) == 1 else 'look'} like {advice(guess)}: {listed(names, 40)}"
            for guess, names in sorted(kinds.items(), key=lambda item: -len(item[1]))
        ]
        return UserError(f"{len(files):,} files in {self.path} are not {expected} ({GUIDE}): {'; '.join(told)}")


def _part(files: list[File], max_bytes: int) -> list[File]:
    """Files with a total of `max_bytes`, in the order of a hash of their names; the last one is cut."""
    chosen, left = [], max_bytes
    for file in sorted(files, key=lambda file: hashlib.sha256(file.name.encode(errors="surrogatepass")).digest()):
        if file.size > left and file.suffix == ".json":  # cannot be cut: it is one value
            continue
        chosen.append(File(file.path, file.name, file.size, min(file.size, left)))
        left -= chosen[-1].limit
        if not left:
            break
    if files and not chosen:
        raise UserError(f"a .json file is one value and cannot be read in part: {files[0].name} (make it .jsonl)")
    return sorted(chosen, key=lambda file: file.name)


def _up_to_a_break(text: str) -> str:
    """`text` without its last, incomplete paragraph, line or word."""
    for sign, least in (("\n\n", 0.9), ("\n", 0.9), (" ", 0)):
        at = text.rfind(sign)
        if at > least * len(text):
            return text[:at]
    return text


def _read(file: File) -> bytes:
    """The first `file.limit` bytes of a file. Raises UserError if it cannot be read, or is no longer a file."""
    try:
        with open_regular(file.path) as opened:
            return opened.read(file.limit)
    except OSError as error:
        raise UserError(f"cannot read {file.path}: {error.strerror or error}") from None


def progress_bar(total: int, what: str, unit: str = "B") -> tqdm:
    """A bar on standard error that appears if something takes long; in a file or pipe, a line now and then."""
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=True,
        delay=_SECONDS_WITHOUT_BAR,
        mininterval=0.5 if sys.stderr and sys.stderr.isatty() else 30,
        leave=False,
        dynamic_ncols=True,
    )
