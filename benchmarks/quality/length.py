"""Length generalisation: the loss by position up to 131,072 of models that were trained on windows of 256 and of 2,048.

    python -m benchmarks.quality.length --long war_and_peace.txt --data wikitext-2 --device cuda --minutes 4

Each context is trained in three ways: every window from an empty state; with the state carried from window to window;
and from an empty state, then 500 more steps carried (arXiv:2507.02782). The last two fifths of the long text are held
out, and the models train on what precedes them and on `--data`: so a curve speaks of position, not of another author.

A text is harder in one place than in another, so two curves are given. Both are means over several starts:

    loss     by position, from an empty state at each start
    excess   the same tokens' loss less what it is between half and all of the training length after an empty state:
             above 0, the model reads worse far into a text than within the length that it was trained on

The figure is the largest excess of a bucket beyond the training length. Below 0.02 nats, length does no harm.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import harness
from mamba2_min import devices, files
from mamba2_min.config import Mamba2Config
from mamba2_min.data.corpus import Corpus, load_corpus
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError, run_script
from mamba2_min.evaluation.position import Bucket, buckets, losses_by_position
from mamba2_min.models.base import LanguageModel
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.settings import Settings
from mamba2_min.training.trainer import Trainer

CONTEXTS = (256, 2048)
LONGEST = 131_072
STARTS = 8
SPAN = 3  # times the longest reading: the part of the held-out text over which the starts are spread
HARM = 0.02  # nats
TRAINED, CHECKED = 0.58, 0.60  # shares of the long text: training up to here, validation up to here, then held out
MOST_BYTES = 1 << 28
MODEL: dict[str, Any] = {"d_model": 256, "n_layer": 4, "d_state": 64, "chunk_size": 128, "dropout": 0.1}
VOCABULARY = 16_384
STEP_TOKENS = 8192
STEPS, MORE_STEPS = 1500, 500
TRAINING = Settings(eval_every=10**9, save_every=10**9, patience=0, lr=3e-3, weight_decay=0.5, warmup_steps=100)


@dataclass(frozen=True)
class Way:
    """One way to train: `steps` steps, on the weights that `after` left or on new ones."""

    name: str
    carried: bool
    steps: int
    after: str | None = None


def ways(steps: int, more: int) -> list[Way]:
    return [
        Way("from zero", False, steps),
        Way(f"from zero, then {more} steps carried", True, more, after="from zero"),
        Way("carried", True, steps),
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--long", type=Path, required=True, metavar="FILE", help="a book, as plain text in UTF-8")
    add("--data", type=Path, metavar="PATH", help="more to train on: a text, or a folder (of WikiText-2, train.txt)")
    add("--out", type=Path, default=Path("runs/length"), metavar="DIR", help="of the runs (%(default)s)")
    add("--results", type=Path, default=harness.RESULTS, metavar="DIR", help="the JSON (%(default)s)")
    add("--image", type=Path, default=Path("docs/images/length-generalisation.png"), metavar="FILE")
    add("--device", default="auto", help="auto, cpu, cuda or mps (%(default)s)")
    add("--minutes", type=float, default=0.0, help="time limit of all training; the learning rates fall with the clock")
    add("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    add("--steps", type=int, default=STEPS, help="of training (%(default)s)")
    add("--more-steps", type=int, default=MORE_STEPS, help="carried, after training from zero (%(default)s)")
    add("--longest", type=int, default=LONGEST, metavar="N", help="tokens read from each start (%(default)s)")
    add("--starts", type=int, default=STARTS, metavar="N", help="places of the held-out text to start (%(default)s)")
    add("--seed", type=int, default=0)
    add("--set", nargs="*", default=[], type=harness.assignment, metavar="NAME=VALUE", help="of the model: d_model=64")
    return parser.parse_args()


def prepare(long: Path, data: Path | None, out: Path) -> tuple[Corpus, Tensor]:
    """The corpus to train on, and the ids (l,) of the part of the long text that is held out.

    Raises UserError where there is nothing to read.
    """
    text = files.read_text(long, MOST_BYTES)
    trained, checked, held = cut(text)
    documents = files.make_folder(out / "documents")
    parts = {documents / "book.txt": trained, out / "validation.txt": checked}
    if data is not None:
        source = data / "train.txt" if files.is_file(data / "train.txt") else data
        sources = sorted(source.glob("**/*.txt")) if files.is_folder(source) else [source]
        if not sources:
            raise UserError(f"{data} has no .txt file")
        parts |= {documents / f"data{k}.txt": files.read_text(path, MOST_BYTES) for k, path in enumerate(sources)}
    for path, content in parts.items():
        path.write_text(content, encoding="utf-8")
    corpus = load_corpus(documents, VOCABULARY, pattern="llama3", val_path=out / "validation.txt")
    return corpus, torch.tensor(corpus.tokenizer.encode(held), dtype=torch.int32)


def cut(text: str) -> tuple[str, str, str]:
    """A text in three, at the ends of paragraphs: to train on, to validate with, and held out."""
    places = []
    for share in (TRAINED, CHECKED):
        end = text.find("\n\n", int(share * len(text)))
        if end < 0:
            raise UserError("the long text has no paragraphs (empty lines) at which it could be cut")
        places.append(end + 2)
    return text[: places[0]], text[places[0] : places[1]], text[places[1] :]


def starts(tokens: int, longest: int, count: int, lead: int) -> list[int]:
    """Places from which `longest` tokens can be read, evenly spread, each with `lead` tokens before it."""
    room = tokens - longest - lead
    if room < 0:
        raise UserError(
            f"the held-out part has {tokens:,} tokens, and {longest + lead:,} are asked for: a shorter --longest?"
        )
    return [lead + room * k // max(1, count - 1) for k in range(count)]


@torch.no_grad()
def losses_near(model: LanguageModel, ids: Tensor, start_id: int, context: int) -> Tensor:
    """The loss of each token of `ids` (l,), read after half to all of `context` tokens from an empty state: (l,).

    Windows of `context` tokens begin every half of it, and each scores its second half. The first scores all.
    """
    device, half = model.ids_device, context // 2
    losses = torch.zeros(len(ids))
    inputs = torch.cat([ids.new_tensor([start_id]), ids[:-1]]).long()
    begins = list(range(0, max(1, len(ids) - half), half))
    at_once = max(1, STEP_TOKENS // context)
    for k in range(0, len(begins), at_once):
        places = torch.tensor(begins[k : k + at_once])[:, None] + torch.arange(context)
        inside = places < len(ids)
        places = places.clamp(max=len(ids) - 1)
        read = inputs[places]
        read[:, 0] = start_id
        hidden, _ = model.hidden(read.to(device))
        logits = model.lm_head(hidden)[..., : model.config.vocab_size].float()
        found = F.cross_entropy(logits.flatten(0, 1), ids[places].long().flatten().to(device), reduction="none")
        scored = inside & ((torch.arange(context) >= half) | (places[:, :1] == 0))
        losses[places[scored]] = found.view(places.shape).cpu()[scored]
    return losses


def curves(
    model: LanguageModel, held: Tensor, begins: list[int], longest: int, start_id: int, context: int
) -> tuple[list[Bucket], list[Bucket]]:
    """The loss and the excess by position, means over the starts."""
    near = losses_near(model, held, start_id, context)
    far = torch.stack([losses_by_position(model, held[begin : begin + longest], start_id) for begin in begins])
    same = torch.stack([near[begin : begin + longest] for begin in begins])
    return buckets(far.mean(0)), buckets((far - same).mean(0))


def largest_excess(excess: list[Bucket], context: int) -> float:
    """Of the buckets beyond the training length."""
    return max((b.loss for b in excess if b.first > context), default=math.nan)


def train(
    way: Way, model: Mamba2LM, corpus: Corpus, context: int, args: argparse.Namespace, minutes: float
) -> tuple[float, int]:
    """Trains the model where it is, and returns the minutes and the steps that it took."""
    device = devices.pick_device(args.device)
    with harness.explained():
        settings = dataclasses.replace(
            TRAINING,
            context=context,
            batch_size=max(1, STEP_TOKENS // context),
            max_steps=way.steps,
            max_minutes=minutes,
            carry_state=way.carried,
            graph=device.type == "cuda",
            lr=TRAINING.lr / (3 if way.after else 1),
            seed=args.seed,
        )
    folder = args.out / f"{context}-{way.name.replace(' ', '-').replace(',', '')}"
    begun = time.perf_counter()
    result = Trainer(model, corpus, settings, folder, device).train()
    if result.reason == "signal":  # which the trainer defers, to end between two steps
        raise SystemExit(128 + result.signal)
    return (time.perf_counter() - begun) / 60, result.step


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A record for each context and way. The JSON and the picture are written after each."""
    device = devices.pick_device(args.device)
    precision = devices.pick_precision("auto", device)
    shape = harness.model_values(MODEL, args.set)
    corpus, held = prepare(args.long, args.data, args.out)
    held = held[: SPAN * args.longest + max(args.contexts)]
    begins = starts(len(held), args.longest, args.starts, max(args.contexts))
    print(
        f"{len(corpus.train):,} tokens to train on, {len(held):,} held out, read from {len(begins)} places", flush=True
    )
    config = Mamba2Config(vocab_size=len(corpus.tokenizer), **shape)
    runs: list[dict[str, Any]] = []
    to_do = sum(way.steps for way in ways(args.steps, args.more_steps)) * len(args.contexts)
    spent = 0.0
    for context in args.contexts:
        weights: dict[str, dict[str, Tensor]] = {}
        for way in ways(args.steps, args.more_steps):
            model = Mamba2LM(config, args.seed)
            if way.after:
                model.load_state_dict(weights[way.after])
            limit = max(1e-3, args.minutes - spent) * way.steps / to_do if args.minutes else 0.0
            minutes, steps = train(way, model, corpus, context, args, limit)
            spent, to_do = spent + minutes, to_do - way.steps
            weights[way.name] = {name: t.clone() for name, t in model.state_dict().items()}
            with devices.matmul_precision(device, precision), devices.autocast(device, precision):
                loss, excess = curves(model.eval(), held, begins, args.longest, eos(corpus.tokenizer), context)
            worst = largest_excess(excess, context)
            print(
                f"trained at {context}, {way.name}: {steps} steps, {minutes:.1f} minutes; largest excess {worst:+.4f}"
            )
            runs.append(
                {
                    "context": context,
                    "way": way.name,
                    "seed": args.seed,
                    "steps": steps,
                    "minutes": round(minutes, 2),
                    "parameters": config.num_parameters(),
                    "model": shape,
                    "precision": precision,
                    "largest_excess": worst,
                    "harmless": worst <= HARM,
                    "loss": [dataclasses.asdict(b) for b in loss],
                    "excess": [dataclasses.asdict(b) for b in excess],
                }
            )
            write(args, runs, {"train": len(corpus.train), "held_out": len(held), "starts": begins}, device)
            plot(runs, args.image)
    return runs


