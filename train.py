"""Trains a Mamba-2 on the documents of a folder, with early stopping, and leaves all that run.py needs.

python train.py --data training_data --out runs/mine
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import shutil
import sys
import textwrap
import time
from typing import Any

from mamba2_min.errors import UserError, printable, run_script
from mamba2_min.settings import DATA, PRECISIONS, PRESETS, Settings

MODEL_FLAGS = {
    "d_model": "width of the residual stream",
    "n_layer": "blocks",
    "d_state": "state a channel",
    "headdim": "channels a head",
    "expand": "d_inner / d_model",
    "ngroups": "groups of heads that share B and C",
    "chunk_size": "tokens a chunk of the scan: speed only",
    "dropout": "share of a block's output that is dropped",
}
TRAINING_FLAGS = {
    "context": "tokens a window ({})",
    "batch_size": "windows a step, or auto ({})",
    "micro_batch": "windows at a time; their gradients add up to the batch's; or auto: what memory allows (all)",
    "max_steps": "steps (10 passes over the data)",
    "max_minutes": "limit of time (none)",
    "eval_every": "steps between validations ({})",
    "save_every": "steps between saves ({})",
    "patience": "validations without a better one, then stop; 0: never ({})",
    "min_delta": "nats that count as better ({})",
    "lr": "peak learning rate ({})",
    "min_lr": "final learning rate ({})",
    "warmup_steps": "steps of linear warm-up ({})",
    "weight_decay": "on matrices only ({})",
    "beta1": "AdamW's mean of gradients ({})",
    "beta2": "AdamW's mean of their squares ({})",
    "clip": "largest gradient norm; 0: none ({})",
    "spike": "deviations above recent losses that skip a step; 0: never ({})",
    "max_bad_steps": "skipped steps in a row, then stop ({})",
    "log_every": "steps a line of metrics.jsonl ({})",
    "seed": "of the weights, the order of data and dropout ({})",
}
DATA_FLAGS = {
    "vocab_size": "at most so many tokens ({})",
    "min_count": "a word seen less often becomes its bytes ({})",
    "val_fraction": "share of the documents to validate with ({})",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what and where")
    group.add_argument("--data", metavar="DIR", help=f"folder of .md and .txt documents ({DATA['data']})")
    group.add_argument("--val-data", metavar="DIR", help="validation documents (a tenth of --data)")
    group.add_argument("--out", default="runs/latest", metavar="DIR", help="the run's folder (%(default)s)")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on with the run in --out, exactly where it stopped")
    either.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    group.add_argument("--accept", default="", metavar="NAMES", help="with --resume: what may differ: max-steps, ...")
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps (%(default)s)")
    group.add_argument("--precision", choices=PRECISIONS, help="of matrix products (auto: the faster)")
    on_or_off = {"action": argparse.BooleanOptionalAction, "default": None}
    group.add_argument("--compile", **on_or_off, help="with torch.compile: much faster on a GPU (off)")
    group.add_argument("--recompute", **on_or_off, help="blocks again in the backward pass: less memory (off)")
    group.add_argument("--deterministic", action="store_true", default=None, help="the same bits on CUDA too; slower")
    group.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (every core)")
    group.add_argument("--ignore-memory", action="store_true", help="start even where memory looks too small")
    group = parser.add_argument_group("vocabulary")
    _add_flags(group, DATA_FLAGS, DATA)
    group.add_argument("--pattern", choices=("words", "whitespace"), help="whitespace: the WikiText convention (words)")
    group = parser.add_argument_group("model")
    group.add_argument("--preset", choices=tuple(PRESETS), help="shape to start from (small: 256 x 4)")
    _add_flags(group, MODEL_FLAGS, {"dropout": 0.0})
    group.add_argument("--a-init", choices=("hippo", "uniform"), help="how the decay rates A start (hippo)")
    _add_flags(parser.add_argument_group("training"), TRAINING_FLAGS, dataclasses.asdict(Settings()))
    return parser


def _add_flags(group: argparse._ArgumentGroup, flags: dict[str, str], values: dict[str, Any]) -> None:
    """A flag for each name: of the type of its default, which takes the place of {} in the text."""
    for name, text in flags.items():
        default = values.get(name, 0)
        kind = _number_or_auto if name in ("batch_size", "micro_batch") else type(default)
        shown = f"{default:g}" if isinstance(default, float) else default
        group.add_argument(
            "--" + name.replace("_", "-"), type=kind, metavar="X" if kind is float else "N", help=text.format(shown)
        )


def _number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


_number_or_auto.__name__ = "number"  # what argparse calls it in "invalid number value"


def main() -> int:
    args = build_parser().parse_args()
    if args.threads < 0:
        raise UserError("--threads must be at least 1")
    if not args.out:
        raise UserError("--out needs the name of a folder")
    from mamba2_min import files  # torch takes seconds to import: not for --help
    from mamba2_min.checkpoints import checkpoint

    with files.locked(args.out, checkpoint.RUN_FILES):
        return train(args)


def train(args: argparse.Namespace) -> int:
    import torch

    from mamba2_min import devices
    from mamba2_min.models.mamba2 import Mamba2LM
    from mamba2_min.training.runs import plan_run
    from mamba2_min.training.trainer import Trainer

    accept = tuple(name.strip().replace("-", "_") for name in args.accept.split(",") if name.strip())
    plan = plan_run(args.out, overrides(args), args.preset, args.resume, args.overwrite, accept)
    device = devices.pick_device(args.device)
    torch.set_num_threads(args.threads or devices.cpu_threads())
    devices.keep_freed_memory()

    corpus = plan.corpus(args.out, args.ignore_memory)
    config = plan.config(corpus)
    show_corpus(plan, corpus)
    context = min(plan.training.context, max(len(corpus.train) - 1, 1))  # no window is longer than the text
    fitting = devices.fit_to_memory(config, dataclasses.replace(plan.training, context=context), device)
    needed, free = devices.check_memory(config, fitting, device, ignore=args.ignore_memory)
    plan = dataclasses.replace(plan, training=dataclasses.replace(plan.training, micro_batch=fitting.micro_batch))
    model = Mamba2LM(config, seed=plan.training.seed)
    screen = Screen(corpus, model)
    trainer = Trainer(model, corpus, plan.training, args.out, device, plan.resume, screen.report, plan.accept_documents)
    plan.save(args.out)
    show_training(config, trainer, f"needs about {needed}" + (f" of {free} free" if free else ""))
    if args.resume:
        say("resume", f"from step {trainer.step:,}" if trainer.resumed else "nothing saved yet: from the beginning")
    over = trainer.resumed and trainer.ended()
    if over:
        say("note", "this run has ended already; nothing is changed")
    with screen.watching(trainer):
        result = trainer.train()
    return show_result(result, trainer, args)


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for by name: data, model and training settings, without what was left to its default."""
    names = (
        *DATA_FLAGS,
        *MODEL_FLAGS,
        *TRAINING_FLAGS,
        "data",
        "val_data",
        "pattern",
        "a_init",
        "precision",
        "compile",
        "recompute",
        "deterministic",
    )
    asked = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in ("batch_size", "micro_batch"):
        if asked.get(name) == "auto":
            del asked[name]
            asked["adapt_micro_batch"] = True
    return asked


