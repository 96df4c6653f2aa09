"""Every file is read and written through files.py: regular files alone, bounded, never through a link, honest words.

The last test finds what goes around it.
"""

import ast
import errno
import json
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

import mamba2_min
from mamba2_min import files
from mamba2_min.checkpoints import checkpoint
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.training.metrics import MetricsLog
from mamba2_min.training.runs import read_plan

posix = pytest.mark.skipif(os.name != "posix", reason="links, pipes and devices as POSIX has them")


@pytest.fixture(autouse=True)
def _nothing_said_before(monkeypatch):
    monkeypatch.setattr(files, "_said", set())


def refusal(call) -> str:
    """The one line of the UserError that `call` must raise, within seconds."""
    found: list[BaseException] = []

    def run():
        try:
            call()
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for ever"
    assert found and isinstance(found[0], UserError), found
    text = str(found[0])
    assert text and "\n" not in text
    return text


# What is not a file


def pipe(path):
    os.mkfifo(path)


def zeros(path):
    path.symlink_to("/dev/zero")


def terminal(path):
    path.symlink_to("/dev/tty")


def folder(path):
    path.mkdir()


def loop(path):
    path.symlink_to(path)


def dangling(path):
    path.symlink_to(path.parent / "nowhere")


def listener(path):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name is at most 108 bytes long
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


def nothing(path):
    pass


ODD_FILES = [pipe, zeros, terminal, folder, loop, dangling, listener, nothing]
ODD_PATHS = ["a" * 300, "a\0b", "a\ud800b", "file/inside", "x" * 5000, ""]
READERS = {
    "read_bytes": lambda path: files.read_bytes(path, 1000),
    "read_text": lambda path: files.read_text(path, 1000),
    "load_json": files.load_json,
    "load_tensors": checkpoint.load_tensors,
    "tokenizer": WordTokenizer.load,
}


@posix
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("make", ODD_FILES, ids=lambda make: make.__name__)
def test_what_is_not_a_file_is_refused_at_once(tmp_path, make, reader):
    path = tmp_path / "odd"
    make(path)
    assert str(path) in refusal(lambda: READERS[reader](path))


@posix
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ODD_PATHS, ids=lambda name: repr(name[:12]))
def test_paths_that_no_file_can_have(tmp_path, name, reader):
    (tmp_path / "file").write_text("{}")
    refusal(lambda: READERS[reader](os.path.join(tmp_path, name)))


@posix
@pytest.mark.parametrize("make", ODD_FILES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["config.json", "model.pt", "model.safetensors"])
def test_a_model_folder_with_what_is_not_a_file(tmp_path, name, make):
    if name == "model.safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
        config = {"model_type": "mamba2", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_heads": 1}
        (tmp_path / "config.json").write_text(json.dumps({**config, "head_dim": 16, "n_groups": 1}))
    elif name == "model.pt":
        (tmp_path / "config.json").write_text('{"vocab_size": 9}')
    make(tmp_path / name)
    refusal(lambda: Mamba2LM.from_pretrained(tmp_path))


@posix
@pytest.mark.parametrize("name", ODD_PATHS, ids=lambda name: repr(name[:12]))
def test_folders_that_cannot_be(tmp_path, name, monkeypatch):
    """A file or nothing where a folder should be, names too long, a loop of links: for reading and for writing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    path = name or "file"
    for call in (
        lambda: Mamba2LM.from_pretrained(path),
        lambda: files.names_in(path),
        lambda: files.make_folder(path),
        lambda: files.locked(path).__enter__(),
        lambda: read_plan(path),
        lambda: files.save_json(os.path.join(path, "x.json"), {}),
        lambda: files.append_line(os.path.join(path, "x.jsonl"), b"{}\n"),
    ):
        refusal(call)
    assert not files.is_folder(path) and not files.exists(os.path.join(path, "x"))
    loop(tmp_path / "loop")
    assert "a broken link, where a folder is wanted" in refusal(lambda: files.make_folder("loop"))
    refusal(lambda: files.names_in("loop"))


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    """Whoever runs this may be allowed to read everything, so the system's answer is put in its place."""

    def denied(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "listdir", denied)
    assert "Permission denied" in refusal(lambda: files.names_in(tmp_path))
    assert "Permission denied" in refusal(lambda: Mamba2LM.from_pretrained(tmp_path))
    monkeypatch.setattr(os, "open", denied)
    assert "Permission denied" in refusal(lambda: files.locked(tmp_path).__enter__())
    assert "Permission denied" in refusal(lambda: files.save_json(tmp_path / "a.json", {}))


# Bounds


def test_more_bytes_than_are_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 1001)
    assert "1,001 bytes" in refusal(lambda: files.read_bytes(path, 1000))
    assert files.read_bytes(path, 1001) == b"x" * 1001
    path.write_bytes(b"")
    assert files.read_text(path, 0) == ""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="a file without a length, as Linux has them")
