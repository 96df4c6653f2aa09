"""Writes documents to train on with a model on a local Ollama server.

    python data_generator.py --model llama3.1 --documents 500

Start the same command again after an interruption, however it came about, and it goes on to exactly that many.
Kinds, templates, the files it leaves and the server's own settings are described in docs/data_generator.md.
"""

from __future__ import annotations

import argparse
import re
import shlex
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from mamba2_min.datagen.judging import Rules
from mamba2_min.datagen.kinds import KINDS, Kind, compose, find_kind, load_topics
from mamba2_min.datagen.languages import LANGUAGES
from mamba2_min.datagen.progress import Progress
from mamba2_min.datagen.report import summarize
from mamba2_min.datagen.store import Store
from mamba2_min.errors import UserError, printable, run_script

if TYPE_CHECKING:
    from mamba2_min.datagen.asking import Asker, RequestOptions

DRY_RUN_PROMPTS = 10
MOST_OPENINGS = 5  # in the table at the end
MANY_DOCUMENTS = 2000  # from here on, reading them takes seconds
RATE_SECONDS = 20.0  # tokens/s is the mean of that much of the past


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, as for every other fault, instead of after the usage."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (--help lists the arguments)")


def parser() -> argparse.ArgumentParser:
    result = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = result.add_argument_group("what is written")
    what.add_argument(
        "--kind",
        default="stories",
        metavar="KIND",
        help=f"{', '.join(KINDS)}, or a .toml or .json file of your own (stories)",
    )
    what.add_argument(
        "--documents", type=int, default=100, metavar="N", help="good documents in the folder at the end (100)"
    )
    what.add_argument("--topics", type=Path, metavar="FILE", help="subjects, one a line: each document is about one")
    what.add_argument("--with-prompts", action="store_true", help="also have the request written that the text answers")
    what.add_argument("--language", metavar="CODE", help=f"ask for it and keep nothing else: {' '.join(LANGUAGES)}")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="attempt i uses seed N + i (0)")
    what.add_argument("--out", type=Path, default=Path("training_data/generated"), metavar="DIR", help="(%(default)s)")
    what.add_argument("--dry-run", action="store_true", help=f"show {DRY_RUN_PROMPTS} prompts; no server is needed")

    model = result.add_argument_group("who writes it")
    model.add_argument("--model", default="llama3.1", metavar="NAME", help="as `ollama list` shows it (llama3.1)")
    model.add_argument("--host", metavar="URL", help="of the server (OLLAMA_HOST, or http://127.0.0.1:11434)")
    model.add_argument(
        "--workers", type=int, default=1, metavar="N", help="requests at once; see OLLAMA_NUM_PARALLEL (1)"
    )
    model.add_argument("--temperature", type=float, default=0.9, metavar="X", help="(%(default)s)")
    model.add_argument("--top-p", type=float, default=0.95, metavar="X", help="(%(default)s)")
    model.add_argument(
        "--num-ctx", type=int, default=4096, metavar="N", help="the model's context in tokens (%(default)s)"
    )
    model.add_argument("--num-predict", type=int, default=2048, metavar="N", help="most tokens an answer (%(default)s)")
    model.add_argument(
        "--keep-alive", default="30m", metavar="TIME", help="the model stays loaded: 30m, 2h, -1 for good (30m)"
    )

    kept = result.add_argument_group("what is kept")
    kept.add_argument("--min-words", type=int, metavar="N", help="(20, or what the kind says)")
    kept.add_argument("--max-words", type=int, metavar="N", help="(2000, or what the kind says)")
    kept.add_argument(
        "--similarity", type=float, default=0.5, metavar="X", help="texts that share this much are one (0.5)"
    )
    kept.add_argument("--max-rejections", type=int, default=50, metavar="N", help="give up after so many in a row (50)")

    waiting = result.add_argument_group("how long it waits, in seconds")
    waiting.add_argument("--timeout", type=float, default=60.0, metavar="S", help="silence within an answer (60)")
    waiting.add_argument("--first-timeout", type=float, default=300.0, metavar="S", help="before its first word (300)")
    waiting.add_argument("--max-seconds", type=float, default=900.0, metavar="S", help="for a whole answer (900)")
    waiting.add_argument("--retries", type=int, default=6, metavar="N", help="of a request that failed (6)")
    waiting.add_argument(
        "--backoff", type=float, default=1.0, metavar="S", help="first pause between them; it doubles (1)"
    )
    return result


