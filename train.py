"""Trains a Mamba-2 on the documents of a folder, with early stopping, and leaves all that run.py needs.

    python train.py --data training_data --out runs/mine
"""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from mamba2_min.errors import UserError, printable, run_script

MODEL_FLAGS = {
    "d_model": "width of the residual stream", "n_layer": "blocks", "d_state": "state a channel",
    "headdim": "channels a head", "expand": "d_inner / d_model", "ngroups": "groups of heads that share B and C",
    "chunk_size": "tokens a chunk of the scan: speed only", "dropout": "share of a block's output that is dropped",
}  # fmt: skip
TRAINING_FLAGS = {
    "context": (int, "tokens a window (256)"), "batch_size": (int, "windows a step (8)"),
    "micro_batch": (int, "windows at a time; their gradients add up to the whole batch's (all)"),
    "max_steps": (int, "steps (20 passes over the data)"), "max_minutes": (float, "limit of time (none)"),
    "eval_every": (int, "steps between validations (100)"), "save_every": (int, "steps between saves (100)"),
    "patience": (int, "validations without a better one, then stop; 0: never (5)"),
    "min_delta": (float, "nats that count as better (0)"), "lr": (float, "peak learning rate (3e-3)"),
    "min_lr": (float, "final learning rate (1e-5)"), "warmup_steps": (int, "steps of linear warm-up (50)"),
    "weight_decay": (float, "on matrices only (0.1)"), "clip": (float, "largest gradient norm; 0: none (1)"),
    "seed": (int, "of the weights, the order of data and dropout (0)"),
}  # fmt: skip
DATA_FLAGS = {
    "vocab_size": (int, "at most so many tokens (8192)"),
    "min_count": (int, "a word seen less often becomes its bytes (2)"),
    "val_fraction": (float, "share of the documents to validate with (0.1)"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what and where")
    group.add_argument("--data", metavar="DIR", help="folder of .md and .txt documents (training_data)")
    group.add_argument("--val-data", metavar="DIR", help="validation documents (a tenth of --data)")
    group.add_argument("--out", default="runs/latest", metavar="DIR", help="the run's folder (%(default)s)")
    group.add_argument("--resume", action="store_true", help="go on with the run in --out, exactly where it stopped")
    group.add_argument("--accept", default="", metavar="NAMES", help="with --resume: flags that may differ, as a,b")
    group.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps (%(default)s)")
    group.add_argument("--precision", choices=("auto", "float32", "bf16"), help="of matrix products (auto: the faster)")
    group.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (every core)")
    group.add_argument("--ignore-memory", action="store_true", help="start even where memory looks too small")
    group = parser.add_argument_group("vocabulary")
    _add_flags(group, DATA_FLAGS)
    group.add_argument("--pattern", choices=("words", "whitespace"), help="whitespace: the WikiText convention (words)")
    group = parser.add_argument_group("model")
    group.add_argument("--preset", choices=("tiny", "small", "base"), help="shape to start from (small: 256 x 4)")
    _add_flags(group, {name: (float if name == "dropout" else int, text) for name, text in MODEL_FLAGS.items()})
    group.add_argument("--a-init", choices=("hippo", "uniform"), help="how the decay rates A start (hippo)")
    _add_flags(parser.add_argument_group("training"), TRAINING_FLAGS)
    return parser


def _add_flags(group: argparse._ArgumentGroup, flags: dict[str, tuple[type, str]]) -> None:
    for name, (kind, text) in flags.items():
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar="N" if kind is int else "X", help=text)


def main() -> int:
    args = build_parser().parse_args()
    if args.threads < 0:
        raise UserError("--threads must be at least 1")
    from mamba2_min import checkpoint  # torch takes seconds to import: not for --help

    with checkpoint.locked(args.out):
        return train(args)


def train(args: argparse.Namespace) -> int:
    import torch

    from mamba2_min import devices
    from mamba2_min.model import Mamba2LM
    from mamba2_min.runs import plan_run
    from mamba2_min.trainer import Trainer

    names = (*DATA_FLAGS, *MODEL_FLAGS, *TRAINING_FLAGS, "data", "val_data", "pattern", "a_init", "precision")
    wishes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    accept = tuple(name.strip().replace("-", "_") for name in args.accept.split(",") if name.strip())
    plan = plan_run(args.out, wishes, args.preset, args.resume, args.overwrite, accept)
    device = devices.pick_device(args.device)
    torch.set_num_threads(args.threads or devices.cpu_threads())
    devices.keep_freed_memory()

    corpus = plan.corpus(args.out)
    config, training = plan.config(corpus), plan.training
    show_corpus(plan, corpus)
    micro_batch = training.micro_batch or training.batch_size
    needed, free = devices.training_memory(config, micro_batch, training.context), devices.free_memory(device)
    if not args.ignore_memory:
        devices.check_memory(config, micro_batch, training.context, device)
    model = Mamba2LM(config, seed=training.seed)
    screen = Screen(corpus, model)
    trainer = Trainer(model, corpus, training, args.out, device, plan.resume, screen.report)
    if not plan.resume:
        plan.save(args.out)
    show_model(config, trainer, needed, free)
    if args.resume:
        where = f"from step {trainer.step:,}" if plan.resume else "nothing saved yet: from the start"
        print(f"resume      {where}", flush=True)
    with screen.watching(trainer):
        result = trainer.train()
    return show_result(result, trainer, args)


class Screen:
    """The bar, and a line and a sample of text at each evaluation."""

    def __init__(self, corpus, model):
        self.corpus, self.model = corpus, model
        self.bar = None
        self.validation = ""

    def watching(self, trainer):
        from tqdm import tqdm

        self.trainer = trainer
        self.bar = tqdm(
            total=trainer.settings.max_steps, initial=trainer.step, unit="step", dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 15, bar_format=_BAR, smoothing=0.1,
        )  # fmt: skip
        return self.bar

    def report(self, event: str, values: dict[str, Any]) -> None:
        if event == "step":
            self.bar.total = max(self.bar.n + 1, self._expected_steps())
            speed = values["tokens"] / values["seconds"]
            loss = f"loss {values['loss']:.3f}{self.validation}"
            self.bar.set_postfix_str(f"{loss}, {speed:,.0f} tokens/s", refresh=False)
            self.bar.update()
        elif event == "skipped":
            self.bar.write(f"step {values['step']:>6}  skipped: loss {values['loss']}, gradient norm {values['norm']}")
        elif event == "evaluation":
            score = values["score"]
            self.validation = f", validation {score.loss:.3f}"
            figures = f"{score.loss:.4f} nats a token, perplexity {score.perplexity:,.1f}"
            best = "  *" if values["best"] else ""
            self.bar.write(
                f"step {values['step']:>6}  validation {figures}, {score.bits_per_byte:.4f} bits per byte{best}"
            )
            self.bar.write("            | " + self.sample(values["step"]))

    def sample(self, seed: int) -> str:
        """What the model writes of itself, on one line."""
        eos = self.corpus.tokenizer.eos_id
        training = self.model.training
        self.model.eval()
        ids = list(self.model.generate([eos], 32, temperature=0.7, top_p=0.95, seed=seed, stop_ids=[eos]))
        self.model.train(training)
        return printable(" ".join(self.corpus.tokenizer.decode(ids).split()))

    def _expected_steps(self) -> int:
        """Where a clock ends the run, the bar's end follows the speed."""
        trainer = self.trainer
        return round(trainer.step / trainer.progress) if trainer.progress else trainer.settings.max_steps


_BAR = "{n_fmt:>6}/{total_fmt} {percentage:3.0f}%|{bar:16}| {elapsed}<{remaining}{postfix}"


def show_corpus(plan, corpus) -> None:
    d = plan.data
    print(
        f"documents   {corpus.documents:,} in {d['data']}: {corpus.train_documents:,} to train on, "
        f"{corpus.validation_documents:,} to validate with; {corpus.words:,} words"
    )
    print(
        f"tokens      {len(corpus.train):,} + {len(corpus.validation):,}, vocabulary {len(corpus.tokenizer):,} "
        f"(pattern {d['pattern']}, min-count {d['min_count']})"
    )
    for note in corpus.notes:
        print(f"note        {printable(note)}")


def show_model(config, trainer, needed: int, free: int | None) -> None:
    from mamba2_min.devices import size

    s = trainer.settings
    print(
        f"model       {config.num_parameters():,} parameters: d-model {config.d_model}, {config.n_layer} layers, "
        f"{config.nheads} heads of {config.headdim}, d-state {config.d_state}, A {config.a_init}"
    )
    limit = f" or {s.max_minutes:g} minutes" if s.max_minutes else ""
    print(
        f"training    context {trainer.windows.context}, batch {s.batch_size}, at most {s.max_steps:,} steps{limit}, "
        f"learning rate {s.lr:g} to {s.min_lr:g}, patience {s.patience}, seed {s.seed}"
    )
    if trainer.windows.note:
        print(f"note        {trainer.windows.note}")
    there = f" of {size(free)} free" if free is not None else ""
    print(f"device      {trainer.device}, {trainer.precision}; needs about {size(needed)}{there}", flush=True)


_REASONS = {
    "patience": "no better validation for {patience} evaluations",
    "max_steps": "all {max_steps:,} steps done",
    "max_minutes": "{max_minutes:g} minutes are over",
    "signal": "stopped",
    "not finite": "the loss or its gradient was not finite in {max_bad_steps} steps in a row",
}


def show_result(result, trainer, args: argparse.Namespace) -> int:
    s = trainer.settings
    print(f"ended       at step {result.step:,}: " + _REASONS[result.reason].format(**vars(s)))
    if result.reason == "signal":
        argv = [arg for arg in sys.argv if arg not in ("--resume", "--overwrite")]
        print(f"saved       go on with: python {shlex.join([*argv, '--resume'])}")
        return 128 + result.signal
    if result.best is not None:
        print(
            f"best        step {result.best_step:,}: {result.best.loss:.4f} nats a token, perplexity "
            f"{result.best.perplexity:,.1f}, {result.best.bits_per_byte:.4f} bits per byte"
        )
        print(f"saved       {args.out}; complete text with: python run.py --model {shlex.quote(args.out)}")
    return 1 if result.reason == "not finite" else 0


if __name__ == "__main__":
    run_script(main)