def test_a_file_that_does_not_know_its_length():
    assert os.stat("/proc/self/status").st_size == 0
    assert "more than the 10 bytes" in refusal(lambda: files.read_bytes("/proc/self/status", 10))


def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc\xff")
    assert "not UTF-8: byte 0xFF at 3" in refusal(lambda: files.read_text(path, 100))
    assert files.read_text(path, 100, encoding="latin-1") == "abcÿ"


BAD_JSON = {
    "": "Expecting value",
    "{": "Expecting property name",
    "[" * 100_000: "nested too deeply",
    "[" * 101 + "]" * 101: "nested too deeply",
    '{"a": 1, "b": {"c": 1, "d": 2, "c": 1}}': "the name 'c' twice",
    "[" + "[]," * 2_000_000 + "[]]": "more than 1,048,576 values",
    "1" * 5000: "digits",
    "\ufeff{}": "BOM",
}


@pytest.mark.parametrize("text", BAD_JSON, ids=lambda text: repr(text[:20]))
def test_json_that_is_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    assert BAD_JSON[text] in refusal(lambda: files.load_json(path))
    with pytest.raises(ValueError, match=BAD_JSON[text]):
        files.parse_json(text)


def test_json_that_is_read(tmp_path):
    path = tmp_path / "a.json"
    for value in ({"a": [1, 2.5, None, True, "żółw 🦉", {"b": {}}], "c\ud800": "\udc80"}, [], 5, "x", None):
        files.save_json(path, value)
        assert files.load_json(path) == value
    deep: list = []
    for _ in range(99):
        deep = [deep]
    files.save_json(path, deep)
    assert files.load_json(path) == deep
    assert files.parse_json(b'{"limit": [0.0, Infinity]}')["limit"][1] == float("inf")
    path.write_bytes(b'{"a": "\xff"}')
    assert "not valid JSON" in refusal(lambda: files.load_json(path))


# Links


@posix
def test_links_are_read_unless_they_must_not_be(tmp_path):
    (tmp_path / "there").write_text("text")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there")
    assert files.read_text(link, 10) == "text"
    assert f"{link} is a link, where a file is wanted" in refusal(lambda: files.read_text(link, 10, follow=False))


WRITERS = {
    "write_atomically": lambda path: files.write_atomically(path, lambda file: file.write(b"new")),
    "save_json": lambda path: files.save_json(path, {"new": 1}),
    "open_append": lambda path: files.open_append(path).close(),
    "append_line": lambda path: files.append_line(path, b"new\n"),
    "open_own": lambda path: os.close(files.open_own(path, os.O_RDWR | os.O_CREAT)),
    "save_tensors": lambda path: checkpoint.save_tensors(path, {"new": 1}),
    "metrics": lambda path: MetricsLog(path).append(step=1, split="train", loss=1.0, lr=0.1),
}


@posix
@pytest.mark.parametrize("writer", WRITERS)
def test_nothing_is_written_through_a_link(tmp_path, writer):
    victim, link = tmp_path / "outside" / "victim", tmp_path / "inside" / "link"
    victim.parent.mkdir()
    link.parent.mkdir()
    victim.write_text("old")
    for target in (victim, victim.parent / "absent", victim.parent, link, Path("/dev/null")):
        link.symlink_to(target)
        text = refusal(lambda: WRITERS[writer](link))
        assert str(link) in text and f"is a link to {target}" in text
        link.unlink()
    assert victim.read_text() == "old" and [p.name for p in victim.parent.iterdir()] == ["victim"]
    assert not list(link.parent.iterdir())


@posix
@pytest.mark.parametrize("writer", WRITERS)
def test_nothing_is_written_through_a_hard_link(tmp_path, writer):
    """A backup made with `cp -l` keeps what it had, and the run goes on."""
    victim, own = tmp_path / "victim", tmp_path / "own"
    victim.write_bytes(b"old\n")
    os.link(victim, own)
    WRITERS[writer](own)
    assert victim.read_bytes() == b"old\n" and os.stat(victim).st_nlink == 1
    assert own.exists() and os.stat(own).st_ino != os.stat(victim).st_ino
    if writer in ("append_line", "open_append", "open_own", "metrics"):
        assert own.read_bytes().startswith(b"old\n")