def main() -> int:
    args = parser().parse_args()
    check(args)
    kind = find_kind(args.kind)
    if args.topics:
        kind = kind.with_topics(load_topics(args.topics))
    if args.language:
        kind = kind.in_language(LANGUAGES[args.language].name)
    if args.dry_run:
        return dry_run(kind, args.seed)
    return write(kind, args)


def check(args: argparse.Namespace) -> None:
    """Raises UserError for the first argument that makes no sense."""
    for name, least in (
        ("documents", 1),
        ("workers", 1),
        ("num_ctx", 1),
        ("num_predict", 1),
        ("min_words", 1),
        ("max_words", 1),
        ("max_rejections", 1),
        ("retries", 0),
        ("seed", 0),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} has to be {least} or more, not {value}")
    for name in ("timeout", "first_timeout", "max_seconds"):
        if not 0 < getattr(args, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} has to be a number of seconds above 0")
    if not 0 <= args.backoff < float("inf"):
        raise UserError("--backoff has to be a number of seconds, 0 or more")
    if not 0 < args.similarity <= 1:
        raise UserError("--similarity has to lie above 0 and not above 1")
    if not 0 <= args.temperature < float("inf") or not 0 < args.top_p <= 1:
        raise UserError("--temperature has to be 0 or more, and --top-p above 0 and not above 1")
    if args.num_predict >= args.num_ctx:
        raise UserError(f"--num-predict {args.num_predict} leaves no room for a prompt in --num-ctx {args.num_ctx}")
    if args.language and args.language not in LANGUAGES:
        raise UserError(f"--language {args.language}: known are {', '.join(LANGUAGES)}")
    if not args.model.strip() or not args.model.isprintable():
        raise UserError(f"--model {args.model!r} is no model's name")


def dry_run(kind: Kind, seed: int) -> int:
    for index in range(DRY_RUN_PROMPTS):
        prompt = compose(kind, seed, index)
        print(f"[{index}] {printable(prompt.text, keep=chr(10))}")
        if prompt.answer:
            print(f"    then, in place of {{request}} what came back: {printable(prompt.answer, keep=chr(10))}")
        print()
    return 0


def write(kind: Kind, args: argparse.Namespace) -> int:
    from mamba2_min.datagen.asking import Asker  # the client takes a while to import: not for --help
    from mamba2_min.datagen.generator import Job, generate

    rules, stop = rules_of(kind, args), threading.Event()
    manner = manner_of(args, rules)
    asker = Asker(args.model, args.host, manner, stop)
    job = Job(
        kind, args.documents, args.seed, rules, args.with_prompts, args.workers, args.similarity, args.max_rejections
    )
    show_settings(kind, args, rules, manner, asker.address)
    with Store(args.out) as store:
        for note in store.notes:
            print(f"note: {printable(note)}")
        if len(store) >= args.documents:
            print(f"nothing to do: {args.out} holds {len(store)} documents already; --documents is the number in all")
            show_table(store, Progress())
            return 0
        asker.check_model()
        if len(store) >= MANY_DOCUMENTS:
            print(f"reading the {len(store):,} documents that are there, to tell repeats", flush=True)
        caught = stop_on_signals(stop)
        bar = Bar(args.documents, len(store), asker)
        try:
            complete = generate(job, asker, store, stop, bar)
        finally:
            bar.close()
            show_table(store, bar)
        if complete:
            print(f"next: python train.py --data {shlex.quote(str(data_folder(args.out)))}")
            return 0
        sys.stdout.flush()
        print(
            f"stopped with {len(store)} of {args.documents} documents in {args.out}; to go on, start the same "
            f"command again:\n  python {printable(shlex.join(sys.argv))}",
            file=sys.stderr,
        )
        return 128 + caught[0]


