"""Every file that the program reads or writes passes through here (torch's and safetensors' by `open_regular` first).

What is guaranteed, on a folder of this user's own or on one that a stranger made:

    read    open_regular, read_bytes, read_text   regular files only: a folder, pipe, socket or device is refused
            load_json, parse_json                 unopened, so nothing waits or never ends; links are followed
                                                  unless `follow` is False; never more than `max_bytes`; JSON of
                                                  bounded size, and no name twice in an object
    write   write_atomically, save_json           the old content or the new one, never a part, whatever happens
            open_append, append_line              a line is whole or absent
            every writer                          never through a link: a symbolic one is refused by name, a hard one
                                                  gives way to a copy; no pipe, no device; modes are those of the umask
    lock    locked                                one process at a time, without a lock file; ends with the process
    ask     is_file, is_folder, exists, names_in  an answer for every string that can be a path

A folder that the user names may itself be a link, and so may any folder above it: the rule is for the links inside,
to files and to folders.
What fails is a UserError of one line that names the path. What a drive cannot guarantee (CIFS, NFS and FUSE may not
flush a folder, or not lock one) is done as far as possible and reported once, on standard error.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mamba2_min.errors import UserError

JSON_BYTES = 16 << 20  # of a config, an index, settings: the largest in use have a few hundred kilobytes
JSON_VALUES = 1 << 20  # a value of two characters takes 64 bytes in memory
_JSON_DEPTH = 100  # of nested values: a recursive walk has room for it

_CLOSED = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOCTTY", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
# Errors of a drive that does not support an operation; any other error is a real one.
_UNKNOWN_TO_DRIVE = {
    getattr(errno, name)
    for name in ("EINVAL", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EPERM", "EACCES", "EBADF", "EISDIR", "ENOLCK")
    if hasattr(errno, name)
}


# Reading


def open_regular(path: str | Path, max_bytes: int | None = None, follow: bool = True) -> BinaryIO:
    """The regular file at `path`, open for reading, and at most `max_bytes` long; opening never waits.

    follow: whether the path may be a symbolic link (to a regular file). Raises UserError for anything else.
    """
    with _explained("read", path):
        _require_regular(path, os.stat(path) if follow else os.lstat(path))
        handle = os.open(path, os.O_RDONLY | _CLOSED | _NO_WAIT | (0 if follow else _NO_LINK))
        try:
            found = os.fstat(handle)  # of the file that was opened: the path may have changed since
            _require_regular(path, found)
            if max_bytes is not None and found.st_size > max_bytes:
                raise UserError(f"{path} has {found.st_size:,} bytes, and at most {max_bytes:,} are read")
            return os.fdopen(handle, "rb")
        except BaseException:
            os.close(handle)
            raise


def read_bytes(path: str | Path, max_bytes: int, follow: bool = True) -> bytes:
    """The content of a regular file of at most `max_bytes`. Raises UserError."""
    with open_regular(path, max_bytes, follow) as file, _explained("read", path):
        content = file.read(os.fstat(file.fileno()).st_size + 1)
        while len(content) <= max_bytes and (more := file.read(1 << 16)):  # the system's own say 0, some never end
            content += more
    if len(content) > max_bytes:
        raise UserError(f"{path} has more than the {max_bytes:,} bytes that are read")
    return content


def read_text(path: str | Path, max_bytes: int, encoding: str = "utf-8", follow: bool = True) -> str:
    """The text of a regular file of at most `max_bytes`. Raises UserError, also for bytes that are not `encoding`."""
    content = read_bytes(path, max_bytes, follow)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not {encoding.upper()}: byte 0x{content[error.start]:02X} at {error.start:,}"
        ) from None


def load_json(path: str | Path, max_bytes: int = JSON_BYTES, max_values: int = JSON_VALUES) -> Any:
    """The value in a JSON file. Raises UserError where it is missing, too large or broken."""
    content = read_bytes(path, max_bytes)
    try:
        return parse_json(content, max_values)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def parse_json(text: str | bytes, max_values: int = JSON_VALUES) -> Any:
    """The value of a JSON text. Raises ValueError, of one line, if it is not valid.

    It holds at most `max_values` values, which is checked before parsing by counting commas and brackets. A name that
    an object has twice is refused, because readers differ on which of the two counts.
    """
    marks = (b",", b"[", b"{") if isinstance(text, bytes) else (",", "[", "{")
    if sum(map(text.count, marks)) > max_values:  # type: ignore[arg-type]
        raise ValueError(f"it has more than {max_values:,} values")
    try:
        value = json.loads(text if isinstance(text, str) else text.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    except ValueError as error:
        raise ValueError(str(error).splitlines()[0][:200]) from None
    level, depth = [value] if isinstance(value, (dict, list)) else [], 0
    while level and depth < _JSON_DEPTH:
        parts = (part for one in level for part in (one.values() if isinstance(one, dict) else one))
        level, depth = [part for part in parts if isinstance(part, (dict, list))], depth + 1
    if level:
        raise ValueError("its values are nested too deeply")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in values if names.count(name) > 1)
        raise ValueError(f"an object has the name {twice[:40]!r} twice")
    return values


# Writing


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls `write(file)` on a new file beside `path`, flushes it to disk, and renames it into place.

    Whatever happens, `path` is either what it was or what it should be. Raises UserError where `path` is a link, the
    disk is full or the folder cannot be written; it says whether the old file is still there, and the new one is gone.
    """
    path = Path(path)
    before = _identity(refuse_link(path))
    try:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK | _CLOSED
        handle = os.open(temporary, flags, 0o666)
        try:
            # A writer may read back what it wrote, by the file or by its name.
            with open(temporary, "w+b", opener=lambda path, _: handle) as file:
                write(file)
                file.flush()
                _flush(file.fileno(), path)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        now = None
        with contextlib.suppress(OSError):
            now = _identity(os.lstat(path))
        kept = "; the one from before is unchanged" if before and now == before else ""
        raise UserError(f"cannot write {path}: {_reason(error)}{kept}") from error
    try:
        _flush_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path} is written, but may not survive a loss of power: {_reason(error)}") from error