def eos(tokenizer: WordTokenizer) -> int:
    return tokenizer.eos_id


def write(args: argparse.Namespace, runs: list[dict[str, Any]], tokens: dict[str, Any], device: torch.device) -> None:
    options = harness.Options(device=device.type, threads=torch.get_num_threads())
    written = {
        "benchmark": "quality.length",
        "machine": harness.machine(options),
        "versions": harness.versions(),
        "published": {"trained at 2k, carried": "no loss up to 128k (arXiv:2507.02782)"},
        "tokens": tokens,
        "runs": runs,
    }
    files.make_folder(args.results)
    (args.results / "quality-length.json").write_text(harness.as_json(written))


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Loss above, excess below, a column for each training length."""
    import matplotlib.pyplot as plt

    from mamba2_min.plots import BLUE, GREEN, GREY, ORANGE, STYLE, save_figure

    contexts = list(dict.fromkeys(run["context"] for run in runs))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            2, len(contexts), figsize=(5 * len(contexts), 6), sharex=True, squeeze=False, layout="constrained"
        )
        for column, context in enumerate(contexts):
            for run, colour in zip((r for r in runs if r["context"] == context), (BLUE, GREEN, ORANGE), strict=False):
                for panel, name in zip(panels[:, column], ("loss", "excess"), strict=True):
                    shown = [b for b in run[name] if b["last"] >= 32]
                    centres = [math.sqrt(b["first"] * b["last"]) for b in shown]
                    panel.plot(centres, [b["loss"] for b in shown], "o-", color=colour, markersize=4, label=run["way"])
            top, bottom = panels[:, column]
            top.set_title(f"trained at {context:,}", loc="left")
            bottom.axhline(HARM, color=GREY, linewidth=0.8)
            bottom.set_yscale("symlog", linthresh=0.1)
            bottom.set_xscale("log", base=2)
            bottom.set_xlabel("position, tokens")
            for panel in (top, bottom):
                panel.axvline(context, color=GREY, linestyle="--", linewidth=0.8)
            top.legend()
        panels[0, 0].set_ylabel("loss, nats per token")
        panels[1, 0].set_ylabel("excess over the training\nlength, nats per token")
        files.make_folder(path.parent)
        save_figure(figure, path)


def main() -> int:
    args = parse()
    measure_all(args)
    print(f"written: {args.results / 'quality-length.json'}, {args.image}")
    return 0


if __name__ == "__main__":
    run_script(main)
