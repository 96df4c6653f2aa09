"""Lets a judge behind Ollama compare what models write, in both orders.

    python -m mamba2_min.evaluation.referee --a runs/mine --b runs/other --judge llama3.1
    python -m mamba2_min.evaluation.referee --a runs/mine --b ollama:qwen2.5:0.5b --prompts prompts.txt
    python -m mamba2_min.evaluation.referee --elo runs/a runs/b runs/c

Both models write for every prompt; the judge sees the two texts twice, each of them first once. A model wins where the
judge chooses it both times. Everything else is a tie: a judge that goes by the place of a text contradicts itself, and
decides nothing. A reply without a verdict is asked for again; what stays without one is counted and shown, never
dropped in silence and never given a score.

--out keeps every text and every reply, as answers.jsonl and judgements.jsonl. Stop it at any moment; the same command
goes on. A judge has a taste of its own, and prefers what it wrote itself: take another model as judge, and read some of
the replies.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba2_min import flags
from mamba2_min.errors import UserError, run_script

if TYPE_CHECKING:
    from mamba2_min.datagen.client import OllamaClient
    from mamba2_min.evaluation.journal import Journal
    from mamba2_min.evaluation.players import Player

PROMPTS = Path(__file__).parent / "tasks" / "prompts.txt"
ANSWERS, JUDGEMENTS, SETTINGS, RESULTS = "answers.jsonl", "judgements.jsonl", "settings.json", "results.json"
_TEXT = (str, type(None))
# What a line of each file has.
ANSWER = {"prompt": (int,), "player": (str,), "text": _TEXT, "failure": _TEXT}
JUDGEMENT = {
    "prompt": (int,),
    "first": (str,),
    "second": (str,),
    "verdict": ("first", "second", "equal", type(None)),
    "failure": _TEXT,
    "reply": _TEXT,
}
MOST_PROMPTS = 100_000

_TASKS = {
    False: ("Two writers continued the same beginning of a text.", "BEGINNING", "CONTINUATION"),
    True: ("Two writers answered the same request.", "REQUEST", "ANSWER"),
}
_QUESTION = """{task} Judge which of the two wrote better: does it fit, is the language correct, does it make sense from
sentence to sentence, would one want to read on? Being longer is no merit, and neither is the place where it stands.

=== {given} ===
{prompt}
=== FIRST {written} ===
{first}
=== SECOND {written} ===
{second}
=== END ===

