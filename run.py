#!/usr/bin/env python3
r"""Complete text with a trained model: once for --prompt or for standard input, otherwise in a dialogue.

python run.py                                          # the completer
python run.py --prompt "Once upon a time"
echo "Once upon a time" | python run.py > story.txt    # the completion alone
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from mamba2_min import validate
from mamba2_min.errors import UserError, output_status, printable, run_script
from mamba2_min.finetune.talk import Chat
from mamba2_min.flags import HelpFormatter, Parser
from mamba2_min.inference.dialogue import Dialogue, how_it_ended, reading, show, write_out
from mamba2_min.inference.terminal import DIM, is_terminal, styled, wrapped
from mamba2_min.inference.writing import add_flags, described, prepare, sampler_of

RUNS = Path("runs")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "\\": "\\"}


def main() -> int:
    args = _parse(sys.argv[1:])
    prompt = args.prompt
    if prompt is None and not (is_terminal(sys.stdin) or "ipykernel" in sys.modules):
        prompt = _read_standard_input()
    folder, found = (args.model, "") if args.model is not None else _find_run()

    # Threads that wait for each other would spin, many times in each word; where other programs have work to do, that
    # made a word take twenty times as long. It is read once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from mamba2_min.devices import pick_device
    from mamba2_min.finetune.load import open_run
    from mamba2_min.inference.suggestions import suggested_prompts

    sampler = sampler_of(args)
    device = pick_device(args.device)
    weights = None if args.quantize == "none" else args.quantize
    completer, template = open_run(folder, args.adapter, args.chat, device, weights)
    sampler = prepare(args, sampler, completer)
    stream = sys.stdout if prompt is None or is_terminal(sys.stdout) else sys.stderr
    for label, text in (
        (
            "model",
            f"{printable(str(folder))}{found}, {completer.model.config.num_parameters():,} "
            f"parameters{'' if args.quantize == 'none' else f' in {args.quantize}'}, "
            f"{len(completer.tokenizer):,} tokens known, on {device.type}",
        ),
        ("sampling", described(sampler, completer.known_words, all_of_it=not is_terminal(sys.stdout))),
        (
            "length",
            f"at most {args.max_tokens:,} tokens, to the end of the document"
            + "".join(f" or {stop!r}" for stop in args.stop),
        ),
    ):
        print(wrapped(text, f"{label:10}", " " * 10, stream), file=stream, flush=True)
    if prompt is None:
        settings = (completer, sampler, args.max_tokens, args.stop)
        if template is None:
            Dialogue(*settings, suggested_prompts(folder, completer.tokenizer)).run()
        else:
            Chat(*settings, template).run()
        return 0
    try:
        write = completer.complete if template is None else Chat(completer, sampler, 1, (), template).reply
        with reading(completer):
            pieces, prompt = write(prompt, args.max_tokens, sampler, args.stop), "" if template else prompt
        show(pieces, prompt) if is_terminal(sys.stdout) else write_out(pieces)
    except FloatingPointError as error:
        raise UserError(str(error)) from None
    status = output_status("the text")
    if not status:
        print(styled(how_it_ended(completer), DIM, sys.stderr), file=sys.stderr)
    return status


def _find_run() -> tuple[Path, str]:
    """runs/demo, or else the run whose model was saved last; and how to say which it is."""
    models = [path for path in RUNS.glob("*/model.pt") if (path.parent / "config.json").is_file()]
    if RUNS / "demo" / "model.pt" in models:
        return RUNS / "demo", ""
    if not models:
        raise UserError(f"there is no trained model in {RUNS}/; train one with train.py, or name it with --model")
    return max(models, key=lambda path: path.stat().st_mtime).parent, " (the newest run)"


def _read_standard_input() -> str:
    """All of it, less the line end with which `echo` and editors close a text."""
    if sys.stdin is None:
        raise UserError("there is neither a prompt nor a terminal; give --prompt TEXT")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"standard input is not UTF-8: byte 0x{byte:02X} at offset {error.start:,}") from None
    return text.replace("\r\n", "\n").removesuffix("\n")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    model = parser.add_argument_group("the model")
    model.add_argument("--model", metavar="DIR", type=Path, help="a run's folder (default: runs/demo or the newest)")
    model.add_argument("--adapter", metavar="DIR", type=Path, help="what a fine-tuning of that model left")
    model.add_argument("--chat", action="store_true", help="a conversation, with a model that was fine-tuned for it")
    model.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: auto")
    model.add_argument(
        "--quantize",
        choices=["none", "int8", "bf16"],
        default="none",
        help="narrower weights, on a CPU: a quarter (int8) or half (bf16) of the memory, and faster (default: none)",
    )
    text = parser.add_argument_group("the text")
    text.add_argument("--prompt", metavar="TEXT", type=_text, help='how it begins; "" lets the model begin a document')
    text.add_argument("--max-tokens", metavar="N", type=_count, default=200, help="at most this many (default: 200)")
    text.add_argument(
        "--stop",
        metavar="TEXT",
        type=_stop,
        action="append",
        default=[],
        help=r"stop before this text (\n is a line end, \t a tab, \\ a backslash); may be given several times",
    )
    add_flags(parser.add_argument_group("which word comes next"))
    return parser.parse_args(arguments)


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"character {error.start + 1} is not UTF-8") from None
    return value


def _stop(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("a stop text cannot be empty")
    return re.sub(r"\\([nrtf\\])", lambda found: _ESCAPES[found[1]], _text(value))


def _count(value: str) -> int:
    try:
        return validate.integer("it", int(value), 1, 2**63 - 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {value!r}") from None


if __name__ == "__main__":
    run_script(main)
