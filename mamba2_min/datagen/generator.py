"""The main loop: attempts go to the servers, drafts come back, and good ones are kept until there are enough.

Attempt i is determined by (kind, seed, i): its prompt, and its sampling seed, which is seed + i. A run takes the lowest
i that are not recorded yet, so a run that was killed continues where it was. Only the thread that calls `generate`
writes into the folder.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np

from mamba2_min.datagen.cleaning import clean, clean_request
from mamba2_min.datagen.client import TOO_LONG, Answer, NoAnswer, OllamaClient, Stopped
from mamba2_min.datagen.duplicates import NearDuplicates, comparable, signature
from mamba2_min.datagen.judging import Rules, judge, words
from mamba2_min.datagen.kinds import Kind, Prompt, compose, compose_request, slug
from mamba2_min.datagen.pool import Pool, Server
from mamba2_min.datagen.progress import Progress
from mamba2_min.datagen.store import Store
from mamba2_min.errors import UserError
from mamba2_min.printable import one_line

DEFAULT_RULES = Rules()
REQUEST_RULES = Rules(min_words=2, max_words=150)
MAX_UNANSWERED = 5  # requests in a row that got no answer from a server, each after all of its retries


@dataclass(frozen=True)
class Job:
    """What to write: `documents` in the folder at the end, of `kind`, from `seed` on, and what is acceptable.

    workers          requests at once, for each server
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
    """A text that is acceptable in itself, but not yet compared with those on disk."""

    prompt: Prompt
    text: str
    request: str | None
    eval_count: int | None
    minima: np.ndarray


class Rejection(Exception):
    """An attempt without a document. `reason` is counted; `answered` is False if no answer came at all."""

    def __init__(self, reason: str, answered: bool = True, detail: str = ""):
        super().__init__(reason)
        self.reason, self.answered, self.detail = reason, answered, detail


def generate(
    job: Job, clients: Sequence[OllamaClient], store: Store, stop: threading.Event, progress: Progress | None = None
) -> bool:
    """Writes documents into `store`. Returns True once it holds `job.documents`, False if `stop` is set before.

    All `clients` work in parallel. One whose server fails is dropped with a note, as long as another is left. Raises
    UserError if continuing is useless: too many rejections in a row, no server left, a full disk. Documents that were
    kept stay. `stop` is the event that `clients` were made with; it is set when this ends.
    """
    progress = progress or Progress()
    known = _Known(store, job.similarity)
    pool = Pool(clients, job.workers, lambda client, index: write_draft(job, client, index), _attempts(job, store))
    in_a_row: list[str] = []  # the reasons of the rejections since the last document
    try:
        while len(store) < job.documents:
            pool.hand_out(job.documents - len(store))
            result = pool.next_result()
            progress.tick()
            if stop.is_set():
                return False
            if result is None:
                continue
            outcome, server = result.outcome, result.server
            if isinstance(outcome, Draft):
                outcome = known.rejection(outcome) or outcome
            if isinstance(outcome, Draft):
                pool.hand_out(job.documents - len(store) - 1)  # the server need not wait for the disk
                entry = store.add(_slug(job, outcome), outcome.text, outcome.request, _record(job, clients[0], outcome))
                known.add(entry["file"], outcome)
                in_a_row.clear()
                server.unanswered.clear()
                progress.keep()
            elif isinstance(outcome, Rejection):
                store.reject(job.kind.name, job.seed + result.index, result.index, outcome.reason, outcome.detail)
                in_a_row.append(outcome.reason)
                progress.reject(outcome.reason)
                _check_server(pool, server, outcome, progress)
                _check_rejections(job, in_a_row)
            elif isinstance(outcome, UserError):  # this server is of no more use, but the attempt is
                pool.take_back(result.index)
                _give_up(pool, server, outcome, progress)
            else:
                raise outcome
        return True
    except Stopped:
        return False
    finally:
        stop.set()
        pool.close()