class Screen:
    """A line and a sample of text at each evaluation and a bar between them; in a file or pipe, a line now and then."""

    def __init__(self, corpus, model):
        self.corpus, self.model = corpus, model
        self.bar = None
        self.validation = ""
        self.said = time.perf_counter()

    def watching(self, trainer):
        from tqdm import tqdm

        self.trainer = trainer
        self.bar = tqdm(
            total=trainer.settings.max_steps,
            initial=trainer.step,
            dynamic_ncols=True,
            mininterval=0.5,
            bar_format="{n:>6,}/{total:,} |{bar}| {desc}",
            disable=not sys.stderr.isatty(),
        )
        return self.bar

    def report(self, event: str, values: dict[str, Any]) -> None:
        if event == "step":
            self.progress(values)
        elif event == "skipped":
            why = (
                f"loss {values['loss']:.4g} {values['why']}"
                if values["why"] == "jumped"
                else (f"loss {values['loss']:.4g}, gradient norm {values['norm']:.4g}")
            )
            self.write(f"step {values['step']:>6,}  skipped: {why}")
        elif event == "compiled":
            why = values["why_not"]
            self.write(f"step {values['step']:>6,}  " + (f"not compiled: {printable(why)}" if why else "compiled"))
        elif event == "memory":
            micro = values["micro_batch"]
            self.write(f"step {values['step']:>6,}  out of memory: now {micro} windows at a time, the same batch")
        elif event == "evaluation":
            score = values["score"]
            self.validation = f", val {score.loss:.3f}"
            best = "  *" if values["best"] else ""
            self.write(
                f"step {values['step']:>6,}  validation {score.loss:.4f}  perplexity {score.perplexity:,.1f}  "
                f"bits per byte {score.bits_per_byte:.4f}{best}"
            )
            self.write(wrapped(self.sample(values["step"]), "             | "))

    def progress(self, values: dict[str, Any]) -> None:
        trainer, now = self.trainer, time.perf_counter()
        speed = values["tokens"] / values["seconds"]
        text = f"loss {values['loss']:.3f}{self.validation}, {speed:,.0f} tokens/s, {_clock(trainer.seconds_left)} left"
        if not self.bar.disable:
            if trainer.progress:  # where a clock ends the run, the bar's end follows the speed
                self.bar.total = max(trainer.step, round(trainer.step / trainer.progress))
            self.bar.set_description_str(text, refresh=False)
            self.bar.update(trainer.step - self.bar.n)
        elif now - self.said > _SECONDS_BETWEEN_LINES:
            self.said = now
            self.write(f"step {trainer.step:>6,}  {text}")

    def write(self, line: str) -> None:
        self.bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def sample(self, seed: int) -> str:
        """What the model writes of itself, on one line."""
        eos = self.corpus.tokenizer.eos_id
        training = self.model.training
        self.model.eval()
        ids = list(self.model.generate([eos], 32, temperature=0.7, top_p=0.95, seed=seed, stop_ids=[eos]))
        self.model.train(training)
        return printable(" ".join(self.corpus.tokenizer.decode(ids).split()))


