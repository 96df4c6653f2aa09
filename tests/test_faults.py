"""What happens to a training process: killed, interrupted, out of disk, out of memory, two at once.

Each test uses a real process that runs train.py. tests/test_trainer.py kills at every moment, and spoils losses.
"""

import json
import os
import pty
import random
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
from small_runs import ROOT, SHAPE, Training, assert_same_run

from mamba2_min.checkpoints import checkpoint
from mamba2_min.training.guards import deferred_signals
from mamba2_min.training.metrics import read_metrics

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and limits as POSIX has them")
FILES = {"config.json", "tokenizer.json", "settings.json", "model.pt", "last.pt", "metrics.jsonl", "loss.png"}
FLAGS = [word for name, value in SHAPE.items() for word in ("--" + name.replace("_", "-"), value)] + [
    "--min-count",
    1,
    "--context",
    16,
    "--batch-size",
    3,
    "--micro-batch",
    2,
    "--dropout",
    0.1,
    "--lr",
    0.01,
    "--log-every",
    2,
    "--patience",
    0,
]


@pytest.fixture
def training(tmp_path, data):
    """Starts train.py in a process. What a test leaves running is killed."""
    started = []

    def start(*arguments, out="run", data=data, **options):
        said = tmp_path / f"said-{len(started)}.txt"
        command = ["--data", data, "--out", tmp_path / out, *FLAGS, *arguments]
        started.append(Training(*command, said=said, **options))
        return started[-1]

    yield start
    for one in started:
        if one.process.is_alive():
            one.process.kill()
        one.process.join()


def last_line(training):
    text = training.text()
    assert "Traceback" not in text, text
    return text.rstrip("\n").split("\n")[-1]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)


def killed_again_and_again(tmp_path, training, kills, steps, seed):
    """A training that is killed at random moments must end like one that never was."""
    flags = ("--max-steps", steps, "--eval-every", 10, "--save-every", 4)
    assert training(*flags, out="whole").wait() == 0
    metrics = tmp_path / "killed" / "metrics.jsonl"
    lines = len(read_metrics(tmp_path / "whole" / "metrics.jsonl"))
    draw = random.Random(seed)
    for k in range(kills):
        one = training(*flags, "--resume", out="killed")
        far_enough = int(0.8 * lines * (k + draw.random()) / kills)
        wait_for(lambda n=far_enough: (metrics.read_bytes().count(b"\n") if metrics.exists() else 0) >= n)
        time.sleep(draw.uniform(0, 0.03))
        os.kill(one.pid, signal.SIGKILL)
        assert one.wait() == 128 + signal.SIGKILL, one.text()
    last = training(*flags, "--resume", out="killed")
    assert last.wait() == 0, last.text()
    assert {p.name for p in (tmp_path / "killed").iterdir()} == FILES
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    steps_seen = [r["step"] for r in read_metrics(metrics) if r["split"] == "train"]
    assert steps_seen == list(range(2, steps + 1, 2))