Compare them in at most three sentences. Then write your verdict on a last line of its own, in one word: FIRST, SECOND,
or EQUAL if neither is better."""
_AGAIN = "\n\nIt is important that the last line of your reply is nothing but that one word."
_VERDICT = re.compile(r"\W*(?:(?:my |the |final )*verdict\b\W*(?:is\W+)?)?(first|second|equal)\W*", re.IGNORECASE)


@dataclass(frozen=True)
class Outcome:
    """Two models on one prompt. `score` is that of `a`: 1 won, 0.5 tied, 0 lost, None not judged, for `failure`.

    verdicts: the judge's words, with `a` first and with `b` first.
    """

    prompt: int
    a: str
    b: str
    score: float | None
    verdicts: tuple[str | None, str | None]
    failure: str | None = None

    @property
    def disagreed(self) -> bool:
        """Whether the two orders led to different verdicts."""
        return self.score == 0.5 and self.verdicts != ("equal", "equal")


def question(prompt: str, first: str, second: str, requests: bool = False, attempt: int = 0) -> str:
    """What the judge is asked. It holds no example of a verdict that could be copied."""
    task, given, written = _TASKS[requests]
    text = _QUESTION.format(task=task, given=given, written=written, prompt=prompt, first=first, second=second)
    return text + _AGAIN * (attempt > 0)


def verdict(reply: str) -> str | None:
    """ "first", "second" or "equal", where the last line of a reply says that and nothing else; otherwise None."""
    lines = reply.strip().splitlines()
    found = _VERDICT.fullmatch(lines[-1].replace("_", " ")) if lines else None
    return found[1].lower() if found else None


def score(a_first: str | None, b_first: str | None) -> float | None:
    """The score of `a` from the verdicts with `a` first and with `b` first; None where either is missing."""
    if a_first is None or b_first is None:
        return None
    if (a_first, b_first) == ("first", "second"):
        return 1.0
    return 0.0 if (a_first, b_first) == ("second", "first") else 0.5


class Referee:
    """Has players write and a judge compare, and puts both on record; what is on record is not asked for again."""

    def __init__(
        self,
        prompts: Sequence[str],
        judge: OllamaClient,
        answers: Journal,
        judgements: Journal,
        retries: int = 2,
        requests: bool = False,
        seed: int = 0,
    ):
        """retries: how often the judge is asked again for a verdict that it did not give."""
        self.prompts, self.judge, self.retries, self.requests, self.seed = prompts, judge, retries, requests, seed
        self._answers, self._judgements = answers, judgements
        self._texts = {(r["prompt"], r["player"]): r["text"] for r in answers.records if r["text"] is not None}
        self._no_text = {(r["prompt"], r["player"]): r["failure"] for r in answers.records}
        self._tried: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
        for record in judgements.records:
            self._tried.setdefault((record["prompt"], record["first"], record["second"]), []).append(record)

    def write(self, player: Player) -> None:
        """Has a player write for each prompt for which it has not. A failure is on record, and tried again next time.

        Raises UserError where asking the server again is of no use.
        """
        from mamba2_min.datagen.client import NoAnswer

        for k, prompt in self._bar(range(len(self.prompts)), f"{player.name} writes"):
            if (k, player.name) in self._texts:
                continue
            record: dict[str, Any] = {"prompt": k, "player": player.name, "text": None, "failure": None}
            try:
                record["text"] = self._texts[k, player.name] = player.write(prompt, self.seed + k)
            except NoAnswer as error:
                record["failure"] = self._no_text[k, player.name] = str(error)
            self._answers.append(record)

    def compare(self, a: str, b: str) -> list[Outcome]:
        """Judges every prompt's two texts in both orders. Raises UserError as `write` does."""
        return [self._outcome(k, a, b) for k, _ in self._bar(range(len(self.prompts)), f"{a} or {b}")]

    def _outcome(self, k: int, a: str, b: str) -> Outcome:
        for name in (a, b):
            if (k, name) not in self._texts:
                return Outcome(k, a, b, None, (None, None), f"{name} wrote nothing: {self._no_text[k, name]}")
        (one, failure), (two, other) = self._judged(k, a, b), self._judged(k, b, a)
        return Outcome(k, a, b, score(one, two), (one, two), failure or other)

    def _judged(self, k: int, first: str, second: str) -> tuple[str | None, str | None]:
        """The verdict on two texts in this order, or None and the reason why there is none."""
        from mamba2_min.datagen.client import NoAnswer

        tried = self._tried.setdefault((k, first, second), [])
        while not (tried and tried[-1]["verdict"]) and len(tried) <= self.retries:
            texts = self._texts[k, first], self._texts[k, second]
            asked = question(self.prompts[k], *texts, self.requests, len(tried))
            record: dict[str, Any] = {"prompt": k, "first": first, "second": second, "verdict": None}
            try:
                record["reply"] = self.judge.ask(asked, self.seed + len(tried)).text
                record["verdict"] = verdict(record["reply"])
                record["failure"] = None if record["verdict"] else "no verdict in the last line"
            except NoAnswer as error:
                record |= {"reply": None, "failure": str(error)}
            self._judgements.append(record)
            tried.append(record)
        return tried[-1]["verdict"], tried[-1]["failure"]

    def _bar(self, places: range, what: str) -> Any:
        from tqdm import tqdm

        return ((k, self.prompts[k]) for k in tqdm(places, desc=what[-40:], disable=not sys.stderr.isatty()))


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What the outcomes of two models amount to. `with_failed`: the win rates if all that failed were lost, or won."""
    from mamba2_min.evaluation.tally import win_rate

    scores = [o.score for o in outcomes if o.score is not None]
    failed = [o.failure for o in outcomes if o.score is None]
    chosen = [v for o in outcomes if o.score is not None for v in o.verdicts if v != "equal"]
    return {
        "a": outcomes[0].a,
        "b": outcomes[0].b,
        "prompts": len(outcomes),
        "wins": scores.count(1.0),
        "ties": scores.count(0.5),
        "losses": scores.count(0.0),
        "disagreed": sum(o.disagreed for o in outcomes),
        "win_rate": win_rate(scores) if scores else None,
        "first_place": chosen.count("first") / len(chosen) if chosen else None,
        "failed": dict(Counter(failed)),
        "with_failed": [(sum(scores) + won * len(failed)) / len(outcomes) for won in (0, 1)],
    }


def described(found: dict[str, Any]) -> str:
    """A summary for readers."""
    lines = [f"{found['a']} against {found['b']}"]
    if found["win_rate"]:
        rate, low, high = found["win_rate"]
        lines.append(f"  won {found['wins']}, tied {found['ties']}, lost {found['losses']}")
        lines.append(f"  win rate {rate:.3f}, 95% interval {low:.3f} to {high:.3f} (a tie is half a win)")
        lines.append(f"  in {found['disagreed']} of the ties the judge changed its mind when the order changed")
        if found["first_place"] is not None:
            lines.append(f"  it chose the text that stood first in {found['first_place']:.0%} of its choices")
    failed = sum(found["failed"].values())
    if failed:
        low, high = found["with_failed"]
        lines.append(f"  NOT JUDGED: {failed} of {found['prompts']}, not in the win rate, which would be")
        lines.append(f"    {low:.3f} if all of them were lost and {high:.3f} if all were won:")
        lines += [f"    {count} x {reason}" for reason, count in found["failed"].items()]
    return "\n".join(lines)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: a line each, or in .jsonl an object with "prompt" on each line. Raises UserError."""
    from mamba2_min import files

    lines = [line for line in files.read_text(path, 1 << 28).splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        for number, line in enumerate(lines):
            try:
                record = files.parse_json(line)
            except ValueError as error:
                raise UserError(f"{path}, prompt {number + 1}: {error}") from error
            if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
                raise UserError(f'{path}, prompt {number + 1}: an object with "prompt" is wanted')
            lines[number] = record["prompt"]
    if not 0 < len(lines) <= MOST_PROMPTS:
        raise UserError(f"{path} has {len(lines):,} prompts; 1 to {MOST_PROMPTS:,} are wanted")
    return lines


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mamba2_min.evaluation.referee", description=__doc__, formatter_class=flags.HelpFormatter
    )
    add = parser.add_argument
    add("--a", metavar="MODEL", help="a run's folder, or ollama:NAME")
    add("--b", metavar="MODEL", help="the model to compare it with")
    add("--elo", nargs="+", metavar="MODEL", help="several models: each against each, and a table of ratings")
    add("--judge", default="llama3.1", metavar="NAME", help="a model of the Ollama server (%(default)s)")
    add("--prompts", type=Path, default=PROMPTS, metavar="FILE", help="one per line, or JSONL (20 bundled openings)")
    add("--requests", action="store_true", help="prompts are requests to answer, not beginnings to continue")
    add("--limit", type=int, default=MOST_PROMPTS, metavar="N", help="only the first N prompts")
    add("--max-tokens", type=int, default=150, metavar="N", help="of each text (%(default)s)")
    add("--temperature", type=float, default=0.7, metavar="X", help="of the models; the judge's is 0 (%(default)s)")
    add("--judge-retries", type=int, default=2, metavar="N", help="ask again for a missing verdict (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="prompt k is written with seed N + k (%(default)s)")
    add("--host", metavar="URL", help="the Ollama server (OLLAMA_HOST, or http://127.0.0.1:11434)")
    add("--out", type=flags.folder, default=Path("referee"), metavar="DIR", help="every text and reply (%(default)s)")
    add("--device", default="auto", metavar="NAME", help="for runs: auto, cpu, cuda or mps (%(default)s)")
    return parser


def check(args: argparse.Namespace) -> list[str]:
    """The names of the models. Raises UserError for arguments that make no sense."""
    flags.check_integers(args, limit=1, max_tokens=1, judge_retries=0, seed=0)
    if not 0 <= args.temperature <= 100:
        raise UserError("--temperature must lie between 0 and 100")
    if bool(args.elo) == bool(args.a or args.b) or bool(args.a) != bool(args.b):
        raise UserError("give two models as --a and --b, or several as --elo")
    names = args.elo or [args.a, args.b]
    if len(set(names)) < len(names) or len(names) < 2:
        raise UserError("a comparison needs two models or more, each named once")
    return names


def main() -> int:
    args = build_parser().parse_args()
    names = check(args)
    from mamba2_min import files
    from mamba2_min.evaluation.journal import Journal
    from mamba2_min.evaluation.players import Writing, ollama_client, player
    from mamba2_min.evaluation.tally import rating_table

    prompts = read_prompts(args.prompts)
    writing = Writing(args.max_tokens, args.temperature, args.requests, args.host, args.device)
    players = [player(name, writing) for name in names]
    judge = ollama_client(
        args.judge, args.host, {"temperature": 0.0, "num_ctx": 4096 + 3 * args.max_tokens, "num_predict": 400}
    )
    judge.check_model()
    settings = {
        "players": {p.name: p.identity() for p in players},
        "judge": args.judge,
        "prompts": hashlib.sha256("\0".join(prompts).encode()).hexdigest(),
        **{name: getattr(args, name) for name in ("max_tokens", "temperature", "requests", "seed")},
    }
    with files.locked(args.out, (ANSWERS, JUDGEMENTS, SETTINGS, RESULTS), holder="referee"):
        _check_same(args.out / SETTINGS, settings)
        journals = Journal(args.out / ANSWERS, ANSWER), Journal(args.out / JUDGEMENTS, JUDGEMENT)
        prompts = prompts[: args.limit]
        referee = Referee(prompts, judge, *journals, args.judge_retries, args.requests, args.seed)
        for one in players:
            referee.write(one)
        pairs = [referee.compare(a, b) for a, b in itertools.combinations(names, 2)]
        results: dict[str, Any] = {"pairs": [summary(outcomes) for outcomes in pairs]}
        print(f"judge: {args.judge} at {judge.address}; {len(prompts)} prompts, each pair of texts in both orders\n")
        print("\n".join(map(described, results["pairs"])))
        if args.elo:
            games = [
                (o.prompt, names.index(o.a), names.index(o.b), o.score)
                for os in pairs
                for o in os
                if o.score is not None
            ]
            if games:
                table = rating_table(len(names), games)
                results["elo"] = dict(zip(names, table, strict=True))
                print("\n" + _elo_table(results["elo"]))
        results["outcomes"] = [asdict(o) for outcomes in pairs for o in outcomes]
        files.save_json(args.out / RESULTS, results)
    if any(name.removeprefix("ollama:") == args.judge for name in names):
        print("note: the judge is one of the models; judges prefer their own texts", file=sys.stderr)
    print(f"\nwritten: {args.out / ANSWERS}, {args.out / JUDGEMENTS}, {args.out / RESULTS}")
    return 0


def _check_same(path: Path, settings: dict[str, Any]) -> None:
    """Keeps the settings, or raises UserError where the folder was begun with others. Models may be added."""
    from mamba2_min import files

    if files.exists(path):
        before = files.load_json(path)
        if not isinstance(before, dict) or not isinstance(before.get("players"), dict):
            raise UserError(f"{path} does not hold the settings of a referee; take another --out")
        other = [name for name in settings if name != "players" and before.get(name) != settings[name]]
        known = before["players"]
        other += [name for name, identity in settings["players"].items() if known.get(name, identity) != identity]
        if other:
            raise UserError(f"{path.parent} was begun with another {', '.join(other)}; take another --out")
        settings = {**settings, "players": {**known, **settings["players"]}}
    files.save_json(path, settings)


def _elo_table(found: dict[str, tuple[float, float, float]]) -> str:
    lines = [f"{'rating':>7}  {'95% interval':>14}  model"]
    for name, (rating, low, high) in sorted(found.items(), key=lambda item: -item[1][0]):
        lines.append(f"{rating:>7.0f}  {low:>6.0f} to {high:>4.0f}  {name}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
