"""Faults, hundreds of them, on a schedule that a seed decides: what is lost by them? Nothing may be.

A trial is one training, fine-tuning or generating from its first to its last step, with a fault every few steps, after
each of which the same command is started again:

    kill          SIGKILL at a random moment
    stop          SIGTERM, SIGINT or SIGHUP at a random moment
    full disk     the disk fills up at a random moment, and has room again later
    read-only     the folder cannot be written, and later it can
    deleted       one of the folder's files, or a document, is gone at the next start
    two starts    the same command twice within 10 ms

A fault is survived where the process ended as promised (in one line, with the status that the fault asks for, and
without a traceback; where it goes on, it goes on), and the trial's weights, metrics and documents at the end are those
of an undisturbed run, to the last bit. One trial that ends otherwise loses all of its faults.

On Linux the disk is a small one of its own, in a name space of this process. Where that is not allowed, no file may
grow beyond a random size instead of a full disk, and modes make a folder read-only, which root is not stopped by.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.faulty_works import METRICS, RESUME, FineTuning, Generating, Process, Training, Work, same, works

KINDS = ("kill", "stop", "full disk", "read-only", "deleted", "two starts")
NAMES = tuple(work.name for work in (Training, FineTuning, Generating))
_INSIDE = "MAMBA2_MIN_FAULTS_INSIDE"  # set in the name space that has a disk of its own
_DISK_BYTES = 16 << 20
_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


class Lost(Exception):
    """Something did not end as promised; its text says what."""


class Trial:
    """One piece of work with a fault at each of several random moments.

    `injected` counts the faults by kind; those that came too late, when the work had ended, do not count.
    """

    def __init__(self, work: Work, reference: dict[str, Any], draw: random.Random, said: Path, disk: Path | None):
        self.work, self.reference, self.draw, self.said, self.disk = work, reference, draw, said, disk
        self.injected: Counter[str] = Counter()
        self.deleted = 0  # documents
        self.processes: list[Process] = []
        self.gap = False  # somebody deleted metrics.jsonl

    def run(self, kinds: list[str]) -> None:
        """Raises Lost where anything is."""
        for k, kind in enumerate(kinds):
            self.until = int(self.work.whole * 0.9 * (k + self.draw.random()) / len(kinds))
            fault: Callable[[], bool] = getattr(self, "_" + kind.replace(" ", "_").replace("-", "_"))
            self.injected[kind] += fault()
        process = self.start()
        self.expect(process, process.wait(), 0)
        self.check()

    def start(self, name: str = "said") -> Process:
        self.processes.append(self.work.start(self.said / name))
        return self.processes[-1]

    def end(self) -> None:
        """Leaves no process, and no file."""
        for process in self.processes:
            process.wait(0)
        shutil.rmtree(self.work.out, ignore_errors=True)

    def expect(self, process: Process, status: int, *wanted: int, line: str = "") -> None:
        """Raises Lost unless the process ended with one of these statuses, without a traceback, and said `line`."""
        text = process.text()
        if status not in wanted or "Traceback" in text or line not in text.rstrip("\n").rpartition("\n")[2]:
            raise Lost(f"{self.work.name} ended with {status}, not {wanted}: {text[-600:]}")

    def check(self) -> None:
        """Raises Lost unless what there is at the end is what an undisturbed run leaves."""
        found, wanted = self.work.result(), self.reference
        if isinstance(self.work, Generating):
            # Deleted documents were replaced by the next good ones: all are known, and none is there twice.
            if len(found) != self.work.whole or not all(same(text, wanted.get(k)) for k, text in found.items()):
                raise Lost(f"other documents: {sorted(found)}, not of {sorted(wanted)}")
            usual = sorted(wanted, key=int)[: self.work.whole + self.deleted]
            if not found.keys() <= set(usual):
                raise Lost(f"documents of later attempts: {sorted(found.keys() - set(usual))}")
            return
        if self.gap:  # the lines from then on are those of an undisturbed run, at the same places
            wanted = dict(wanted)
            lines, all_lines = (one.pop(METRICS, b"").splitlines() for one in (found, wanted))
            if lines != [line for line in all_lines if line in lines]:
                raise Lost("other lines in metrics.jsonl")
            for one in (found, wanted):
                one[RESUME] = {name: value for name, value in one[RESUME].items() if name != "records"}
        if not same(found, wanted):
            raise Lost(f"other files: {[k for k in found | wanted if not same(found.get(k, 0), wanted.get(k, 0))]}")

    def running(self) -> Process | None:
        """A process that has come as far as this fault's moment; None where the work ended before."""
        process = self.start()
        while process.is_running() and self.work.progress() < self.until:
            time.sleep(0.002)
        time.sleep(self.draw.uniform(0, 0.03))
        if process.is_running():
            return process
        self.expect(process, process.wait(), 0)
        return None

    # The faults. Each returns whether it struck.

    def _kill(self) -> bool:
        process = self.running()
        if process:
            process.send(signal.SIGKILL)
        return process is not None and process.wait() == 128 + signal.SIGKILL

    def _stop(self) -> bool:
        process, number = self.running(), self.draw.choice(list(_STATUS))
        if process is None:
            return False
        process.send(number)
        status = process.wait()
        if not process.text():  # it came before the program did
            return False
        self.expect(process, status, 0, _STATUS[number])
        return status != 0

    def _full_disk(self) -> bool:
        process = self.running()
        if process is None:
            return False
        if self.disk is None:
            process.send(signal.SIGKILL)
            process.wait()
            return False
        ballast = self.disk / "ballast"
        with open(ballast, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                pass
            file.truncate(max(0, os.fstat(file.fileno()).st_size - self.draw.choice([0, 4096, 1 << 15, 1 << 17])))
        status = process.wait()
        ballast.unlink()
        self.expect(process, status, 0, 1, 2)
        if status and "No space left" not in process.text() and "disk is full" not in process.text():
            raise Lost(f"a full disk was told as something else: {process.text()[-300:]}")
        return status != 0

    def _read_only(self) -> bool:
        if self.work.progress() == 0 and not self.work.out.exists():
            return False
        before = self._content()
        if self.disk:
            _mount("-o", "remount,ro", str(self.disk))
        else:
            self.work.out.chmod(0o555)
        try:
            process = self.start()
            status = process.wait()
        finally:
            if self.disk:
                _mount("-o", "remount,rw", str(self.disk))
            else:
                self.work.out.chmod(0o755)
        if self._content() != before:
            raise Lost("a folder that cannot be written was written")
        if status == 0 and self.work.progress() >= self.work.whole:  # it had come to its end: nothing is to be written
            return False
        self.expect(process, status, 1, 2, line="error: ")
        return True

    def _deleted(self) -> bool:
        """A file is taken away. The next start goes on rightly, or is refused, and goes on once it is back."""
        if not self.work.out.exists():
            return False
        names = [self.work.out / name for name in self.work.deletable]
        own = (
            list(self.work.out.glob("*.md")) if isinstance(self.work, Generating) else [*self.work.documents.iterdir()]
        )
        files = [path for path in [*names, *own[:3]] if path.exists()]
        if not files:
            return False
        path = self.draw.choice(files)
        aside, had_ended = self.said / "aside", self.work.progress() >= self.work.whole
        shutil.copy2(path, aside)
        path.unlink()
        process = self.start()
        end = time.monotonic() + self.draw.uniform(0.3, 1.5)
        while process.is_running() and time.monotonic() < end:
            time.sleep(0.002)
        if process.is_running():
            process.send(signal.SIGKILL)
            process.wait()
        elif (status := process.wait()) != 0:
            self.expect(process, status, 1, 2, line="error: ")
        elif had_ended and not isinstance(self.work, Generating):
            shutil.copy2(aside, path)
            return False
        if path.exists():  # it went on without the file, and wrote another one
            self.gap |= path.name == METRICS
            return True
        if isinstance(self.work, Generating) and path in own:
            self.deleted += 1
        else:
            shutil.copy2(aside, path)
        return True

    def _two_starts(self) -> bool:
        first = self.start()
        time.sleep(self.draw.uniform(0, 0.01))
        second = self.start("said-2")
        while first.is_running() and second.is_running():
            time.sleep(0.002)
        loser, winner = (second, first) if first.is_running() else (first, second)
        if (status := loser.wait()) == 0:  # it came to the end of the work before the other one began
            self.expect(winner, winner.wait(), 0, 2)
            return False
        self.expect(loser, status, 2, line="error: ")
        if "another" not in loser.text():
            raise Lost(f"a second start was refused for another reason: {loser.text()[-300:]}")
        time.sleep(self.draw.uniform(0, 0.5))
        winner.send(signal.SIGKILL) if winner.is_running() else None
        status = winner.wait()
        self.expect(winner, status, 0, 128 + signal.SIGKILL)
        return True

    def _content(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.work.out.iterdir() if path.is_file()}


def campaign(
    folder: Path, n_faults: int, seed: int, disk: Path | None, names: list[str], a_trial: int = 10
) -> dict[str, dict[str, Any]]:
    """{activity: {kind: {"faults": ..., "survived": ...}}}, of at least `n_faults` in all, as many in each activity."""
    (folder / "said").mkdir()
    counts: dict[str, dict[str, Any]] = {}
    with works(folder) as all_works:
        for number, work in enumerate(all_works):
            if work.name not in names:
                continue
            reference = _undisturbed(work, folder / "said" / "whole")
            table = counts[work.name] = {kind: {"faults": 0, "survived": 0} for kind in KINDS}
            trial_number = 0
            while sum(row["faults"] for row in table.values()) < -(-n_faults // len(names)):
                draw = random.Random(f"{seed} {number} {trial_number}")
                trial_number += 1
                trial = Trial(work.into((disk or folder) / "trial"), reference, draw, folder / "said", disk)
                lost = ""
                try:
                    trial.run([draw.choice(KINDS) for _ in range(a_trial)])
                except Lost as error:
                    lost = str(error)
                    print(f"LOST: {work.name}, trial {trial_number}, after {dict(trial.injected)}: {lost}")
                trial.end()
                for kind, count in trial.injected.items():
                    table[kind]["faults"] += count
                    table[kind]["survived"] += 0 if lost else count
                so_far = [sum(row[what] for row in table.values()) for what in ("survived", "faults")]
                print(f"{work.name}: {so_far[0]} of {so_far[1]} faults survived", flush=True)
                if lost and trial_number > 20:
                    break
    return counts


def _undisturbed(work: Work, said: Path) -> dict[str, Any]:
    """What the work leaves where nothing disturbs it; sets `work.whole`."""
    process = work.start(said)
    if process.wait() != 0:
        raise SystemExit(f"error: {work.name} does not even work undisturbed: {process.text()[-1000:]}")
    work.whole = work.progress()
    if isinstance(work, Generating):  # with the documents that would take the place of deleted ones
        more = Generating([*work.arguments, "--documents", 3 * work.whole], work.out, work.documents)
        more.start(said).wait()
    return work.result()


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def own_disk() -> bool:
    """Starts this program again with name spaces of its own, where that is allowed; whether this is that start."""
    if os.environ.get(_INSIDE):
        return True
    inside = ["unshare", "--map-root-user", "--mount"]
    probe = [*inside, "mount", "-t", "tmpfs", "none", tempfile.gettempdir()]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        return False
    os.environ[_INSIDE] = "1"
    os.execvp("unshare", [*inside, sys.executable, "-m", "benchmarks.faults", *sys.argv[1:]])


def main() -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--faults", type=int, default=210, help="at least so many (default: 210)")
    p.add_argument("--settings", nargs="+", choices=NAMES, default=list(NAMES), help="only these (default: all)")
    p.add_argument("--seed", type=int, default=0, help="of the schedule (default: 0)")
    p.add_argument("--quick", action="store_true", help="a few faults: does it work? Nothing is written")
    p.add_argument(
        "--out", type=Path, default=harness.RESULTS, help="folder for the JSON (default: benchmarks/results)"
    )
    args = p.parse_args()
    has_disk = own_disk()
    options = harness.Options(threads=1)
    with tempfile.TemporaryDirectory() as name:
        disk = Path(name) / "disk" if has_disk else None
        if disk:
            disk.mkdir()
            _mount("-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "none", str(disk))
        try:
            few = args.quick
            counts = campaign(Path(name), 9 if few else args.faults, args.seed, disk, args.settings, 3 if few else 10)
        finally:
            if disk:
                subprocess.run(["umount", str(disk)], check=True)
    rows = [row for table in counts.values() for row in table.values()]
    faults, survived = (sum(row[what] for row in rows) for what in ("faults", "survived"))
    print(f"{survived} of {faults} faults survived, with the same weights or documents as an undisturbed run")
    if not args.quick:
        for name, table in counts.items():
            about = {"seed": args.seed, "full disk": "a file system of its own" if has_disk else "not tried"}
            harness.save(harness.measurement("faults", name, about, options, table), args.out)
    return 0 if survived == faults else 1


if __name__ == "__main__":
    sys.exit(main())
