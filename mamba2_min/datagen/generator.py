"""The work itself: attempts go out to the workers, drafts come back, the good ones are kept until there are enough.

Attempt i is fixed by (kind, seed, i): its prompt, and its sampling seed, which is seed + i. A run takes the lowest i
that are not on record yet, so a run that was killed goes on where it was. The thread that calls `generate` is the only
one to touch the folder; the workers do nothing but ask, clean and judge.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone

import numpy as np

from mamba2_min.datagen.asking import TOO_LONG, Answer, Asker, NoAnswer, Stopped
from mamba2_min.datagen.cleaning import clean, clean_request
from mamba2_min.datagen.duplicates import NearDuplicates, signature
from mamba2_min.datagen.judging import Rules, judge, words
from mamba2_min.datagen.kinds import Kind, Prompt, compose, compose_request, slug
from mamba2_min.datagen.progress import Progress
from mamba2_min.datagen.store import Store
from mamba2_min.errors import UserError

DEFAULT_RULES = Rules()
REQUEST_RULES = Rules(min_words=2, max_words=150)
MAX_FAILURES = 5  # requests in a row that got no answer, each after all of its retries
TICK_SECONDS = 0.25


@dataclass(frozen=True)
class Job:
    """What to write: `documents` in the folder at the end, of `kind`, from `seed` on, and what is acceptable.

    similarity       the Jaccard index from which on a text counts as a duplicate
    max_rejections   in a row, after which the run gives up
    """

    kind: Kind
    documents: int
    seed: int = 0
    rules: Rules = DEFAULT_RULES
    with_prompts: bool = False
    workers: int = 1
    similarity: float = 0.5
    max_rejections: int = 50


@dataclass(frozen=True)
class Draft:
    """A text that passed for itself; whether another like it is on disk already is still to be seen."""

    prompt: Prompt
    text: str
    request: str | None
    eval_count: int | None
    minima: np.ndarray


class Rejection(Exception):
    """An attempt that came to nothing. `reason` is what is counted; `answered` is False where no answer came at all."""

    def __init__(self, reason: str, answered: bool = True, detail: str = ""):
        super().__init__(reason)
        self.reason, self.answered, self.detail = reason, answered, detail


def generate(job: Job, asker: Asker, store: Store, stop: threading.Event, progress: Progress | None = None) -> bool:
    """Writes documents into `store` until it holds `job.documents`: True; or until `stop` is set: False.

    Raises UserError where going on is of no use: too many rejections or failures in a row, no server, a full disk. What
    was kept by then is kept. `stop` is the event that `asker` was made with; it is set when this ends early.
    """
    progress = progress or Progress()
    known = _Known(store, job.similarity)
    todo, done = queue.SimpleQueue(), queue.SimpleQueue()
    attempts = _attempts(job, store)
    for _ in range(job.workers):
        threading.Thread(target=_work, args=(job, asker, todo, done), daemon=True).start()
    under_way, in_a_row = 0, []
    try:
        while len(store) < job.documents:
            while under_way < min(job.workers, job.documents - len(store)):
                todo.put(next(attempts))
                under_way += 1
            index, result = _next_result(done, stop, progress)
            under_way -= 1
            if isinstance(result, Draft):
                result = known.rejection(result) or result
            if isinstance(result, Draft):
                if under_way < job.documents - len(store) - 1:  # the server need not wait for the disk
                    todo.put(next(attempts))
                    under_way += 1
                entry = store.add(_slug(job, result), result.text, result.request, _record(job, asker, result))
                known.add(entry["file"], result)
                in_a_row.clear()
                progress.keep()
            elif isinstance(result, Rejection):
                store.reject(job.kind.name, job.seed + index, index, result.reason, result.detail)
                in_a_row.append(result)
                progress.reject(result.reason)
                _check_patience(job, in_a_row)
            else:
                raise result
        return True
    except Stopped:
        return False
    finally:
        if len(store) < job.documents:
            stop.set()
        for _ in range(job.workers):
            todo.put(None)


def _attempts(job: Job, store: Store) -> Iterator[int]:
    index = 0
    while True:
        if (job.kind.name, job.seed, index) not in store.tried:
            yield index
        index += 1


def _next_result(done: queue.SimpleQueue, stop: threading.Event, progress: Progress) -> tuple[int, object]:
    """Waits for a worker in short steps, so that progress is shown and a wish to stop is heard."""
    while True:
        progress.tick()
        if stop.is_set():
            raise Stopped
        try:
            return done.get(timeout=TICK_SECONDS)
        except queue.Empty:
            continue


def _check_patience(job: Job, in_a_row: list[Rejection]) -> None:
    failures = in_a_row[-MAX_FAILURES:]
    if len(failures) == MAX_FAILURES and not any(failure.answered for failure in failures):
        raise UserError(
            f"the server gave no whole answer to {MAX_FAILURES} requests in a row ({_counted(failures)}): look at its "
            "log, then start the same command again to go on"
        )
    if len(in_a_row) >= job.max_rejections:
        raise UserError(
            f"{len(in_a_row)} texts in a row were rejected ({_counted(in_a_row)}): try another --model, other bounds, "
            "or more varied prompts; to go on all the same, start the same command again"
        )


def _counted(rejections: list[Rejection]) -> str:
    counts = Counter(rejection.reason for rejection in rejections)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


# --- one document, in a worker's thread ---


def _work(job: Job, asker: Asker, todo: queue.SimpleQueue, done: queue.SimpleQueue) -> None:
    while (index := todo.get()) is not None:
        try:
            result = write_draft(job, asker, index)
        except Exception as error:  # whatever it is, the main thread is the one to raise it
            result = error
        done.put((index, result))


def write_draft(job: Job, asker: Asker, index: int) -> Draft:
    """Attempt `index`: asks, cleans and judges. Raises Rejection, or what `Asker.ask` raises besides NoAnswer."""
    prompt, seed = compose(job.kind, job.seed, index), job.seed + index
    if prompt.answer:
        first = _asked(asker, prompt.text, seed)
        request = _acceptable(first, clean_request(first.text), REQUEST_RULES, "request: ")
        second = _asked(asker, prompt.answer.replace("{request}", request), seed)
        text = _acceptable(second, clean(second.text), job.rules)
    else:
        second, request = None, None
        first = _asked(asker, prompt.text, seed)
        text = _acceptable(first, clean(first.text), job.rules)
        if job.with_prompts:
            second = _asked(asker, compose_request(job.kind, job.seed, index, text), seed)
            request = _acceptable(second, clean_request(second.text), REQUEST_RULES, "request: ")
    counts = [answer.eval_count for answer in (first, second) if answer and answer.eval_count is not None]
    return Draft(prompt, text, request, sum(counts) if counts else None, signature(text))


def _asked(asker: Asker, prompt: str, seed: int) -> Answer:
    try:
        return asker.ask(prompt, seed)
    except NoAnswer as error:
        raise Rejection(f"no answer: {error}", answered=False) from error


def _acceptable(answer: Answer, text: str, rules: Rules, of: str = "") -> str:
    """`text`, cleaned from `answer`, where it is acceptable. Raises Rejection where it is not."""
    if answer.done_reason == TOO_LONG:
        raise Rejection(f"{of}too long")
    if answer.done_reason != "stop":
        known = answer.done_reason if answer.done_reason in ("length", "load", "unload") else "unknown"
        raise Rejection(f"{of}not ended by the model ({known})")
    reason = judge(text, rules)
    if reason:
        raise Rejection(of + reason)
    return text


# --- duplicates ---


class _Known:
    """All texts of the folder, to hold a new one against."""

    def __init__(self, store: Store, similarity: float):
        self._exact: dict[bytes, str] = {}
        self._near = NearDuplicates(similarity)
        for texts in (store.texts(), store.texts_of_others()):
            for name, text in texts:
                self._exact.setdefault(_fingerprint(text), name)
                self._near.add(name, signature(text))

    def rejection(self, draft: Draft) -> Rejection | None:
        same = self._exact.get(_fingerprint(draft.text))
        if same:
            return Rejection("duplicate", detail=f"of {same}")
        like = self._near.like(draft.minima)
        return Rejection("near duplicate", detail=f"of {like[0]}, {like[1]:.2f}") if like else None

    def add(self, name: str, draft: Draft) -> None:
        self._exact[_fingerprint(draft.text)] = name
        self._near.add(name, draft.minima)


def _fingerprint(text: str) -> bytes:
    """The same for texts that differ in letter case, white space and punctuation alone."""
    return hashlib.sha256(" ".join(words(text)).encode("utf-8", "replace")).digest()


# --- what is put on record ---


def _record(job: Job, asker: Asker, draft: Draft) -> dict:
    seed = job.seed + draft.prompt.index
    return {
        "kind": job.kind.name,
        "prompt": draft.prompt.text,
        "model": asker.model,
        "options": {**asker.manner.options, "seed": seed},
        "seed": seed,
        "index": draft.prompt.index,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "eval_count": draft.eval_count,
        "draw": dict(draft.prompt.draw),
    }


def _slug(job: Job, draft: Draft) -> str:
    """From our own lists, never from what the model wrote."""
    told = (
        draft.prompt.draw.get("subject") or draft.prompt.draw.get("word") or next(iter(draft.prompt.draw.values()), "")
    )
    return "-".join(filter(None, (slug(job.kind.name), slug(told))))
