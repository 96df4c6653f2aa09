"""Trains a Mamba-2 on the documents of a folder, with early stopping, and leaves all that run.py needs.

python train.py --data training_data --out runs/mine
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import sys
from typing import TYPE_CHECKING

from mamba2_min import console
from mamba2_min.config import Mamba2Config
from mamba2_min.errors import UserError, run_script
from mamba2_min.flags import HelpFormatter, add_flags, asked_for, check_threads
from mamba2_min.settings import MODEL_FLAGS, PRESETS, DataSettings, Settings

if TYPE_CHECKING:
    from torch import device as Device


def build_parser() -> argparse.ArgumentParser:
    """The flags: those that follow from the settings' fields, and those that are the command's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    run = parser.add_argument_group("the run")
    run.add_argument("--out", default="runs/latest", metavar="DIR", help="the run's folder (%(default)s)")
    either = run.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="continue the run in --out exactly where it stopped")
    either.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    run.add_argument("--accept", default="", metavar="NAMES", help="with --resume: what may differ: max-steps, ...")
    documents = dataclasses.fields(DataSettings)
    add_flags(run, (f for f in documents if f.metadata["group"] == "start"))
    group = parser.add_argument_group("documents and vocabulary")
    add_flags(group, (f for f in documents if f.metadata["group"] != "start"))
    model = parser.add_argument_group("model")
    model.add_argument("--preset", choices=tuple(PRESETS), help="shape to start from (small: 256 x 4)")
    add_flags(model, (f for f in dataclasses.fields(Mamba2Config) if f.name in MODEL_FLAGS), PRESETS["small"])
    fields = dataclasses.fields(Settings)
    add_flags(
        parser.add_argument_group("training"), (f for f in fields if f.metadata["group"] in ("recipe", "training"))
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps (%(default)s)")
    add_flags(machine, (f for f in fields if f.metadata["group"] == "machine"))
    machine.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (every core)")
    machine.add_argument(
        "--tensorboard", action="store_true", help="also write what metrics.jsonl holds to DIR/tensorboard"
    )
    machine.add_argument("--context-parallel", type=int, default=1, metavar="N", help="processes that share each text")
    machine.add_argument("--shard", action="store_true", help="divide weights and moments among the processes")
    machine.add_argument("--ignore-memory", action="store_true", help="start even where memory looks too small")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    check_threads(args)
    if args.context_parallel < 1:
        raise UserError("--context-parallel must be at least 1")
    if not args.out:
        raise UserError("--out needs the name of a folder")
    console.install("the training goes on")
    from mamba2_min import devices, files  # torch takes seconds to import: not for --help
    from mamba2_min.checkpoints import checkpoint
    from mamba2_min.training import distributed

    device = distributed.local_device(devices.pick_device(args.device))
    if not distributed.is_leader():
        console.silence()
    try:
        with distributed.joined(device, args.context_parallel, args.shard) as team, contextlib.ExitStack() as held:
            if team.leads:
                held.enter_context(files.locked(args.out, checkpoint.RUN_FILES))
            team.wait()
            return train(args, device)
    except distributed.Gone:
        if distributed.is_leader():
            raise
        return 1


def train(args: argparse.Namespace, device: Device) -> int:
    """Plans, reads, checks, trains; prints each; returns the exit status."""
    import torch

    from mamba2_min import devices
    from mamba2_min.training import distributed, screen
    from mamba2_min.training.memory import check_memory, fit_to_memory
    from mamba2_min.training.runs import plan_run
    from mamba2_min.training.tensorboard import Board, writer_class
    from mamba2_min.training.trainer import Trainer

    if args.tensorboard:
        writer_class()  # what is missing is said now, not after reading the documents
    team = distributed.team()
    accept = tuple(name.strip().replace("-", "_") for name in args.accept.split(",") if name.strip())
    overrides = asked_for(args, DataSettings, Mamba2Config, Settings)
    plan = plan_run(args.out, overrides, args.preset, args.resume, args.overwrite, accept)
    torch.set_num_threads(args.threads or distributed.local_threads(devices.cpu_threads(device)))
    devices.keep_freed_memory()

    corpus = plan.corpus(args.out, args.ignore_memory)
    config = plan.config(corpus)
    screen.show_corpus(plan.data, corpus)
    context = min(plan.training.context, max(len(corpus.train) - 1, 1))  # no window is longer than the text
    bounded = dataclasses.replace(plan.training, context=context)
    fitting = fit_to_memory(config, bounded, device, team)
    memory = check_memory(config, fitting, device, args.ignore_memory, team)
    plan = dataclasses.replace(plan, training=dataclasses.replace(plan.training, micro_batch=fitting.micro_batch))

    model = plan.build(config)
    view = screen.Screen(None if team.sharded else screen.sample_of(model, corpus.tokenizer))
    trainer = Trainer(model, corpus, plan.training, args.out, device, plan.resume, view.report, plan.accept_documents)
    team.wait()  # until every process has read what the folder held
    if team.leads:
        plan.save(args.out)
    screen.show_training(trainer, *memory)
    if args.resume:
        started = f"from step {trainer.step:,}" if trainer.resumed else "nothing saved yet: from the beginning"
        screen.show("resume", started)
    if plan.data.init_from and not trainer.resumed:
        screen.show_start(trainer, plan.data.init_from, corpus)
    if trainer.resumed and trainer.evaluated_step == trainer.step and trainer.ended():
        screen.show("note", "this run has ended already; nothing is changed")
    shown = args.tensorboard and team.leads
    with Board(args.out, trainer.step) if shown else contextlib.nullcontext() as board:
        trainer.log.mirror = board and board.write
        with view.watching(trainer):
            result = trainer.train()
    arguments = [arg for arg in sys.argv if arg not in ("--resume", "--overwrite")]
    screen.show_result(result, trainer, f"python {shlex.join([*arguments, '--resume'])}")
    if result.signal:
        return 128 + result.signal
    return 1 if result.best is None or result.reason == "bad steps" else 0


if __name__ == "__main__":
    run_script(main)