def rules_of(kind: Kind, args: argparse.Namespace) -> Rules:
    """The bounds: the user's, or else the kind's, or else the general ones."""
    least = args.min_words or kind.min_words or Rules.min_words
    most = args.max_words or kind.max_words or Rules.max_words
    if least > most:
        raise UserError(f"a text cannot have at least {least} and at most {most} words: see --min-words, --max-words")
    return Rules(least, most, args.language)


def manner_of(args: argparse.Namespace, rules: Rules) -> RequestOptions:
    from mamba2_min.datagen.asking import RequestOptions

    return RequestOptions(
        options={name: getattr(args, name) for name in ("temperature", "top_p", "num_ctx", "num_predict")},
        keep_alive=int(args.keep_alive) if re.fullmatch(r"-?\d+", args.keep_alive) else args.keep_alive,
        timeout=args.timeout,
        first_timeout=args.first_timeout,
        max_seconds=args.max_seconds,
        max_characters=10_000 + 30 * rules.max_words,
        retries=args.retries,
        backoff=args.backoff,
    )


def stop_on_signals(stop: threading.Event) -> list[int]:
    """Lets Ctrl-C, and a polite kill, set `stop`; a second one ends the process. Returns a list: the signals so far."""
    caught: list[int] = []

    def handle(number: int, _) -> None:
        caught.append(number)
        stop.set()
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return caught


def data_folder(out: Path) -> Path:
    """What to name to train.py: the folder of all training data where `out` lies in it, or else `out`."""
    return next((folder for folder in (out, *out.parents) if folder.name == "training_data"), out)


# --- what is seen ---


class Bar(Progress):
    """A bar in documents, with tokens/s, the rejected and the time left; it moves while an answer comes in."""

    def __init__(self, documents: int, there: int, asker: Asker):
        super().__init__()
        self._asker = asker
        self._past = deque([(time.monotonic(), asker.tokens)])
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
            self._past.append((now, self._asker.tokens))
            while len(self._past) > 2 and now - self._past[0][0] > RATE_SECONDS:
                self._past.popleft()
            self._say()
            if self._live:
                self._bar.refresh()

    def _say(self) -> None:
        (then, before), (now, tokens) = self._past[0], self._past[-1]
        rate = (tokens - before) / max(now - then, 1e-9)
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s, {self.rejected.total()} rejected", refresh=False)

    def close(self) -> None:
        self._bar.close()


def show_settings(kind: Kind, args: argparse.Namespace, rules: Rules, manner: RequestOptions, address: str) -> None:
    """The settings as resolved, before anything is done."""
    options = ", ".join(f"{name} {value:g}" for name, value in manner.options.items())
    topics = f", topics of {args.topics}" if args.topics else ""
    requests = ", with the requests" if args.with_prompts or kind.answer else ""
    language = f", in {LANGUAGES[rules.language].name}" if rules.language else ""
    waits = f"{manner.first_timeout:g} s for a first word, {manner.timeout:g} s for the next"
    show_rows(
        ("model", f"{args.model} at {address}, {args.workers} at once"),
        ("options", options),
        ("writes", f"{args.documents} {kind.name} in {args.out}, seed {args.seed}{topics}{requests}"),
        ("keeps", f"{rules.min_words} to {rules.max_words} words, less than {args.similarity:.0%} alike{language}"),
        ("waits", f"{waits}, {manner.max_seconds:g} s for an answer, {manner.retries} retries"),
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

    def so_far(count: int, here: int) -> str:
        return f"{count:,}" if count == here else f"{count:,} ({here:,} in this run)"

    show_rows(
        ("kept", so_far(summary.documents, progress.kept)),
        ("rejected", so_far(store.rejected.total(), progress.rejected.total())),
        *((f"  {reason}", so_far(n, progress.rejected[reason])) for reason, n in store.rejected.most_common()),
        ("words", f"{summary.words:,}"),
        ("distinct words", f"{summary.distinct_words:,}"),
        ("unique openings", f"{summary.unique_openings:.0%} of the documents' first four words"),
        *((f"  {count:,} times", text) for text, count in summary.openings.most_common(MOST_OPENINGS)),
        ("tokens", f"{summary.tokens:,} for train.py"),
    )


if __name__ == "__main__":
    run_script(main)
