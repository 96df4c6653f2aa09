"""What a run prints: its prompts if asked, the resolved settings, a progress bar, and a table at the end."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from mamba2_min.datagen.client import OllamaClient
from mamba2_min.datagen.generator import Job
from mamba2_min.datagen.kinds import Kind, compose
from mamba2_min.datagen.languages import LANGUAGES
from mamba2_min.datagen.progress import Progress
from mamba2_min.datagen.report import summarize
from mamba2_min.datagen.store import Store
from mamba2_min.printable import one_line, printable

DRY_RUN_PROMPTS = 10
MOST_OPENINGS, MOST_REASONS = 5, 20  # in the table at the end
RATE_SECONDS = 20.0  # tokens/s is the mean over this time


class Bar(Progress):
    """A bar in documents, with tokens/s, rejections and the time left; it moves while an answer comes in."""

    def __init__(self, documents: int, there: int, clients: Sequence[OllamaClient]):
        """documents: wanted in the folder. there: how many it holds already. clients: whose tokens count."""
        super().__init__()
        self._clients = clients
        self._past = deque([(time.monotonic(), self._tokens())])
        self._live = sys.stderr.isatty()
        self._bar = tqdm(
            total=documents,
            initial=there,
            unit="doc",
            dynamic_ncols=True,
            mininterval=0.2 if self._live else 30.0,  # in a log, a line now and then
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} documents [{elapsed}, {remaining} left{postfix}]",
        )

    def keep(self) -> None:
        super().keep()
        self._say()
        self._bar.update()

    def reject(self, reason: str) -> None:
        super().reject(reason)
        self._say()

    def tick(self) -> None:
        now = time.monotonic()
        if now - self._past[-1][0] >= 0.5:
            self._past.append((now, self._tokens()))
            while len(self._past) > 2 and now - self._past[0][0] > RATE_SECONDS:
                self._past.popleft()
            self._say()
            if self._live:
                self._bar.refresh()

    def note(self, text: str) -> None:
        tqdm.write(printable(f"note: {text}"), file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()

    def _tokens(self) -> int:
        return sum(client.tokens for client in self._clients)

    def _say(self) -> None:
        (then, before), (now, tokens) = self._past[0], self._past[-1]
        rate = (tokens - before) / max(now - then, 1e-9)
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s, {self.rejected.total()} rejected", refresh=False)


def note(text: str) -> None:
    """Prints a note on standard error, before there is a bar."""
    print(printable(f"note: {text}"), file=sys.stderr, flush=True)


def show_prompts(kind: Kind, seed: int) -> None:
    """The first prompts of a run. In a file or a pipe, the text itself; on a terminal, made printable."""

    def shown(text: str) -> str:
        return printable(text, keep="\n") if sys.stdout.isatty() else text

    for index in range(DRY_RUN_PROMPTS):
        prompt = compose(kind, seed, index)
        print(f"[{index}] {shown(prompt.text)}")
        if prompt.answer:
            print(f"    then, with the answer to that in place of {{request}}: {shown(prompt.answer)}")
        print()


def show_settings(job: Job, clients: Sequence[OllamaClient], out: Path, topics: Path | None) -> None:
    """The settings as resolved, before anything is done."""
    request, rules = clients[0].request, job.rules
    options = ", ".join(f"{name} {value:g}" for name, value in request.options.items())
    about = f", topics of {topics}" if topics else ""
    requests = ", with the requests" if job.with_prompts or job.kind.answer else ""
    language = f", in {LANGUAGES[rules.language].name}" if rules.language else ""
    waits = f"{request.first_timeout:g} s for a first word, {request.timeout:g} s for the next"
    addresses = ", ".join(client.address for client in clients)
    each = " each" * (len(clients) > 1)
    show_rows(
        ("model", f"{clients[0].model} at {addresses}, {job.workers} at once{each}"),
        ("options", options),
        ("writes", f"{job.documents} {job.kind.name} in {out}, seed {job.seed}{about}{requests}"),
        ("keeps", f"{rules.min_words} to {rules.max_words} words, less than {job.similarity:.0%} alike{language}"),
        ("waits", f"{waits}, {request.max_seconds:g} s in all, {request.retries} retries"),
    )


def show_rows(*rows: tuple[str, str]) -> None:
    """Names and values, one below the other."""
    width = max(len(name) for name, _ in rows) + 3
    for name, value in rows:
        print(printable(f"{name:{width}}{value}"))
    print(flush=True)


def show_table(store: Store, progress: Progress) -> None:
    """What the folder holds and what this run did, on standard output."""
    summary = summarize(store)
    frequent = summary.openings.most_common(MOST_OPENINGS)

    def so_far(count: int, here: int) -> str:
        return f"{count:,}" if count == here else f"{count:,} ({here:,} in this run)"

    reasons = [(f"  {reason}", so_far(n, progress.rejected[reason])) for reason, n in store.rejected.most_common()]
    others = len(reasons) - MOST_REASONS
    show_rows(
        ("kept", so_far(summary.documents, progress.kept)),
        ("rejected", so_far(store.rejected.total(), progress.rejected.total())),
        *reasons[:MOST_REASONS],
        *([(f"  and for {others:,} more reasons", "see rejected.jsonl")] if others > 0 else []),
        ("words", f"{summary.words:,}"),
        ("distinct words", f"{summary.distinct_words:,}"),
        ("unique openings", f"{summary.unique_openings:.0%} of the documents' first four words"),
        *((f"  {count:,} times", one_line(text, 80)) for text, count in frequent if count > 1),
        ("tokens", f"{summary.tokens:,} for train.py"),
    )
