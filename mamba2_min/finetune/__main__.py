"""Fine-tunes a trained model: to answer requests, or to sort texts.

    python -m mamba2_min.finetune --model runs/mine --data chat.jsonl --task chat --out runs/chat
    python -m mamba2_min.finetune --model runs/mine --data mail.csv --task classify --out runs/spam

Chat records have `messages`, or `prompt` and `completion`, or `instruction`, `input` and `output`; a folder of
`request<start>answer` documents works too. Records to sort have a text and a label. --method lora (the default) trains
small adapters and leaves the base as it is; full trains every weight; state trains the initial state alone.

torchrun --nproc-per-node N -m mamba2_min.finetune ... trains with several processes (docs/distributed.md).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import sys

from mamba2_min import console
from mamba2_min.errors import UserError, run_script
from mamba2_min.finetune.spec import SHOWN, FinetuneSettings, plan
from mamba2_min.flags import HelpFormatter, add_flags, asked_for, check_threads
from mamba2_min.settings import Settings


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mamba2_min.finetune", description=__doc__, formatter_class=HelpFormatter
    )
    run = parser.add_argument_group("the run")
    run.add_argument("--out", default="runs/finetuned", metavar="DIR", help="the new run's folder (%(default)s)")
    either = run.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="continue the run in --out exactly where it stopped")
    either.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    run.add_argument("--accept", default="", metavar="NAMES", help="with --resume: what may differ: max-steps, ...")
    run.add_argument("--sweep", type=float, nargs="+", metavar="X", help="try these learning rates, with full and lora")
    add_flags(parser.add_argument_group("what is learnt"), dataclasses.fields(FinetuneSettings))
    fields = dataclasses.fields(Settings)
    of_documents = ("validate", "carry_state")  # each record is read from an empty state
    training = (f for f in fields if f.metadata["group"] == "training" and f.name not in of_documents)
    add_flags(parser.add_argument_group("training"), training, SHOWN)
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps (%(default)s)")
    add_flags(machine, (f for f in fields if f.metadata["group"] == "machine"))
    machine.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (every core)")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    check_threads(args)
    if not args.out:
        raise UserError("--out needs the name of a folder")
    console.install("the training goes on")
    accept = tuple(name.strip().replace("-", "_") for name in args.accept.split(",") if name.strip())
    overrides = asked_for(args, FinetuneSettings, Settings)
    spec = plan(args.out, overrides, args.resume, args.overwrite, accept)

    import torch  # takes seconds to import: not for --help

    from mamba2_min import devices, files
    from mamba2_min.finetune import run
    from mamba2_min.finetune.sweep import sweep
    from mamba2_min.training import distributed

    if args.sweep and distributed.launched():
        raise UserError("--sweep takes one process: start it without torchrun")
    device = distributed.local_device(devices.pick_device(args.device))
    torch.set_num_threads(args.threads or distributed.local_threads(devices.cpu_threads(device)))
    devices.keep_freed_memory()
    if not distributed.is_leader():
        console.silence()
    try:
        with distributed.joined(device) as team, contextlib.ExitStack() as held:
            if team.leads:
                held.enter_context(files.locked(args.out, run.FILES))
            team.wait()
            if args.sweep:
                return sweep(spec, args.sweep, args.out, device)
            arguments = [arg for arg in sys.argv[1:] if arg not in ("--resume", "--overwrite")]
            again = shlex.join(["python", "-m", "mamba2_min.finetune", *arguments, "--resume"])
            result = run.finetune(spec, args.out, device, again)
    except distributed.Gone:
        if distributed.is_leader():
            raise
        return 1
    if result.signal:
        return 128 + result.signal
    return 1 if result.best is None or result.reason == "bad steps" else 0


if __name__ == "__main__":
    run_script(main)
