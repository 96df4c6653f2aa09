"""Files that are never half written, and folders that one process at a time writes into."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mamba2_min.errors import UserError


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls `write(file)` on a new file beside `path`, flushes it to disk, and renames it into place.

    Whatever happens, `path` is either what it was or what it should be. Raises UserError where the disk is full or the
    folder cannot be written; the old file is then still there, and the new one is gone.
    """
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _flush_folder(path.parent)
    except OSError as error:
        kept = "; the one from before is unchanged" if path.exists() else ""
        raise UserError(f"cannot write {path}: {error.strerror or error}{kept}") from error


def save_json(path: str | Path, value: Any) -> None:
    """Writes a value as JSON, atomically. ASCII alone: a path may have characters that UTF-8 cannot express."""
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def load_json(path: str | Path) -> Any:
    """The value in a JSON file. Raises UserError, with one line, where it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def locked(folder: str | Path, names: Iterable[str] = ()) -> Iterator[None]:
    """Makes the folder if need be and holds it for this process alone. Raises UserError where another one holds it.

    The lock is on the open folder itself, so it leaves no file and dies with the process. What an earlier process
    left half written of the files `names` is taken away. Windows and some network drives have no such lock; nothing is
    held there.
    """
    folder = make_folder(folder)
    if os.name != "posix":
        yield
        return
    import fcntl

    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot open the folder {folder}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another training is writing into {folder}; wait for it, or take another --out") from error
        except OSError:
            pass
        for name in names:
            for leftover in (*folder.glob(f".{name}.*.tmp"), folder / f"{name}.partial"):
                remove(leftover)
        yield
    finally:
        os.close(handle)


def make_folder(folder: str | Path) -> Path:
    """The folder, made with its parents if need be. Raises UserError where that cannot be done."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"{folder} is a file, where a folder is wanted") from error
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
    return folder


def remove(path: Path) -> None:
    """Takes a file away, where there is one. Raises UserError where that cannot be done."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot take {path} away: {error.strerror}") from error


def flush(path: Path) -> None:
    """Returns when a file that something else wrote is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Makes a rename survive a loss of power, where the system lets a folder be flushed (Windows does not)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
