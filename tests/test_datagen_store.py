"""The folder: whole after a kill at any step, and careful with what somebody edited."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mamba2_min.datagen import store as store_module
from mamba2_min.datagen.store import Store
from mamba2_min.errors import UserError


def record(index: int, kind: str = "stories") -> dict:
    return {
        "kind": kind,
        "prompt": f"Write number {index}.",
        "model": "llama3.1",
        "options": {"seed": 7 + index},
        "seed": 7 + index,
        "index": index,
        "created": "2025-01-01T00:00:00+00:00",
        "eval_count": 3,
    }


def add(store: Store, index: int, text: str | None = None) -> dict:
    return store.add("stories-fox", text or f"The text of number {index}.", None, record(index))


def filled(folder: Path, count: int = 3) -> Path:
    with Store(folder) as store:
        for index in range(count):
            add(store, index)
    return folder


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def check_whole(folder: Path) -> None:
    """Every line has its file, every file its line, and nothing else lies about."""
    for entry in lines(folder):
        assert hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
    names = [entry["file"] for entry in lines(folder)]
    assert sorted(names) == sorted(path.name for path in folder.glob("*.md"))
    assert (
        not (folder / ".pending.json").exists() and not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))
    )


def test_a_document_is_a_file_and_a_line(tmp_path):
    with Store(tmp_path / "deep" / "folder") as store:
        entry = store.add("letters-cafe", "Liebe Anna,\n\nschön!", "Write to Anna.", record(0, "letters"))
        assert entry["file"] == "letters-cafe-000001.md"
        assert (store.folder / entry["file"]).read_text("utf-8") == "Write to Anna.<start>Liebe Anna,\n\nschön!\n"
        assert list(store.texts()) == [(entry["file"], "Liebe Anna,\n\nschön!")]
        assert len(store) == 1
    check_whole(tmp_path / "deep" / "folder")
    assert lines(tmp_path / "deep" / "folder") == [entry]


def test_a_second_generator_has_to_wait(tmp_path):
    with Store(tmp_path), pytest.raises(UserError, match=f"another data_generator.py .process {os.getpid()}"):
        Store(tmp_path)
    Store(tmp_path).close()


def test_rejections_are_remembered(tmp_path):
    with Store(tmp_path) as store:
        add(store, 0)
        store.reject("stories", 8, 1, "too short")
        store.reject("stories", 9, 2, "duplicate", "of a")
    (tmp_path / "rejected.jsonl").open("a").write('nonsense\n{"kind": "stories"}\n[]\n{"torn": ')
    with Store(tmp_path) as store:
        assert store.tried == {("stories", 7, index) for index in range(3)}
        assert store.rejected == {"too short": 1, "duplicate": 1}
        store.reject("stories", 10, 3, "empty")
    with Store(tmp_path) as store:
        assert store.rejected.total() == 3


# --- kills ---


def steps_of_an_add(folder: Path) -> int:
    """Adds a document in a child, and returns how many steps that took which change the disk."""
    return run_and_die(folder, at=10_000)


def run_and_die(folder: Path, at: int) -> int:
    """Adds document 3 in a child process that ends, as by SIGKILL, before step `at`. Returns the steps taken."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        steps = 0

        def counted(call):
            def counting(*args, **kwargs):
                nonlocal steps
                if steps == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                steps += 1
                os.write(writer, b".")
                return call(*args, **kwargs)

            return counting

        store = Store(folder)
        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
        Path.write_bytes, Path.unlink = counted(Path.write_bytes), counted(Path.unlink)
        add(store, 3)
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as file:
        return len(file.read())


def test_a_kill_before_any_step_loses_and_repeats_nothing(tmp_path):
    steps = steps_of_an_add(filled(tmp_path / "whole"))
    assert steps >= 6
    finished = []
    for at in range(steps):
        folder = filled(tmp_path / str(at))
        assert run_and_die(folder, at) == at
        assert all((folder / entry["file"]).exists() for entry in lines(folder)[:3])
        with Store(folder) as store:
            check_whole(folder)
            finished.append(len(store) == 4)
            if len(store) == 3:
                add(store, 3)
            assert store.tried == {("stories", 7, index) for index in range(4)}
        check_whole(folder)
        assert len(lines(folder)) == 4
    # Before the rename there is no document; from then on it is never lost.
    assert finished == sorted(finished) and True in finished and False in finished


def test_a_line_torn_anywhere_is_taken_up_again(tmp_path):
    folder = filled(tmp_path)
    whole = (folder / "manifest.jsonl").read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in (1, 2, len(last) // 2, len(last) - 1):
        # As a kill in the middle of the append leaves it: the note of what was to be written is still there.
        (folder / "manifest.jsonl").write_bytes(whole[: -len(last) + cut])
        (folder / ".pending.json").write_bytes(last)
        with Store(folder) as store:
            assert len(store) == 3
        check_whole(folder)
        assert (folder / "manifest.jsonl").read_bytes() == whole


def test_a_torn_line_without_a_note_sets_its_document_aside(tmp_path):
    folder = filled(tmp_path)
    manifest = folder / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-30])
    with Store(folder) as store:
        assert len(store) == 2 and len(store.notes) == 2
        entry = add(store, 3)
    assert (folder / "stories-fox-000003.md.orphan").exists()
    assert entry["file"] == "stories-fox-000004.md"  # a number is not used twice
    check_whole(folder)