def test_three_kills_at_random_moments_change_nothing(tmp_path, training):
    killed_again_and_again(tmp_path, training, kills=3, steps=40, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_twenty_five_kills_at_random_moments_change_nothing(tmp_path, training, seed):
    killed_again_and_again(tmp_path, training, kills=25, steps=200, seed=seed)


@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(tmp_path, training, number, status):
    flags = ("--max-steps", 40, "--eval-every", 20, "--save-every", 1000)
    one = training(*flags)
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    os.kill(one.pid, number)
    assert one.wait() == status
    assert "Traceback" not in one.text()
    hint = re.search(r"^saved       go on with: python train\.py (.*) --resume$", one.text(), re.M)
    assert hint and f"--out {tmp_path / 'run'}" in hint[1], one.text()
    saved = checkpoint.load_tensors(tmp_path / "run" / "last.pt")
    assert 0 < saved["step"] < 40
    again = training(*flags, "--resume")
    assert again.wait() == 0 and f"resume      from step {saved['step']}" in again.text()
    assert training(*flags, out="whole").wait() == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_second_signal_ends_it_at_once(tmp_path, training):
    one = training("--max-steps", 100_000, "--eval-every", 100_000, "--save-every", 100_000)
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    os.kill(one.pid, signal.SIGSTOP)  # both signals are there before the step can end
    os.kill(one.pid, signal.SIGINT)
    os.kill(one.pid, signal.SIGTERM)
    os.kill(one.pid, signal.SIGCONT)
    assert one.wait(20) in (130, 143)


def test_a_window_that_closes_may_send_several_signals():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with deferred_signals() as caught:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert caught == [signal.SIGHUP] * 3
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_under_nohup_a_closed_window_changes_nothing(tmp_path, training):
    one = training("--max-steps", 60, "--eval-every", 60, nohup=True)
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    os.kill(one.pid, signal.SIGHUP)
    assert one.wait() == 0, one.text()
    assert "all 60 steps done" in one.text()


# The screen


def ended_well(tmp_path, one, step=40):
    """A training came to its end, saved, and showed no traceback."""
    assert one.wait() == 0, one.text()
    assert "Traceback" not in one.text() and "Exception ignored" not in one.text(), one.text()
    assert checkpoint.load_tensors(tmp_path / "run" / "last.pt")["step"] == step
    assert {p.name for p in (tmp_path / "run").iterdir()} == FILES


UNSEEN = ("--max-steps", 40, "--eval-every", 5, "--save-every", 1000)


def test_a_closed_pipe_does_not_end_a_training(tmp_path, training):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    one = training(*UNSEEN, stdout=pipe)
    with open(pipe) as head:
        assert head.readline().startswith("documents")
    ended_well(tmp_path, one)
    assert one.text() == "note: standard output cannot be written (Broken pipe); the training goes on\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_for_the_screen_does_not_end_a_training(tmp_path, training):
    one = training(*UNSEEN, stdout="/dev/full")
    ended_well(tmp_path, one)
    assert one.text().count("\n") == 1 and "No space left on device" in one.text()


def test_letters_that_the_screen_lacks_do_not_end_a_training(tmp_path, training):
    folder = tmp_path / "сказки"
    folder.mkdir()
    for k in range(12):
        (folder / f"{k}.md").write_text(f"Жил-был кот, и было у него {k} мышей. " * 8, encoding="utf-8")
    one = training(*UNSEEN, data=folder, encoding="cp1252")
    ended_well(tmp_path, one)
    assert r"\u043a\u043e\u0442" in one.text()  # кот


def test_a_closed_terminal_does_not_end_a_training(tmp_path, training):
    """`disown` keeps the signal away; what is left of the terminal are errors."""
    main, side = pty.openpty()
    one = training(*UNSEEN, terminal=os.ttyname(side), nohup=True)
    read_until(main, b"documents")
    os.close(main)
    os.close(side)
    ended_well(tmp_path, one)


def test_a_closed_window_saves_and_ends(tmp_path, training):
    main, side = pty.openpty()
    never = 100_000
    flags = ("--max-steps", never, "--eval-every", never, "--save-every", never)
    one = training(*flags, terminal=os.ttyname(side))
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    os.close(side)
    os.close(main)
    assert one.wait() == 128 + signal.SIGHUP
    assert 0 < checkpoint.load_tensors(tmp_path / "run" / "last.pt")["step"] < never


def read_until(terminal, text):
    received = b""
    while text not in received:
        received += os.read(terminal, 4096)


def test_resume_where_nothing_was_saved_begins_and_says_so(tmp_path, training):
    one = training("--max-steps", 2, "--resume")
    assert one.wait() == 0 and "resume      nothing saved yet: from the beginning" in one.text()
    again = training("--max-steps", 2, "--resume")
    assert again.wait() == 0 and "this run has ended already; nothing is changed" in again.text()


def test_two_trainings_into_one_folder(tmp_path, training):
    first = training("--max-steps", 100_000)
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    for flag in ("--resume", "--overwrite"):
        second = training("--max-steps", 100_000, flag)
        assert second.wait() == 2
        assert last_line(second) == (
            f"error: another training is writing into {tmp_path / 'run'}; wait for it, or take another --out"
        )
    assert first.process.is_alive()
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert training("--max-steps", 2, "--overwrite").wait() == 0  # the lock died with its process


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(tmp_path, training):
    out = tmp_path / "run"
    assert training("--max-steps", 4, "--eval-every", 4).wait() == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    on = ("--max-steps", 400, "--resume", "--accept", "max-steps,save-every,eval-every", "--eval-every", 400)
    size = len(before["last.pt"])
    for room in (size // 2, size - 1):  # in the middle of the new file, and at its very end
        full = training(*on, "--save-every", 2, limits={resource.RLIMIT_FSIZE: room})
        assert full.wait() == 2
        assert last_line(full) == (
            f"error: cannot write {out / 'last.pt'}: File too large; the one from before is unchanged"
        )
        assert {p.name for p in out.iterdir()} == before.keys()
        assert (out / "last.pt").read_bytes() == before["last.pt"]
        assert (out / "model.pt").read_bytes() == before["model.pt"]
    goes_on = training("--max-steps", 8, "--resume", "--accept", "max-steps,save-every,eval-every", "--eval-every", 4)
    assert goes_on.wait() == 0


def test_a_full_disk_tears_no_line_of_metrics(tmp_path, training):
    out = tmp_path / "run"
    assert training("--max-steps", 40, "--eval-every", 40).wait() == 0
    whole = (out / "metrics.jsonl").read_bytes()
    on = ("--max-steps", 400, "--resume", "--accept", "max-steps,save-every", "--eval-every", 40)
    full = training(*on, "--save-every", 400, limits={resource.RLIMIT_FSIZE: len(whole) + 50})
    assert full.wait() == 2
    assert "cannot write" in last_line(full) and "File too large" in last_line(full)
    assert (out / "metrics.jsonl").read_bytes() == whole


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere an address space has no limit")
def test_out_of_memory_is_one_line_that_says_what_to_lower(tmp_path, training):
    flags = ("--max-steps", 2, "--batch-size", 2000, "--micro-batch", 0, "--d-model", 256, "--ignore-memory")
    one = training(*flags, limits={resource.RLIMIT_AS: 400 << 20})
    assert one.wait() == 2
    assert re.match(
        r"error: out of memory in step 1, with 2000 windows of 16 at a time: pass --micro-batch 1000 ", last_line(one)
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere an address space has no limit")
def test_batch_size_auto_finds_a_micro_batch_that_fits(tmp_path, training):
    flags = ("--max-steps", 1, "--batch-size", 2000, "--micro-batch", "auto", "--d-model", 64, "--ignore-memory")
    one = training(*flags, limits={resource.RLIMIT_AS: 200 << 20})
    assert one.wait() == 0, one.text()
    assert re.search(r"^step      1  out of memory: now \d+ windows at a time, the same batch$", one.text(), re.M)


def test_what_an_earlier_process_left_half_written_is_taken_away(tmp_path, training):
    out = tmp_path / "run"
    out.mkdir()
    leftovers = [out / ".last.pt.abc.tmp", out / ".metrics.jsonl.x.tmp", out / "tokenizer.json.partial"]
    for path in leftovers:
        path.write_bytes(b"half")
    mine = out / ".notes.tmp"
    mine.write_text("not ours to take")
    assert training("--max-steps", 1).wait() == 0
    assert not any(path.exists() for path in leftovers) and mine.exists()


@pytest.mark.slow
def test_a_few_faults_of_the_campaign(tmp_path):
    """benchmarks/faults.py in small: every fault is survived, in training, fine-tuning and generating."""
    command = [sys.executable, "-m", "benchmarks.faults", "--faults", "36", "--seed", "7", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "faults-cpu.json").read_text())
    assert [result["setting"] for result in results] == ["fine-tuning", "generating", "training"]
    counted = [row for result in results for row in result["peers"].values()]
    assert sum(row["faults"] for row in counted) == sum(row["survived"] for row in counted) >= 36