@posix
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("make", [pipe, folder, listener], ids=lambda make: make.__name__)
def test_what_is_not_a_file_is_not_written_to(tmp_path, make, writer):
    path = tmp_path / "odd"
    make(path)
    kind = stat.S_IFMT(path.lstat().st_mode)
    assert str(path) in refusal(lambda: WRITERS[writer](path))
    assert stat.S_IFMT(path.lstat().st_mode) == kind and len(list(tmp_path.iterdir())) == 1


@posix
def test_a_folder_may_itself_be_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "there")
    with files.locked(tmp_path / "run"):
        files.save_json(tmp_path / "run" / "a.json", 1)
        files.append_line(tmp_path / "run" / "b", b"line\n")
    assert {p.name for p in (tmp_path / "there").iterdir()} == {"a.json", "b"}


@posix
def test_a_link_among_what_will_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "victim").write_text("old")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").symlink_to(tmp_path / "victim")
    text = refusal(lambda: files.locked(tmp_path / "run", ["model.pt", "last.pt"]).__enter__())
    assert f"{tmp_path / 'run' / 'last.pt'} is a link to {tmp_path / 'victim'}" in text


@posix
def test_what_is_taken_away_is_the_link(tmp_path):
    (tmp_path / "victim").write_text("old")
    run = tmp_path / "run"
    run.mkdir()
    leftover = run / ".last.pt.abc.tmp"
    leftover.symlink_to(tmp_path / "victim")
    with files.locked(run, ["last.pt"]):
        assert not leftover.is_symlink()
    files.remove(run / "absent")
    assert (tmp_path / "victim").read_text() == "old"
    (run / "folder").mkdir()
    assert "cannot take" in refusal(lambda: files.remove(run / "folder"))


# Whole or not at all, and what drives cannot promise


def failing(monkeypatch, name, number, when=lambda *args: True):
    """Has os.`name` fail with an errno, where `when(*args)`."""
    real = getattr(os, name)

    def call(*args, **kwargs):
        if when(*args):
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, call)


def is_folder_handle(handle):
    return stat.S_ISDIR(os.fstat(handle).st_mode)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("old")

    def half(file):
        file.write(b"new")
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = "No space left on device; the one from before is unchanged"
    assert kept in refusal(lambda: files.write_atomically(path, half))
    with pytest.raises(KeyError):
        files.write_atomically(path, lambda file: {}["a bug is not hidden"])
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            failing(patch, name, errno.EIO)
            assert "the one from before is unchanged" in refusal(lambda: files.save_json(path, 1))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    new = tmp_path / "b"
    with monkeypatch.context() as patch:
        failing(patch, "replace", errno.EIO)
        assert "unchanged" not in refusal(lambda: files.save_json(new, 1))


def test_where_the_old_one_is_gone_nobody_says_that_it_is_there(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("old")

    def replace(source, target):  # as on a drive that loses its connection in the middle
        os.unlink(target)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", replace)
    assert "unchanged" not in refusal(lambda: files.save_json(path, 1))


@posix
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EPERM, errno.ENOTSUP, errno.EACCES])
def test_a_drive_that_cannot_flush_a_folder(tmp_path, monkeypatch, capsys, number):
    """CIFS, NFS and FUSE: the file is written, and what was not promised is said, once."""
    failing(monkeypatch, "fsync", number, is_folder_handle)
    for value in (1, 2, 3):
        files.save_json(tmp_path / "a.json", value)
        assert files.load_json(tmp_path / "a.json") == value
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("note: ") and "cannot flush a folder" in said[0]


@posix
def test_a_drive_that_cannot_flush_a_file(tmp_path, monkeypatch, capsys):
    failing(monkeypatch, "fsync", errno.EINVAL)
    files.save_json(tmp_path / "a.json", 1)
    files.append_line(tmp_path / "b", b"line\n", flush=True)
    files.flush(tmp_path / "b")
    assert files.load_json(tmp_path / "a.json") == 1
    assert len(capsys.readouterr().err.splitlines()) == 2  # of files, and of folders


@posix
def test_a_drive_where_modes_cannot_be_changed(tmp_path, monkeypatch):
    for name in ("chmod", "fchmod", "chown", "fchown"):
        failing(monkeypatch, name, errno.EPERM)
    files.save_json(tmp_path / "a.json", 1)
    assert files.load_json(tmp_path / "a.json") == 1