def _attempts(job: Job, store: Store) -> Iterator[int]:
    index = 0
    while True:
        if (job.kind.name, job.seed, index) not in store.tried:
            yield index
        index += 1


def _give_up(pool: Pool, server: Server, error: UserError, progress: Progress) -> None:
    """Continues without `server`, and says so once. Raises `error` if no other is left."""
    if server in pool.servers:
        pool.give_up(server)
        if not pool.servers:
            raise error
        progress.note(f"{error}; the other servers go on")


def _check_server(pool: Pool, server: Server, rejection: Rejection, progress: Progress) -> None:
    if rejection.answered:
        server.unanswered.clear()
        return
    server.unanswered.append(rejection.reason)
    if len(server.unanswered) >= MAX_UNANSWERED:
        error = UserError(
            f"{server.client.address} gave no whole answer to {len(server.unanswered)} requests in a row "
            f"({_counted(server.unanswered)}): look at its log, then start the same command again to go on"
        )
        _give_up(pool, server, error, progress)


def _check_rejections(job: Job, in_a_row: list[str]) -> None:
    if len(in_a_row) >= job.max_rejections:
        raise UserError(
            f"{len(in_a_row)} texts in a row were rejected ({_counted(in_a_row)}): try another --model, other bounds, "
            "or more varied prompts; to go on all the same, start the same command again"
        )


def _counted(reasons: Iterable[str], most: int = 5) -> str:
    counts = Counter(reasons).most_common(most)
    return ", ".join(f"{count} {reason}" for reason, count in counts)


# --- one document, in the thread of a worker ---


def write_draft(job: Job, client: OllamaClient, index: int) -> Draft:
    """Attempt `index`: asks, cleans and judges. Raises Rejection, and what `client.ask` raises other than NoAnswer."""
    prompt, seed = compose(job.kind, job.seed, index), job.seed + index
    if prompt.answer:
        first = _asked(client, prompt.text, seed)
        request = _acceptable(first, clean_request(first.text), REQUEST_RULES, "request: ")
        second = _asked(client, prompt.answer.replace("{request}", request), seed)
        text = _acceptable(second, clean(second.text), job.rules)
    else:
        second, request = None, None
        first = _asked(client, prompt.text, seed)
        text = _acceptable(first, clean(first.text), job.rules)
        if job.with_prompts:
            second = _asked(client, compose_request(job.kind, job.seed, index, text), seed)
            request = _acceptable(second, clean_request(second.text), REQUEST_RULES, "request: ")
    counts = [answer.eval_count for answer in (first, second) if answer and answer.eval_count is not None]
    return Draft(prompt, text, request, sum(counts) if counts else None, signature(text))


def _asked(client: OllamaClient, prompt: str, seed: int) -> Answer:
    try:
        return client.ask(prompt, seed)
    except NoAnswer as error:
        raise Rejection(f"no answer: {error}", answered=False) from error


def _acceptable(answer: Answer, text: str, rules: Rules, of: str = "") -> str:
    """`text`, cleaned from `answer`, where it is acceptable. Raises Rejection where it is not."""
    if answer.done_reason == TOO_LONG:
        raise Rejection(f"{of}too long")
    if answer.done_reason != "stop":
        raise Rejection(f"{of}not ended by the model ({one_line(answer.done_reason, 40)})")
    reason = judge(text, rules)
    if reason:
        raise Rejection(of + reason)
    return text


# --- duplicates ---


class _Known:
    """All texts of the folder, with which new ones are compared."""

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
    """Equal for texts that differ only in case, white space, punctuation and invisible characters."""
    return hashlib.sha256(" ".join(words(comparable(text))).encode("utf-8", "replace")).digest()


# --- what is put on record ---


def _record(job: Job, client: OllamaClient, draft: Draft) -> dict[str, Any]:
    seed = job.seed + draft.prompt.index
    return {
        "kind": job.kind.name,
        "prompt": draft.prompt.text,
        "model": client.model,
        "options": {**client.request.options, "seed": seed},
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