_SECONDS_BETWEEN_LINES = 30


def _clock(seconds: float | None) -> str:
    """3:07 or 2:03:07."""
    if seconds is None:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def say(label: str, text: str) -> None:
    """A line of the summary, wrapped below itself where a terminal is too narrow; nothing in it acts on a terminal."""
    print(wrapped(printable(text), f"{label:<12}", " " * 12), flush=True)


def wrapped(text: str, first: str, rest: str | None = None) -> str:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    lines = textwrap.wrap(text, max(width - len(first) - 1, 20), break_on_hyphens=False) or [""]
    return first + ("\n" + (first if rest is None else rest)).join(lines)


def show_corpus(plan, corpus) -> None:
    d = plan.data
    say(
        "documents",
        f"{corpus.documents:,} in {d['data']}: {corpus.train_documents:,} to train on, "
        f"{corpus.validation_documents:,} to validate with; {corpus.words:,} words",
    )
    say(
        "tokens",
        f"{len(corpus.train):,} + {len(corpus.validation):,}, vocabulary {len(corpus.tokenizer):,} "
        f"(pattern {d['pattern']}, min-count {d['min_count']})",
    )
    for note in corpus.notes:
        say("note", note)


def show_training(config, trainer, memory: str) -> None:
    s = trainer.settings
    say(
        "model",
        f"{config.num_parameters():,} parameters: d-model {config.d_model}, {config.n_layer} layers, "
        f"{config.nheads} heads of {config.headdim}, d-state {config.d_state}, A {config.a_init}",
    )
    limit = f" or {s.max_minutes:g} minutes" if s.max_minutes else ""
    parts = f" in parts of {trainer.micro_batch}" if trainer.micro_batch < s.batch_size else ""
    say(
        "training",
        f"context {trainer.windows.context}, batch {s.batch_size}{parts}, at most {s.max_steps:,} steps{limit}, "
        f"learning rate {s.lr:g} to {s.min_lr:g}, patience {s.patience}, seed {s.seed}",
    )
    for note in trainer.notes:
        say("note", note)
    say("device", f"{trainer.device}, {trainer.precision}; {memory}")


_REASONS = {
    "patience": "no better validation for {patience} evaluations",
    "max_steps": "all {max_steps:,} steps done",
    "max_minutes": "{max_minutes:g} minutes are over",
    "signal": "stopped",
}


def show_result(result, trainer, args: argparse.Namespace) -> int:
    """Says how it ended and what to do next; the exit status."""
    guard = trainer.guard
    bad = result.reason == "bad steps"
    if bad:
        first = result.step - guard.in_a_row + 1
        reason = f"steps {first:,} to {result.step:,} were skipped: {_WHY[guard.reason]}"
    else:
        reason = _REASONS[result.reason].format(**vars(trainer.settings))
    say("ended", f"at step {result.step:,}: {reason}")
    if guard.skipped:
        say("skipped", f"{guard.skipped:,} of {result.step:,} steps")
    if result.signal:
        argv = [arg for arg in sys.argv if arg not in ("--resume", "--overwrite")]
        say("saved", f"go on with: python {shlex.join([*argv, '--resume'])}")
        return 128 + result.signal
    if result.best is None:
        say("saved", "no model: no validation had a finite loss; train anew with a lower --lr")
        return 1
    say(
        "best",
        f"step {result.best_step:,}: {result.best.loss:.4f} nats a token, perplexity {result.best.perplexity:,.1f}, "
        f"{result.best.bits_per_byte:.4f} bits per byte",
    )
    say("saved", f"{args.out}; complete text with: python run.py --model {shlex.quote(args.out)}")
    return 1 if bad else 0


_WHY = {"not finite": "the loss or its gradient was not finite", "jumped": "the loss jumped and did not come back"}


if __name__ == "__main__":
    run_script(main)
