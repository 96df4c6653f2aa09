"""`data_generator.py` as its users run it: a process, a server, a folder; interrupted in every way there is."""

import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from ollama_server import HARMLESS, LASTING, PASSING, OllamaServer, faults, story

from mamba2_min.datagen.duplicates import NearDuplicates, jaccard, signature
from mamba2_min.datagen.judging import Rules, judge, words
from mamba2_min.datagen.screen import MOST_OPENINGS

SCRIPT = Path(__file__).parents[1] / "data_generator.py"
QUICK = ("--backoff", "0.01", "--timeout", "0.3", "--first-timeout", "5")


@pytest.fixture
def server():
    with OllamaServer() as server:
        server.stall_seconds = 2.0
        yield server


def command(*args: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, args)]


def run(*args: object, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*args), capture_output=True, text=True, timeout=120, env={**os.environ, **env}, check=False
    )


def entries(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text("utf-8").splitlines()]


def check_complete(out: Path, count: int) -> list[str]:
    """Exactly `count` documents, each whole, with a line, and unlike all others. Returns their texts."""
    listed = entries(out)
    assert len(listed) == count
    assert sorted(entry["file"] for entry in listed) == sorted(path.name for path in out.glob("*.md"))
    assert {path.name for path in out.iterdir()} <= {
        *(entry["file"] for entry in listed),
        "manifest.jsonl",
        "rejected.jsonl",
        ".lock",
    }
    texts = []
    for entry in listed:
        content = (out / entry["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        assert re.fullmatch(r"[a-z0-9-]+-\d{6}\.md", entry["file"])
        texts.append(content.decode("utf-8"))
    for key in ("sha256", "seed", "prompt"):
        assert len({entry[key] for entry in listed}) == count, key
    assert len({text.strip() for text in texts}) == count
    return texts


def one_line(done: subprocess.CompletedProcess, pattern: str) -> None:
    assert done.returncode not in (0, 130), done.stdout
    assert re.fullmatch(rf"error: .*{pattern}.*\n", done.stderr), done.stderr


# --- all together ---


def test_two_hundred_documents_in_spite_of_faults(server, tmp_path):
    server.misbehave = faults(0.3, PASSING + LASTING)
    begun = time.monotonic()
    done = run("--host", server.url, "--documents", 200, "--out", tmp_path / "out", "--workers", 4, *QUICK)
    assert done.returncode == 0, done.stderr
    texts = check_complete(tmp_path / "out", 200)
    assert all(judge(text.strip(), Rules()) is None for text in texts)
    near = NearDuplicates(0.5)
    for text in texts:
        assert near.like(signature(text)) is None
        near.add(text, signature(text))
    assert time.monotonic() - begun < 60

    table = done.stdout
    assert re.search(r"kept +200\n", table)
    rejected = [json.loads(line)["reason"] for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert re.search(rf"rejected +{len(rejected)}\n", table)
    for reason in set(rejected):
        assert re.search(rf"  {re.escape(reason)} +{rejected.count(reason)}\n", table)
    for name in ("words", "distinct words", "unique openings", "tokens"):
        assert re.search(rf"{name} +[1-9]", table)
    openings = Counter(" ".join(words(text)[:4]) for text in texts)
    told = re.findall(r"^  ([\d,]+) times +(.+)$", table, re.M)
    assert all(openings[opening] == int(count) > 1 for count, opening in told)  # those that are frequent alone
    assert len(told) == min(MOST_OPENINGS, sum(count > 1 for count in openings.values()))
    assert "train.py --data" in table
    assert "200/200" in done.stderr and "tokens/s" in done.stderr and f"{len(rejected)} rejected" in done.stderr


@pytest.mark.parametrize(
    ("seed", "most"), [(0, 5), *(pytest.param(seed, 10, marks=pytest.mark.slow) for seed in range(1, 10))]
)
def test_kills_at_random_moments(server, tmp_path, seed, most):
    out, chance, documents = tmp_path / "out", random.Random(seed), 15 * most  # not all before the last kill
    server.misbehave = faults(0.3, PASSING + LASTING + HARMLESS)
    args = command("--host", server.url, "--documents", documents, "--out", out, "--workers", 2, *QUICK)
    kills = 0
    while kills < most:
        before = manifest_size(out)
        process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted = chance.randrange(5)  # documents to let it write; 0: while it starts
        while wanted and process.poll() is None and manifest_size(out) < before + 700 * wanted:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02 if wanted else 0.6))
        assert process.poll() is None, "it has to be running to be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        check_after_a_kill(out)
    done = run(*args[2:])
    assert done.returncode == 0, done.stderr
    check_complete(out, documents)
    again = run(*args[2:])
    assert again.returncode == 0 and "nothing to do" in again.stdout
    check_complete(out, documents)


def manifest_size(out: Path) -> int:
    return (out / "manifest.jsonl").stat().st_size if (out / "manifest.jsonl").exists() else 0


def check_after_a_kill(out: Path) -> None:
    """Even before the next start: no half document, and every whole line has its document."""
    if not out.exists():
        return
    lines = (out / "manifest.jsonl").read_bytes().split(b"\n")[:-1] if (out / "manifest.jsonl").exists() else []
    for line in lines:
        entry = json.loads(line)
        assert hashlib.sha256((out / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
    assert len(list(out.glob("*.md"))) - len(lines) in (0, 1)
    assert all(path.read_text("utf-8").endswith("\n") for path in out.glob("*.md"))


@pytest.mark.parametrize(("sign", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_stopping_says_how_to_go_on(server, tmp_path, sign, status):
    server.pace = 0.008
    out = tmp_path / "out"
    args = command("--host", server.url, "--documents", 20, "--out", out)
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while manifest_size(out) < 2000:
        time.sleep(0.01)
    process.send_signal(sign)
    begun = time.monotonic()
    table, said = process.communicate(timeout=20)
    assert time.monotonic() - begun < 15
    assert process.returncode == status
    kept = len(entries(out))
    assert 2 <= kept < 20
    assert f"stopped with {kept} of 20 documents" in said and f"--out {out}" in said
    assert "Traceback" not in said and "kept" in table
    server.pace = 0
    assert run(*args[2:]).returncode == 0
    check_complete(out, 20)


def test_going_on_after_a_rejection_does_not_ask_for_it_again(server, tmp_path):
    server.misbehave = lambda seed: "short" if seed in (1, 2) else "ok"
    first = ("--host", server.url, "--out", tmp_path, "--workers", 1, *QUICK)
    assert run(*first, "--documents", 3).returncode == 0
    assert run(*first, "--documents", 5).returncode == 0
    assert [entry["seed"] for entry in entries(tmp_path)] == [0, 3, 4, 5, 6]
    assert sorted(seed for seed, _ in server.asked) == list(range(7))
    check_complete(tmp_path, 5)


def test_kinds_share_a_folder_and_requests_are_in_the_documents(server, tmp_path):
    args = ("--host", server.url, "--out", tmp_path / "mixed", *QUICK)
    (tmp_path / "topics.txt").write_text("the café ../../../etc\n日本\n")
    assert run(*args, "--documents", 2, "--with-prompts", "--topics", tmp_path / "topics.txt").returncode == 0
    server.misbehave = lambda seed: "repeat" if seed < 3 else "ok"
    assert run(*args, "--documents", 4, "--kind", "instructions", "--seed", 50).returncode == 0
    texts = check_complete(tmp_path / "mixed", 4)
    assert all(text.count("<start>") == 1 for text in texts)
    names = [entry["file"] for entry in entries(tmp_path / "mixed")]
    assert {"stories-the-cafe-etc", "stories"} == {name[:-10] for name in names[:2]}
    assert all(name.startswith("instructions-") for name in names[2:])


def test_what_it_writes_is_what_train_reads(server, tmp_path):
    corpus, documents_of = (importlib.import_module(f"mamba2_min.data.{name}") for name in ("corpus", "documents"))
    done = run(
        "--host", server.url, "--documents", 12, "--with-prompts", "--out", tmp_path / "data" / "generated", *QUICK
    )
    documents = documents_of.read_documents(tmp_path / "data")
    assert len(documents) == 12
    loaded = corpus.load_corpus(tmp_path / "data", vocab_size=8192)
    tokens = int(re.search(r"tokens +([\d,]+)", done.stdout)[1].replace(",", ""))
    assert abs(tokens - len(loaded.train) - len(loaded.validation)) < 0.1 * tokens


# --- bad input ---


def test_nobody_at_home(tmp_path):
    done = run("--host", "localhost:9", "--out", tmp_path, "--documents", 3)
    one_line(done, "localhost:9.*`ollama serve`")


def test_a_model_that_stays_loaded_for_good(server, tmp_path):
    assert run("--host", server.url, "--out", tmp_path, "--documents", 1, "--keep-alive=-1").returncode == 0
    assert server.asked_for("/api/chat")[0]["keep_alive"] == -1


def test_the_address_may_come_from_the_environment(server, tmp_path):
    done = run("--out", tmp_path, "--documents", 2, OLLAMA_HOST=f"127.0.0.1:{server.port}")
    assert done.returncode == 0
    check_complete(tmp_path, 2)


def test_no_such_model(server, tmp_path):
    done = run("--host", server.url, "--model", "lama3.1", "--out", tmp_path)
    one_line(done, "llama3.1:latest.*ollama pull lama3.1")
    assert not server.asked


def test_a_model_that_writes_nothing_good_ends_the_run_and_not_the_documents(server, tmp_path):
    server.misbehave = lambda seed: "ok" if seed < 2 else "refusal"
    args = ("--host", server.url, "--out", tmp_path, "--max-rejections", 7, "--documents", 9, *QUICK)
    done = run(*args)
    assert done.returncode == 2
    assert re.search(r"error: 7 texts in a row were rejected \(7 refusal\)", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr and re.search("refusal +7", done.stdout)
    check_complete(tmp_path, 2)


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (["--documents", 0], "--documents has to be 1 or more, not 0"),
        (["--documents", -5], "--documents has to be 1 or more, not -5"),
        (["--documents", "many"], "--documents"),
        (["--document-count", 5], "--document-count"),
        (["--kind", "storys"], "did you mean stories"),
        (["--kind", "bad.json"], "unknown field {colour}"),
        (["--topics", "missing.txt"], "missing.txt"),
        (["--workers", 0], "--workers"),
        (["--timeout", "nan"], "--timeout"),
        (["--similarity", 2], "--similarity"),
        (["--language", "xx"], "known are en, de"),
        (["--num-predict", 9000], "--num-ctx"),
        (["--min-words", 50, "--max-words", 40], "at least 50 and at most 40"),
        (["--host", "http://[bad"], "address"),
        (["--model", "a\nb"], "no model's name"),
    ],
)
def test_a_bad_argument_is_one_line(tmp_path, monkeypatch, capsys, args, pattern):
    import data_generator
    from mamba2_min.errors import run_script

    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('{"prompt": "A {colour} fox."}')
    monkeypatch.setattr(sys, "argv", ["data_generator.py", "--out", "out", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        run_script(data_generator.main)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert re.fullmatch(rf"error: .*{pattern}.*\n", said), said
    assert not Path("out").exists()


def test_an_edited_manifest(server, tmp_path):
    args = ("--host", server.url, "--out", tmp_path, *QUICK)
    assert run(*args, "--documents", 2).returncode == 0
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("# mine\n" + manifest.read_text())
    one_line(run(*args, "--documents", 3), "manifest.jsonl was edited: line 1 is not JSON")
    assert len(list(tmp_path.glob("*.md"))) == 2


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
def test_a_full_disk(server, tmp_path):
    """A real one: a file system of 128 KiB, in a name space of its own."""
    out = tmp_path / "out"
    script = " ".join(command("--host", server.url, "--documents", 300, "--out", out, *QUICK))
    inner = (
        f"mount -t tmpfs -o size=128k none {tmp_path} && {script}; echo status $?; cd {out};"
        "ls *.md | wc -l; wc -l < manifest.jsonl; tail -c 2 manifest.jsonl | od -c"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", inner], capture_output=True, text=True, timeout=60)
    if "status" not in done.stdout or "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("name spaces are not allowed here")
    assert "error: the disk is full" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    status, files, lines, end = re.search(r"status (\d+)\n(\d+)\n(\d+)\n.*(\\n)", done.stdout).groups()
    assert int(status) == 2 and int(lines) > 5 and int(files) - int(lines) in (0, 1) and end


# --- screens ---

RUSSIAN = (
    "Дождь кончился к утру среды {seed}. Старик снял шляпу со стены и вышел посмотреть на реку, которая ночью"
    " поднялась и теперь стояла у самой двери мельницы номер {seed}, и он не знал, что ему делать"
    " с этой водой {seed} раз."
)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_screen_that_lacks_letters(server, tmp_path, encoding):
    server.writes = lambda seed: " ".join(RUSSIAN.format(seed=f"{word}{seed}") for word in ("а", "бе", "вэ"))
    args = ("--host", server.url, "--out", tmp_path, "--language", "ru", "--similarity", 1, "--documents", 2, *QUICK)
    done = run(*args, PYTHONIOENCODING=f"{encoding}:strict", PYTHONUTF8="0")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert "\\u0434\\u043e\\u0436\\u0434\\u044c" in done.stdout  # the first word of both openings
    assert len(entries(tmp_path)) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("broken", ["full", "closed pipe", "closed"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_screen_that_cannot_be_written_to_costs_no_document(server, tmp_path, stream, broken):
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:
        target = {"full": full, "closed pipe": writer, "closed": subprocess.DEVNULL}[broken]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: target}
        args = command("--host", server.url, "--out", tmp_path, "--documents", 3, *QUICK)
        if broken == "closed":
            args = ["sh", "-c", f'"$@" {"1" if stream == "stdout" else "2"}>&-', "sh", *args]
        done = subprocess.run(args, text=True, timeout=60, **streams)
    os.close(writer)
    assert done.returncode == 0
    check_complete(tmp_path, 3)
    if stream == "stdout" and broken != "closed":
        assert "standard output cannot be written" in done.stderr and "Traceback" not in done.stderr


def test_prompts_in_a_file_are_the_prompts_themselves(tmp_path):
    (tmp_path / "own.json").write_text(
        json.dumps({"prompt": "Über {w}.", "lists": {"w": ["a\u200bb\x0cc", "\x1b[1md"]}})
    )
    done = run("--kind", tmp_path / "own.json", "--dry-run", PYTHONIOENCODING="utf-8")
    assert "Über a\u200bb\nc." in done.stdout and "Über d." in done.stdout


# --- what is seen before ---


@pytest.mark.parametrize("kind", ["stories", "explanations", "dialogues", "letters", "instructions"])
def test_a_dry_run_shows_ten_prompts_and_needs_nothing(tmp_path, monkeypatch, capsys, kind):
    import data_generator

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data_generator.py", "--kind", kind, "--seed", "3", "--dry-run"])
    assert data_generator.main() == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"^\[\d\] ", shown, flags=re.M)) == 10
    assert not list(tmp_path.iterdir())


def test_it_starts_quickly_without_torch():
    code = "import sys, data_generator, mamba2_min.datagen.generator; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, check=False).returncode == 0
    assert "--documents N" in run("--help").stdout


def test_the_stories_of_the_stand_in_differ():
    assert jaccard(story(1, 30), story(2, 30)) < 0.2
