"""The command line of data_generator.py: its flags, the bounds of their values, and what they mean together."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mamba2_min.datagen.builtin import KINDS
from mamba2_min.datagen.judging import Rules
from mamba2_min.datagen.kinds import Kind
from mamba2_min.datagen.languages import LANGUAGES
from mamba2_min.errors import UserError
from mamba2_min.flags import HelpFormatter, Parser
from mamba2_min.printable import one_line

if TYPE_CHECKING:
    from mamba2_min.datagen.client import RequestOptions

MOST_SECONDS = 1e6  # 12 days; the system's timers have a limit
_INTEGERS = {  # the smallest and the largest value of each; the server's seeds have 63 bits
    **dict.fromkeys(("documents", "num_ctx", "num_predict", "min_words", "max_words", "max_rejections"), (1, 1 << 40)),
    "workers": (1, 256),
    "retries": (0, 10_000),
    "seed": (0, 1 << 62),
}


def parse(description: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, each within its bounds. Raises UserError for the first that makes no sense."""
    result = Parser(description=description, formatter_class=HelpFormatter)
    what = result.add_argument_group("what is written").add_argument
    kinds = f"{', '.join(KINDS)}, or a .toml or .json file of your own"
    what("--kind", default="stories", metavar="KIND", help=f"{kinds} (stories)")
    what("--documents", type=int, default=100, metavar="N", help="good documents in the folder at the end (100)")
    what("--topics", type=Path, metavar="FILE", help="subjects, one per line: each document is about one")
    what("--with-prompts", action="store_true", help="also have the request written that the text answers")
    what("--language", metavar="CODE", help=f"ask for it and keep nothing else: {' '.join(LANGUAGES)}")
    what("--seed", type=int, default=0, metavar="N", help="attempt i uses seed N + i (0)")
    what("--out", type=Path, default=Path("training_data/generated"), metavar="DIR", help="(%(default)s)")
    what("--dry-run", action="store_true", help="show ten prompts; no server is needed")

    model = result.add_argument_group("who writes it").add_argument
    model("--model", default="llama3.1", metavar="NAME", help="as `ollama list` shows it (llama3.1)")
    model(
        "--host",
        action="append",
        metavar="URL",
        help="of a server (OLLAMA_HOST, or http://127.0.0.1:11434); repeat it for several that work in parallel",
    )
    model(
        "--workers", type=int, default=1, metavar="N", help="requests at once per server; see OLLAMA_NUM_PARALLEL (1)"
    )
    model("--temperature", type=float, default=0.9, metavar="X", help="(%(default)s)")
    model("--top-p", type=float, default=0.95, metavar="X", help="(%(default)s)")
    model("--num-ctx", type=int, default=4096, metavar="N", help="the model's context in tokens (%(default)s)")
    model("--num-predict", type=int, default=2048, metavar="N", help="most tokens per answer (%(default)s)")
    model("--keep-alive", default="30m", metavar="TIME", help="the model stays loaded: 30m, 2h, -1 for good (30m)")

    kept = result.add_argument_group("what is kept").add_argument
    kept("--min-words", type=int, metavar="N", help="(20, or what the kind says)")
    kept("--max-words", type=int, metavar="N", help="(2000, or what the kind says)")
    kept("--similarity", type=float, default=0.5, metavar="X", help="texts that share this much are one (0.5)")
    kept("--max-rejections", type=int, default=50, metavar="N", help="give up after so many in a row (50)")

    waits = result.add_argument_group("how long it waits, in seconds").add_argument
    waits("--timeout", type=float, default=60.0, metavar="S", help="silence within an answer (60)")
    waits("--first-timeout", type=float, default=300.0, metavar="S", help="before its first word (300)")
    waits("--max-seconds", type=float, default=900.0, metavar="S", help="for a whole answer (900)")
    waits("--retries", type=int, default=6, metavar="N", help="of a request that failed (6)")
    waits("--backoff", type=float, default=1.0, metavar="S", help="first pause between them; it doubles (1)")
    args = result.parse_args(argv)
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    for name, (least, most) in _INTEGERS.items():
        value = getattr(args, name)
        flag = f"--{name.replace('_', '-')}"
        if value is not None and value < least:
            raise UserError(f"{flag} has to be {least} or more, not {value}")
        if value is not None and value > most:
            raise UserError(f"{flag} has to be {most} or less, not {one_line(value, 40)}")
    for name in ("timeout", "first_timeout", "max_seconds"):
        if not 0 < getattr(args, name) <= MOST_SECONDS:
            raise UserError(
                f"--{name.replace('_', '-')} has to be a number of seconds above 0, up to {MOST_SECONDS:,.0f}"
            )
    if not 0 <= args.backoff < float("inf"):
        raise UserError("--backoff has to be a number of seconds, 0 or more")
    if not 0 < args.similarity <= 1:
        raise UserError("--similarity has to lie above 0 and not above 1")
    if not 0 <= args.temperature < float("inf") or not 0 < args.top_p <= 1:
        raise UserError("--temperature has to be 0 or more, and --top-p above 0 and not above 1")
    if args.num_predict >= args.num_ctx:
        raise UserError(f"--num-predict {args.num_predict} leaves no room for a prompt in --num-ctx {args.num_ctx}")
    if not re.fullmatch(r"-?(?:[0-9]{1,12}|(?:[0-9]{1,12}(?:\.[0-9]{1,9})?(?:ns|us|ms|s|m|h))+)", args.keep_alive):
        raise UserError(f"--keep-alive {args.keep_alive}: a time such as 30m, 2h or 90s is wanted, or -1 for good")
    if args.language and args.language not in LANGUAGES:
        raise UserError(f"--language {args.language}: known are {', '.join(LANGUAGES)}")
    if not args.model.strip() or not args.model.isprintable():
        raise UserError(f"--model {args.model!r} is no model's name")


def rules_of(kind: Kind, args: argparse.Namespace) -> Rules:
    """The bounds: the user's, or else the kind's, or else the general ones."""
    least = args.min_words or kind.min_words or Rules.min_words
    most = args.max_words or kind.max_words or Rules.max_words
    if least > most:
        raise UserError(f"a text cannot have at least {least} and at most {most} words: see --min-words, --max-words")
    return Rules(least, most, args.language)


def request_of(args: argparse.Namespace, rules: Rules) -> RequestOptions:
    """How the model is asked."""
    from mamba2_min.datagen.client import RequestOptions  # with the client, which takes a while to import

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