def save_json(path: str | Path, value: Any) -> None:
    """Writes a value as JSON, atomically, in ASCII: a path may have characters that UTF-8 cannot express."""
    content = (json.dumps(value, indent=2) + "\n").encode()
    write_atomically(path, lambda file: file.write(content))


def open_append(path: str | Path) -> BinaryIO:
    """The regular file at `path`, created if it is missing, open for unbuffered appending. Raises UserError."""
    with _explained("write", path):
        return os.fdopen(open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab", buffering=0)


def append_line(path: str | Path, line: bytes, flush: bool = False) -> None:
    """Adds `line`, whole or not at all; with `flush` it is on the disk when this returns. Raises UserError."""
    with open_append(path) as file, _explained("write", path):
        before = os.fstat(file.fileno()).st_size
        try:
            rest = memoryview(line)
            while rest:  # a write may take a part, as at the end of a disk
                rest = rest[file.write(rest) :]
            if flush:
                _flush(file.fileno(), path)
        except BaseException:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def open_own(path: str | Path, flags: int) -> int:
    """A handle of the regular file at `path`, by os.open's `flags`. The file then has no other name elsewhere.

    A symbolic link is refused by name. A hard link is replaced by a copy first, so that the other name keeps its
    content. Raises UserError for a link or what is not a regular file, OSError for what the system refuses.
    """
    found = refuse_link(path)
    if found and found.st_nlink > 1:
        with open_regular(path, follow=False) as file:
            content = file.read()
        write_atomically(path, lambda copy: copy.write(content))
    handle = os.open(path, flags | _CLOSED | _NO_WAIT | _NO_LINK, 0o666)
    try:
        _require_regular(path, os.fstat(handle))
    except BaseException:
        os.close(handle)
        raise
    return handle


def refuse_link(path: str | Path) -> os.stat_result | None:
    """What is at `path`, before it is written. Raises UserError if it is a link, a folder, a pipe or a device."""
    with _explained("write", path):
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return None
        if stat.S_ISLNK(found.st_mode):
            raise UserError(f"{path} is a link to {os.readlink(path)}, and links are not written through: take it away")
        _require_regular(path, found, "cannot write: ")
        return found


def remove(path: str | Path) -> None:
    """Removes a file, or a link (not its target), if there is one. Raises UserError."""
    try:
        Path(path).unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot take {path} away: {_reason(error)}") from error


def flush(path: str | Path) -> None:
    """Returns when the content of a file, if there is one, is on the disk. Raises UserError."""
    if not exists(path):
        return
    with open_regular(path, follow=False) as file, _explained("write", path):
        _flush(file.fileno(), Path(path))
        _flush_folder(Path(path).parent)


# Folders


@contextlib.contextmanager
def locked(folder: str | Path, names: Iterable[str] = (), holder: str = "training") -> Iterator[None]:
    """Creates the folder if needed and locks it for this process. Raises UserError if another process has locked it.

    names: the files that will be written. None of them may be a link, and parts that an earlier process left half
    written are removed. holder: what writes into the folder, for the message.

    The lock is on the open folder itself, so it leaves no file and ends with the process. Windows and some network
    drives have no such lock; nothing is locked there.
    """
    folder, names = make_folder(folder), tuple(names)
    if os.name != "posix":
        yield
        return
    import fcntl

    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | _CLOSED)
    except OSError as error:
        raise UserError(f"cannot open the folder {folder}: {_reason(error)}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            text = f"another {holder} is writing into {folder}; wait for it, or take another --out"
            raise UserError(text) from error
        except OSError as error:
            fault = f"{folder}: this drive cannot lock a folder ({_reason(error)}); start no second {holder} in it"
            _say_once(handle, "lock", fault)
        there = names_in(folder)
        for own in names:
            refuse_link(folder / own)  # not only when it is to be written, hours later
            for name in there:
                if (name.startswith(f".{own}.") and name.endswith(".tmp")) or name == f"{own}.partial":
                    remove(folder / name)
        yield
    finally:
        os.close(handle)


def make_folder(folder: str | Path, follow: bool = True) -> Path:
    """The folder, created with its parents if needed; a link only with `follow`. Raises UserError if that fails."""
    if not follow and os.path.islink(folder):
        raise UserError(f"{folder} is a link, and links are not written through: take it away")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        what = "a file" if os.path.isfile(folder) else "a broken link" if os.path.islink(folder) else "no folder"
        raise UserError(f"{folder} is {what}, where a folder is wanted") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot make the folder {folder}: {_reason(error)}") from error
    return folder


def names_in(folder: str | Path) -> list[str]:
    """The names in a folder, sorted. Raises UserError where it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the folder {folder}: {_reason(error)}") from error


def is_file(path: str | Path) -> bool:
    """Whether a regular file, or a link to one, is at `path`; False too for what is not a path, where Path raises."""
    return os.path.isfile(path)


def is_folder(path: str | Path) -> bool:
    """Whether a folder, or a link to one, is at `path`; False too for what is not a path."""
    return os.path.isdir(path)


def exists(path: str | Path) -> bool:
    """Whether anything is at `path`, a broken link included; False too for what is not a path."""
    return os.path.lexists(path)


# What the above is made of


@contextlib.contextmanager
def _explained(verb: str, path: str | Path) -> Iterator[None]:
    """Turns what the system says about a path into one line. ValueError is for names that no path can have."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"cannot {verb} {path}: {_reason(error)}") from error


def _require_regular(path: str | Path, found: os.stat_result, fault: str = "") -> None:
    """Raises UserError that says what is there instead of a regular file."""
    if stat.S_ISREG(found.st_mode):
        return
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFLNK: "a link",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    kind = kinds.get(stat.S_IFMT(found.st_mode), "something else")
    raise UserError(f"{fault}{path} is {kind}, where a file is wanted")


def _reason(error: OSError | ValueError) -> str:
    """What went wrong, in the system's words. A ValueError comes from a name that no path can have."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__).splitlines()[0][:200]


def _identity(found: os.stat_result | None) -> tuple[int, ...] | None:
    """What distinguishes a file from another one at the same path."""
    return found and (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _flush(handle: int, path: Path | str) -> None:
    """Returns when an open file is on the disk, if the drive can tell."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNKNOWN_TO_DRIVE:
            raise
        _say_once(
            handle,
            "file",
            f"{path}: this drive cannot flush a file ({_reason(error)}); what is saved may be lost with the power",
        )


def _flush_folder(folder: Path) -> None:
    """Makes a rename survive a loss of power, if the system can flush a folder (Windows cannot)."""
    if os.name != "posix":
        return
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY | _CLOSED)
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNKNOWN_TO_DRIVE:
            raise
        _say_once(
            handle,
            "folder",
            f"{folder}: this drive cannot flush a folder ({_reason(error)}); the last save may be lost with the power",
        )
    finally:
        if handle is not None:
            os.close(handle)


_said: set[tuple[int, str]] = set()


def _say_once(handle: int | None, what: str, text: str) -> None:
    """Prints a note to standard error, once for each drive and thing that it cannot do."""
    key = (os.fstat(handle).st_dev if handle is not None else -1, what)
    if key not in _said:
        _said.add(key)
        with contextlib.suppress(OSError, ValueError):
            print(f"note: {text}", file=sys.stderr, flush=True)
