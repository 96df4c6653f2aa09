"""Writes documents to train on with a model on one or more Ollama servers.

    python data_generator.py --model llama3.1 --documents 500

Start the same command again after an interruption of any kind: it goes on to exactly that many documents. Kinds,
templates, the files it leaves and the server's own settings are described in docs/data_generator.md.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import threading
from pathlib import Path

from mamba2_min import console
from mamba2_min.datagen.arguments import parse, request_of, rules_of
from mamba2_min.datagen.kinds import Kind
from mamba2_min.datagen.languages import LANGUAGES
from mamba2_min.datagen.progress import Progress
from mamba2_min.datagen.store import Store
from mamba2_min.datagen.templates import find_kind, load_topics
from mamba2_min.errors import run_script
from mamba2_min.printable import printable

MANY_DOCUMENTS = 2000  # from here on, reading them takes seconds


def main() -> int:
    console.install("the documents are written all the same")
    args = parse(__doc__)
    kind = find_kind(args.kind)
    if args.topics:
        kind = kind.with_topics(load_topics(args.topics))
    if args.language:
        kind = kind.in_language(LANGUAGES[args.language].name)
    if args.dry_run:
        from mamba2_min.datagen.screen import show_prompts

        show_prompts(kind, args.seed)
        return 0
    return write(kind, args)


def write(kind: Kind, args: argparse.Namespace) -> int:
    from mamba2_min.datagen import screen  # with the client, which takes a while to import: not for --help
    from mamba2_min.datagen.client import OllamaClient
    from mamba2_min.datagen.generator import Job, generate
    from mamba2_min.datagen.pool import usable

    rules, stop = rules_of(kind, args), threading.Event()
    request = request_of(args, rules)
    clients = [OllamaClient(args.model, host, request, stop) for host in args.host or [None]]
    job = Job(
        kind, args.documents, args.seed, rules, args.with_prompts, args.workers, args.similarity, args.max_rejections
    )
    screen.show_settings(job, clients, args.out, args.topics)
    with Store(args.out) as store:
        for note in store.notes:
            print(f"note: {printable(note)}")
        if len(store) >= args.documents:
            out = printable(str(args.out))
            print(f"nothing to do: {out} holds {len(store)} documents already; --documents is the number in all")
            screen.show_table(store, Progress())
            return 0
        clients = usable(clients, screen.note)
        if len(store) >= MANY_DOCUMENTS:
            print(f"reading the {len(store):,} documents that are there, to tell repeats", flush=True)
        caught = stop_on_signals(stop)
        bar = screen.Bar(args.documents, len(store), clients)
        try:
            complete = generate(job, clients, store, stop, bar)
        finally:
            bar.close()
            screen.show_table(store, bar)
        if complete:
            print(f"next: python train.py --data {printable(shlex.quote(str(data_folder(args.out))))}")
            return 0
        sys.stdout.flush()
        print(
            f"stopped with {len(store)} of {args.documents} documents in {printable(str(args.out))}; to go on, start "
            f"the same command again:\n  python {printable(shlex.join(sys.argv))}",
            file=sys.stderr,
        )
        return 128 + caught[0]


def stop_on_signals(stop: threading.Event) -> list[int]:
    """Lets Ctrl-C, a polite kill and a closed window set `stop`; a second one ends the process.

    Returns a list: the signals so far. Under nohup, a closed window is ignored.
    """
    caught: list[int] = []

    def handle(number: int, _: object) -> None:
        caught.append(number)
        stop.set()
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
    if hang_up and signal.getsignal(hang_up) != signal.SIG_IGN:
        signal.signal(hang_up, handle)
    return caught


def data_folder(out: Path) -> Path:
    """What to name to train.py: the folder of all training data where `out` lies in it, or else `out`."""
    return next((folder for folder in (out, *out.parents) if folder.name == "training_data"), out)


if __name__ == "__main__":
    run_script(main)