def test_an_editor_that_drops_the_last_line_end_does_no_harm(tmp_path):
    manifest = filled(tmp_path) / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes().rstrip() + b"\n\n")
    with Store(tmp_path) as store:
        assert len(store) == 3
    manifest.write_bytes(manifest.read_bytes().rstrip())
    with Store(tmp_path) as store:
        assert len(store) == 3
        add(store, 3)
    assert len(lines(tmp_path)) == 4


def test_an_empty_note_and_temporary_files_are_cleared_away(tmp_path):
    folder = filled(tmp_path)
    (folder / ".pending.json").touch()
    (folder / ".stories-fox-000004.md.tmp").write_text("half a te")
    with Store(folder) as store:
        assert len(store) == 3
    check_whole(folder)


# --- hands ---


def test_a_deleted_document_is_replaced_and_not_written_again(tmp_path):
    folder = filled(tmp_path)
    (folder / "stories-fox-000002.md").unlink()
    with Store(folder) as store:
        assert len(store) == 2
        assert ("stories", 7, 1) in store.tried
        assert store.rejected == {"deleted by hand": 1}
    check_whole(folder)


def test_texts_of_others_are_left_alone_but_read(tmp_path):
    folder = filled(tmp_path)
    (folder / "notes.md").write_text("My own text.")
    (folder / "more").mkdir()
    (folder / "more" / "old.txt").write_text("Another.<end>\n")
    with Store(folder) as store:
        assert len(store) == 3
        assert sorted(store.texts_of_others()) == [("notes.md", "My own text."), ("old.txt", "Another.")]
    assert (folder / "notes.md").read_text() == "My own text."


def edit(folder: Path, number: int, change) -> None:
    entries = lines(folder)
    entries[number] = change(entries[number])
    text = "".join(entry if isinstance(entry, str) else json.dumps(entry) + "\n" for entry in entries)
    (folder / "manifest.jsonl").write_text(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: "hello\n", "line 2 is not JSON"),
        (lambda entry: "[1]\n", "line 2 is not an object"),
        (lambda entry: {**entry, "seed": "seven"}, "line 2 has no proper 'seed'"),
        (lambda entry: {**entry, "seed": True}, "line 2 has no proper 'seed'"),
        (lambda entry: {name: entry[name] for name in entry if name != "prompt"}, "line 2 has no proper 'prompt'"),
        (lambda entry: {**entry, "file": "../../etc/passwd"}, "line 2 names a file"),
        (lambda entry: {**entry, "file": "stories-fox-000001.md"}, "more than one line"),
        (lambda entry: {**entry, "sha256": "0" * 64}, "sha256"),
        (lambda entry: "", "1 documents have no line"),
        (lambda entry: "[" * 100_000 + "\n", "line 2 is not JSON"),
    ],
)
def test_an_edited_manifest_is_one_clear_line_and_nothing_is_lost(tmp_path, change, message):
    folder = filled(tmp_path)
    edit(folder, 1, change)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=message) as error:
        Store(folder)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_an_edited_document_is_said_and_its_folder_stays(tmp_path):
    folder = filled(tmp_path)
    (folder / "stories-fox-000002.md").write_text("Better.")
    with pytest.raises(UserError, match=r"stories-fox-000002\.md is not what line 2"):
        Store(folder)
    assert (folder / "stories-fox-000002.md").read_text() == "Better."


def test_a_lost_manifest_is_said(tmp_path):
    (filled(tmp_path) / "manifest.jsonl").unlink()
    with pytest.raises(UserError, match="3 generated documents but no manifest"):
        Store(tmp_path)
    assert len(list(tmp_path.glob("*.md"))) == 3


# --- the disk ---


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="file") as error:
            Store(folder)
        assert "\n" not in str(error.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        Store(tmp_path)


@pytest.mark.parametrize("step", range(8))
def test_a_full_disk_is_one_line_and_what_was_kept_stays(tmp_path, monkeypatch, step):
    folder, steps = filled(tmp_path), 0
    fsync = os.fsync

    def full(handle):
        nonlocal steps
        steps += 1
        if steps > step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with Store(folder) as store:
        monkeypatch.setattr(store_module.os, "fsync", full)
        try:
            add(store, 3)
        except UserError as error:
            assert "the disk is full" in str(error) and "\n" not in str(error)
        else:
            assert steps <= step
    monkeypatch.undo()
    with Store(folder) as store:
        assert len(store) in (3, 4)
    check_whole(folder)


def test_a_write_that_stops_half_way_is_taken_back(tmp_path):
    """A real limit on the size of files, in a process of its own: the append of a line fails in its middle."""
    folder = filled(tmp_path)
    size = (folder / "manifest.jsonl").stat().st_size
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[2]);"
        "from test_datagen_store import Path, Store, add, signal;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"store = Store(Path(sys.argv[1])); resource.setrlimit(resource.RLIMIT_FSIZE, ({size + 40}, {size + 40}));"
        "add(store, 3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(Path(__file__).parent)], capture_output=True, text=True
    )
    assert done.returncode == 1 and "UserError" in done.stderr.splitlines()[-1]
    assert (folder / "manifest.jsonl").stat().st_size == size
    with Store(folder) as store:
        assert len(store) == 4  # the document itself had been written, and its line is made up for
    check_whole(folder)
