"""A folder, a template and lines that a stranger made: nothing is written through, waited for or told at length."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from datagen_script import call
from ollama_server import OllamaServer, story

from mamba2_min.datagen.store import Store
from mamba2_min.datagen.templates import load_template, load_topics
from mamba2_min.errors import UserError

QUICK = ("--backoff", "0.01", "--timeout", "0.3", "--first-timeout", "5")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs links, pipes and devices")


@pytest.fixture
def server():
    with OllamaServer() as server:
        yield server


def generate(server: OllamaServer, out: Path, documents: int = 2):
    return call("--host", server.url, "--out", out, "--documents", documents, *QUICK)


def one_line(done, *parts: object) -> None:
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(str(part) in done.stderr for part in parts), done.stderr
    assert len(done.stderr) < 2500


@pytest.fixture
def folder(server, tmp_path):
    out = tmp_path / "out"
    assert generate(server, out).returncode == 0
    return out


OWN = [".lock", "manifest.jsonl", "rejected.jsonl", ".pending.json"]


@pytest.mark.parametrize("name", [*OWN, "stories-fox-000009.md"])
@pytest.mark.parametrize("target", ["file", "nothing", "itself", "/dev/zero"])
@pytest.mark.parametrize("new", [True, False])
def test_nothing_is_written_through_a_link(server, folder, tmp_path, name, target, new):
    out = tmp_path / "new" if new else folder
    out.mkdir(exist_ok=True)
    outside = tmp_path / "outside"
    if target == "file":
        outside.write_text("precious\n")
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to({"itself": out / name, "/dev/zero": "/dev/zero"}.get(target, outside))
    one_line(generate(server, out, 4), out / name, "link")
    assert outside.read_text() == "precious\n" if target == "file" else not outside.exists()
    assert (out / name).is_symlink()


def test_a_document_that_became_a_link_is_named(server, folder, tmp_path):
    document = next(folder.glob("*.md"))
    content = document.read_bytes()
    (tmp_path / "outside.md").write_bytes(content)
    document.unlink()
    document.symlink_to(tmp_path / "outside.md")
    one_line(generate(server, folder, 4), document, "link")
    assert (tmp_path / "outside.md").read_bytes() == content


@pytest.mark.parametrize("name", ["manifest.jsonl", "rejected.jsonl", ".pending.json"])
def test_a_link_that_is_laid_during_a_run_is_not_written_through(tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_text("precious\n")
    record = {"kind": "k", "prompt": "", "model": "", "options": {}, "seed": 0, "index": 0, "created": ""}
    with Store(tmp_path / "out") as store:
        path = store.folder / name
        path.unlink(missing_ok=True)
        path.symlink_to(outside)
        with pytest.raises(UserError, match="link"):
            store.reject("k", 0, 0, "too short")
            store.add("k", "A text.", None, {**record, "eval_count": None})
    assert outside.read_text() == "precious\n"


def test_a_hard_link_keeps_what_it_has(server, folder, tmp_path):
    for name in ("manifest.jsonl", ".lock"):
        os.link(folder / name, tmp_path / name)
    before = (tmp_path / "manifest.jsonl").read_bytes(), (tmp_path / ".lock").read_bytes()
    assert generate(server, folder, 4).returncode == 0
    assert ((tmp_path / "manifest.jsonl").read_bytes(), (tmp_path / ".lock").read_bytes()) == before
    assert len((folder / "manifest.jsonl").read_text().splitlines()) == 4


def make(path: Path, what: str) -> None:
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            before = os.getcwd()
            os.chdir(path.parent)  # a socket's path may not be long
            listener.bind(path.name)
            os.chdir(before)
    elif what == "folder":
        path.mkdir()


@pytest.mark.parametrize("what", ["pipe", "socket", "folder"])
@pytest.mark.parametrize("name", [*OWN, "a document", "stories-fox-000009.md"])
def test_what_is_no_regular_file_is_one_line_at_once(server, folder, name, what):
    path = next(folder.glob("*.md")) if name == "a document" else folder / name
    make(path, what)
    begun = time.monotonic()
    one_line(generate(server, folder, 4), path, f"a {what}")
    assert time.monotonic() - begun < 10


def test_texts_of_others_that_are_no_texts_are_passed_over(server, folder):
    make(folder / "pipe.txt", "pipe")
    make(folder / "folder.md", "folder")
    (folder / "zero.txt").symlink_to("/dev/zero")
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    (folder / "again").symlink_to(folder)
    (folder / "broken.txt").write_bytes(b"caf\xe9 \x00\xff")
    with open(folder / "huge.txt", "wb") as huge:
        huge.truncate(100 << 20)
    done = generate(server, folder, 4)
    assert done.returncode == 0, done.stderr
    assert "note: 1 of the other texts are too large" in done.stdout


# --- templates, lists and topics ---


@pytest.mark.parametrize("what", ["pipe", "socket", "folder", "zero"])
@pytest.mark.parametrize("suffix", ["json", "toml", "txt"])
def test_a_template_or_a_list_of_topics_has_to_be_a_file(tmp_path, suffix, what):
    path = tmp_path / f"own.{suffix}"
    path.symlink_to("/dev/zero") if what == "zero" else make(path, what)
    flags = ("--topics", path) if suffix == "txt" else ("--kind", path)
    begun = time.monotonic()
    one_line(call("--dry-run", *flags), path, "a device" if what == "zero" else f"a {what}")
    assert time.monotonic() - begun < 5


def test_a_template_or_a_list_is_not_read_without_bounds(tmp_path):
    for name, load in (("own.json", load_template), ("topics.txt", load_topics)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(1 << 34)
        with pytest.raises(UserError, match="at most"):
            load(tmp_path / name)


@pytest.mark.parametrize(
    "named",
    [
        *("../secret.txt", "{folder}/secret.txt", "/etc/passwd", "link.txt", "below/list.txt", "./list.txt", "..", "."),
        *("", "~/x", "C:\\x", "below\\list.txt", "pipe", "folder", "/dev/zero", "a\0b", "missing.txt", "/dev/stdin"),
    ],
)
def test_a_template_names_nothing_but_files_beside_it(tmp_path, named):
    beside = tmp_path / "templates"
    (beside / "below").mkdir(parents=True)
    for path in (tmp_path / "secret.txt", beside / "below" / "list.txt", beside / "list.txt"):
        path.write_text("root:x:0:0\n")
    (beside / "link.txt").symlink_to(tmp_path / "secret.txt")
    make(beside / "pipe", "pipe")
    make(beside / "folder", "folder")
    template = {"prompt": "Write about {thing}.", "lists": {"thing": named.format(folder=tmp_path)}}
    (beside / "own.json").write_text(json.dumps(template))
    done = call("--dry-run", "--kind", beside / "own.json")
    one_line(done)
    assert "root:x" not in done.stdout + done.stderr
    template["lists"]["thing"] = "list.txt"
    (beside / "own.json").write_text(json.dumps(template))
    assert "root:x" in call("--dry-run", "--kind", beside / "own.json").stdout


@pytest.mark.parametrize(
    "template",
    [
        '{"prompt": "{word_2} {request_2}", "answer": "{request} {request_2}"}',
        '{"prompt": "a", "prompt": "b"}',
        '{"prompt": "' + "[" * 100_000,
        "[" * 100_000,
        '{"prompt": 1e999}',
        '{"prompt": "a", "min_words": ' + "9" * 5000 + "}",
        '{"' + "x" * 3_000_000 + '": 1}',
        '{"prompt": "{word.__class__}"}',
        '{"prompt": "{word[0]}"}',
        '{"prompt": "{word:>9999999999}"}',
    ],
)
def test_an_odd_template_is_one_line(tmp_path, template):
    (tmp_path / "own.json").write_text(template)
    one_line(call("--dry-run", "--kind", tmp_path / "own.json"), "own.json")


def test_half_a_character_in_a_template_does_no_harm(server, tmp_path):
    (tmp_path / "own.json").write_text('{"prompt": "Write \\ud800 of {word}.\\u0000", "lists": {"a": ["\\udfff"]}}')
    done = call(
        "--kind", tmp_path / "own.json", "--host", server.url, "--documents", 1, "--out", tmp_path / "o", *QUICK
    )
    assert done.returncode == 0, done.stderr
    assert server.asked_for("/api/chat")[0]["messages"][0]["content"].startswith("Write \ufffd of ")


def test_topics_that_are_too_few_for_a_template(tmp_path):
    (tmp_path / "own.json").write_text('{"prompt": "{subject} or {subject_2}"}')
    (tmp_path / "topics.txt").write_text("rain\n")
    done = call("--dry-run", "--kind", tmp_path / "own.json", "--topics", tmp_path / "topics.txt")
    one_line(done, "--topics: list subject has 1 items, but a prompt uses 2 at once")


# --- paths ---


@pytest.mark.parametrize("flag", ["--out", "--kind", "--topics"])
@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "loop", "file/below", "broken"])
def test_a_path_that_cannot_be_is_one_line(server, tmp_path, flag, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "broken").symlink_to(tmp_path / "missing" / "deeper")
    (tmp_path / "file").write_text("")
    path = f"{tmp_path / name}{'.json' * (flag == '--kind')}"
    one_line(call("--host", server.url, flag, path, *(("--dry-run",) if flag != "--out" else ())))


# --- lines ---

GOOD = {"kind": "stories", "seed": 5, "index": 5, "reason": "too short", "detail": ""}


@pytest.mark.parametrize(
    "line",
    [
        "null",
        "[]",
        "7",
        '"text"',
        json.dumps({**GOOD, "kind": ["stories"]}),
        json.dumps({**GOOD, "kind": None}),
        json.dumps({**GOOD, "seed": "5"}),
        json.dumps({**GOOD, "seed": 5.5}),
        json.dumps({**GOOD, "seed": True}),
        json.dumps({**GOOD, "index": {}}),
        json.dumps({**GOOD, "index": float("nan")}),
        json.dumps({**GOOD, "reason": {"a": 1}}),
        json.dumps({**GOOD, "reason": None}),
        json.dumps({**GOOD, "reason": "x" * 5_000_000}),
        json.dumps({"kind": "stories"}),
        '{"seed": ' + "9" * 10_000 + "}",
        "[" * 100_000,
        '{"kind": "stories", "kind": "stories", "seed": 1, "index": 1, "reason": "a"}',
        "\x00" * 1000,
        "\udcff\udcfe",
    ],
    ids=range(20),
)
def test_a_rejection_that_is_none_is_forgotten_and_counted(server, folder, line):
    good = json.dumps({**GOOD, "reason": "too\ud800 short\x1b[2J"})
    (folder / "rejected.jsonl").write_bytes(f"{line}\n{good}\n".encode("utf-8", "surrogateescape"))
    done = generate(server, folder, 3)
    assert done.returncode == 0, done.stderr
    assert "note: rejected.jsonl: 1 lines cannot be read, and are forgotten" in done.stdout
    assert "too\\ud800 short\\x1b[2J" in done.stdout
    assert len(done.stdout) < 4000


def test_many_reasons_do_not_flood_the_table(server, folder):
    lines = (json.dumps({**GOOD, "index": i, "seed": i, "reason": f"{i} {'y' * 250}"}) for i in range(3000))
    (folder / "rejected.jsonl").write_text("\n".join(lines) + "\n")
    done = generate(server, folder, 3)
    assert done.returncode == 0 and "and for 2,980 more reasons" in done.stdout
    assert len(done.stdout) < 10_000


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "\ud800"},
        {"prompt": "\ud800 \x1b[2J"},
        {"prompt": "x" * 5_000_000},
        {"options": {"deep": json.loads("[" * 500 + "]" * 500)}},
        {"options": {"a": float("inf")}},
        {"seed": 10**4000},
        {"index": -(10**30)},
        {"eval_count": -(10**300)},
        {"file": "x" * 5_000_000},
        {"file": "stories-fox-" + "9" * 230 + ".md"},
        {"file": "stories-fox-\u0661\u0661\u0661\u0661\u0661\u0661.md"},
        {"sha256": "\ud800"},
        {"created": "\x00"},
        {"model": 7},
        {"eval_count": 1.5},
    ],
    ids=range(15),
)
def test_an_odd_line_of_the_manifest_is_kept_as_it_is_or_one_line(server, folder, change):
    lines = (folder / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    odd = (json.dumps({**json.loads(lines[0]), **change}) + "\n").encode()
    (folder / "manifest.jsonl").write_bytes(odd + lines[1])
    next(path for path in folder.glob("*2.md")).unlink()  # so that the manifest is written again
    done = generate(server, folder, 3)
    assert (folder / "manifest.jsonl").read_bytes().startswith(odd) or "2 documents were deleted" in done.stdout
    if done.returncode:
        one_line(done)
    else:
        assert generate(server, folder, 3).returncode == 0


@pytest.mark.parametrize("content", [b"[1]", b"\x00" * 100, b"[" * 100_000, b'{"file": "../x"}', b"{}\n{}"])
def test_an_odd_pending_note_is_dropped(server, folder, content):
    (folder / ".pending.json").write_bytes(content)
    assert generate(server, folder, 3).returncode == 0
    assert not (folder / ".pending.json").exists()


def test_a_pending_note_of_a_document_on_record_does_not_list_it_twice(server, folder):
    first = json.loads((folder / "manifest.jsonl").read_text().splitlines()[0])
    (folder / ".pending.json").write_text(json.dumps({**first, "model": "other"}, indent=1))
    assert generate(server, folder, 3).returncode == 0
    assert generate(server, folder, 4).returncode == 0


# --- repeats in disguise ---

DISGUISES = [
    lambda text: "\u200b".join(text),
    lambda text: text.replace("e", "e\u2060"),
    lambda text: text.replace("a", "\U000e0061a\u00ad\u034f"),
    lambda text: text.replace("o", "o" + "\u0301\u0302" * 3),
    lambda text: "".join(chr(ord(c) + 0xFEE0) if c.isalpha() else c for c in text),
    lambda text: text.replace("t", "t\ufe0f").replace("h", "\u3164h"),
    lambda text: text.upper().replace(" ", "\u00a0"),
]


@pytest.mark.parametrize("disguise", DISGUISES, ids=range(len(DISGUISES)))
def test_a_repeat_in_disguise_is_a_repeat(server, tmp_path, disguise):
    (tmp_path / "mine.txt").write_text(disguise(story(0)), encoding="utf-8")
    server.writes = lambda seed: disguise(story(1)) if seed == 2 else story(seed)
    done = generate(server, tmp_path, 2)
    assert done.returncode == 0, done.stderr
    seeds = [json.loads(line)["seed"] for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert seeds == [1, 3]


# --- two at once ---


def test_of_two_starts_at_once_one_has_to_wait(server, tmp_path):
    server.pace = 0.005
    found = []

    def open_store():
        try:
            with Store(tmp_path):
                time.sleep(0.2)
                found.append("held")
        except UserError as error:
            found.append(str(error))

    threads = [threading.Thread(target=open_store) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(text == "held" for text in found) == 1 and any("another data_generator.py" in text for text in found)


# --- every leaf ---

ODD = [
    *(None, True, False, 0, -1, 1, 2**63, -(2**63), 10**400, 0.5, 1e308, float("nan"), float("inf"), -0.0),
    *("", "\ud800", "\udfff\ud800", "\x00", "\x1b[2J", "../x", "/etc/passwd", "x" * 100_000, "\u202e", "é", "\n", "𝟙"),
    *([], [[]], {}, {"a": {}}, [None] * 1000, ["\ud800"], {"\ud800": 1}, {"": float("nan")}),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manifest.jsonl", "rejected.jsonl", ".pending.json"])
def test_any_leaf_of_any_line_may_be_odd(server, folder, name):
    server.misbehave = lambda seed: "short" if seed == 2 else "ok"
    assert generate(server, folder, 3).returncode == 0
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    source = "manifest.jsonl" if name == ".pending.json" else name
    line = json.loads(files[source].splitlines()[-1])
    for key in [*line, "unheard of"]:
        for odd in ODD:
            for path in folder.iterdir():
                path.unlink()
            for other, content in files.items():
                (folder / other).write_bytes(content)
            changed = (json.dumps({**line, key: odd}) + "\n").encode()
            lines = files[source].splitlines(keepends=True)[:-1]
            if name == ".pending.json":
                (folder / "manifest.jsonl").write_bytes(b"".join(lines))
                (folder / name).write_bytes(changed)
            else:
                (folder / name).write_bytes(b"".join(lines) + changed)
            done = generate(server, folder, 3)
            if done.returncode:
                one_line(done)
            assert len(done.stdout) < 10_000
            assert set(files) - {"rejected.jsonl"} <= {
                path.name.removesuffix(".orphan") for path in folder.iterdir()
            }, f"{key}: {odd!r} lost a file"