@posix
def test_a_folder_that_breaks_after_the_rename_tells_no_lie(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.save_json(path, 1)
    failing(monkeypatch, "fsync", errno.EIO, is_folder_handle)
    text = refusal(lambda: files.save_json(path, 2))
    assert "is written, but may not survive" in text and "unchanged" not in text
    assert files.load_json(path) == 2


@posix
def test_a_drive_without_locks(tmp_path, monkeypatch, capsys):
    import fcntl

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with files.locked(tmp_path):
        pass
    assert "cannot lock a folder" in capsys.readouterr().err


@posix
def test_one_at_a_time(tmp_path):
    with files.locked(tmp_path / "run"):
        text = refusal(lambda: files.locked(tmp_path / "run", holder="generator").__enter__())
        assert text == f"another generator is writing into {tmp_path / 'run'}; wait for it, or take another --out"
    with files.locked(tmp_path / "run"):
        assert not list((tmp_path / "run").iterdir())


@posix
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_modes_are_those_of_the_umask(tmp_path, mask):
    old = os.umask(mask)
    try:
        files.save_json(tmp_path / "a", 1)
        files.append_line(tmp_path / "b", b"x\n")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o666 & ~mask}


def test_a_line_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "a"
    files.append_line(path, b"one\n", flush=True)
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    assert "No space left" in refusal(lambda: files.append_line(path, b"two\n", flush=True))
    assert path.read_bytes() == b"one\n"


def test_flushing_what_is_not_there(tmp_path):
    files.flush(tmp_path / "absent")
    (tmp_path / "folder").mkdir()
    assert "is a folder" in refusal(lambda: files.flush(tmp_path / "folder"))


# All readers and writers are here

# Calls that reach a file, by the name that stands before the bracket.
REACHING = {
    *("open", "io.open", "os.open", "os.fdopen", "codecs.open", "gzip.open", "os.replace", "os.rename", "os.link"),
    *("os.symlink", "os.unlink", "os.remove", "os.chmod", "os.truncate", "os.mkfifo", "json.load", "json.dump"),
    *("torch.load", "torch.save", "numpy.load", "np.load", "np.save", "np.loadtxt", "pickle.load", "pickle.loads"),
    *("pickle.dump", "zipfile.ZipFile", "tarfile.open", "tomllib.load", "fcntl.flock", "torch.jit.load"),
}
# Methods of a path, or of a package, that do so, whatever stands before the dot.
METHODS = {
    *("read_text", "read_bytes", "write_text", "write_bytes", "touch", "unlink", "rename", "symlink_to", "hardlink_to"),
    *("exists", "is_file", "is_dir", "iterdir", "mkdir"),  # which raise for names that no path can have
    *("load_file", "save_file", "savefig", "mkstemp", "NamedTemporaryFile", "copyfile", "copytree", "rmtree", "move"),
}
# {module: the calls that it may make, each with a reason}
ALLOWED = {
    "files": {"*"},
    "console": {"open", "os.open"},  # of os.devnull alone
    "checkpoints.checkpoint": {"torch.load", "torch.save", "load_file"},  # of a file that open_regular has opened
    "datagen.lists": {"read_text"},  # of the package's own data
    "datagen.recovery": {"rename"},  # within its folder, of a link itself
    "datagen.store": {"fcntl.flock"},  # of a file that open_own has opened
    "inference.terminal": {"mkdir"},  # for the user's own history of prompts
    "run": {"is_file"},  # of what is found in runs/
    "devices": {"read_text"},  # of the system's own files, whose length is 0
    "plots": {"savefig"},  # into a file that write_atomically has opened
}


def calls(tree):
    """The name of every call in a module: dotted, or the method alone where an expression stands before the dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def around(path):
    """What in a module reaches a file without files.py."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node, name in calls(tree):
        reaches = name in REACHING or (isinstance(node.func, ast.Attribute) and node.func.attr in METHODS)
        if reaches and not name.startswith(("files.", "os.path.")):
            yield node.lineno, name


PACKAGE = Path(mamba2_min.__file__).parent
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))
} | {path.stem: path for path in sorted(PACKAGE.parent.glob("*.py"))}


@pytest.mark.parametrize("name", SOURCES)
def test_no_file_is_reached_but_through_files(name):
    allowed = ALLOWED.get(name, set())
    found = [
        f"line {line}: {call}"
        for line, call in around(SOURCES[name])
        if "*" not in allowed and call not in allowed and call.rpartition(".")[2] not in allowed
    ]
    assert not found, f"{name} goes around files.py: {found}"


def test_the_search_finds_what_it_is_for(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "import json\nwith open('x') as f:\n    json.load(f)\nPath('y').write_text('z')\nfiles.remove('a')\n"
    )
    assert sorted(call for _, call in around(path)) == ["Path('y').write_text", "json.load", "open"]
