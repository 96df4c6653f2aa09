"""How well a model predicts far into a text: perplexity by position, in doubling buckets.

    python -m mamba2_min.evaluation.position --model runs/mine --data book.txt --out position

A token at position i is predicted from the i tokens before it. The text is read once with the state carried from its
first token to its last, and once with the state cleared every `reset` tokens, the length that the model was trained on.
Both score the very same tokens, so that their difference, the gain in nats per token, says what the distant past is
worth; its standard error is that of the difference itself, far smaller than those of the two. A Transformer beside them
(--transformer) is cut off where its cache no longer fits.

What it can say: whether a model still works beyond the length that it was trained on, and whether it gains from what
lies there. What it cannot: whether a bucket is hard because it is far, or because the text is hard there. Compare two
curves of one bucket, not two buckets of one curve.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba2_min import flags
from mamba2_min.errors import UserError, run_script

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from mamba2_min.models.base import LanguageModel

WINDOW = 2048  # tokens per forward pass: memory does not depend on the text's length


@dataclass(frozen=True)
class Bucket:
    """Positions `first` to `last` (counted from 1): the mean loss in nats per token, and its standard error."""

    first: int
    last: int
    tokens: int
    loss: float
    error: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def losses_by_position(model: LanguageModel, ids: Tensor, start_id: int, reset: int | None = None) -> Tensor:
    """The loss in nats of each token of `ids` (l,), read after `start_id` with the state carried on: (l,) float32.

    reset: begin again from an empty state every so many tokens; the first of each stretch is predicted from `start_id`.
    Raises UserError for an empty text.
    """
    import torch
    from torch.nn import functional as F

    if not len(ids):
        raise UserError("the text has no tokens")
    device = next(model.parameters()).device
    losses = torch.empty(len(ids))
    inputs = torch.cat([ids.new_tensor([start_id]), ids[:-1]]).long()
    state: Any = None
    with torch.inference_mode():
        position = 0
        while position < len(ids):
            if reset is not None and position % reset == 0:
                state = None
                inputs[position] = start_id
            end = min(len(ids), position + WINDOW)
            if reset is not None:
                end = min(end, (position // reset + 1) * reset)
            hidden, state = model.hidden(inputs[None, position:end].to(device), state)
            for part in range(position, end, 256):  # a slice of the logits at a time
                upto = min(end, part + 256)
                logits = model.lm_head(hidden[0, part - position : upto - position])[:, : model.config.vocab_size]
                losses[part:upto] = F.cross_entropy(logits.float(), ids[part:upto].long().to(device), reduction="none")
            position = end
    return losses


def buckets(losses: Tensor) -> list[Bucket]:
    """Means over positions 1, 2, 3-4, 5-8, 9-16 and so on, each twice as long as the one before."""
    found, first, last = [], 1, 1
    while first <= len(losses):
        part = losses[first - 1 : last].double()
        error = float(part.std() / math.sqrt(len(part))) if len(part) > 1 else math.nan
        found.append(Bucket(first, min(last, len(losses)), len(part), float(part.mean()), error))
        first, last = last + 1, 2 * last
    return found


def table(curves: dict[str, list[Bucket]], gain: list[Bucket]) -> str:
    """A line per bucket: positions, tokens, the perplexity of each curve, and the gain in nats where there is one."""
    names = list(curves)
    longest = max(curves.values(), key=len)
    head = [f"{name:>22}" for name in names] + [f"{'gain, nats':>16}"] * bool(gain)
    lines = [f"{'positions':>17}  {'tokens':>8}  " + "  ".join(head)]
    for k, bucket in enumerate(longest):
        line = f"{bucket.first:>8,} -{bucket.last:>7,}  {bucket.tokens:>8,}"
        for name in names:
            here = curves[name][k] if k < len(curves[name]) else None
            line += "  " + (f"{here.perplexity:>12,.2f} ± {here.error * here.perplexity:>7.2f}" if here else " " * 22)
        if gain:
            line += f"  {gain[k].loss:>7.4f} ± {gain[k].error:>6.4f}"
        lines.append(line)
    return "\n".join(lines)


def plot(curves: dict[str, list[Bucket]], gain: list[Bucket], path: Path, trained: int | None) -> None:
    """Draws loss against position, the training length marked, and below it the gain of the carried state."""
    import matplotlib.pyplot as plt

    from mamba2_min.plots import BLUE, GREEN, GREY, ORANGE, STYLE, save_figure

    with plt.rc_context(STYLE):
        height = (8.0, 5.6) if gain else (8.0, 4.0)
        figure, panels = plt.subplots(
            1 + bool(gain), 1, figsize=height, sharex=True, squeeze=False, layout="constrained"
        )
        top, bottom = panels[0, 0], panels[-1, 0]
        for (name, found), colour in zip(curves.items(), (BLUE, ORANGE, GREEN, GREY), strict=False):
            _draw(top, found, colour, name)
        top.set_ylabel("loss, nats per token")
        top.legend()
        if gain:
            _draw(bottom, [b for b in gain if b.last > (trained or 0)], BLUE, "")
            bottom.axhline(0, color=GREY, linewidth=0.8)
            bottom.set_ylabel("gain of the carried\nstate, nats per token")
        if trained:
            for panel in panels[:, 0]:
                panel.axvline(trained, color=GREY, linestyle="--", linewidth=0.8)
            top.text(trained, top.get_ylim()[1], " trained on this length", va="top", fontsize=8)
        bottom.set_xscale("log", base=2)
        bottom.set_xlabel("position in the text, tokens")
        save_figure(figure, path)


def _draw(panel: Axes, found: list[Bucket], colour: str, label: str) -> None:
    shown = [b for b in found if b.tokens > 1]
    centres = [math.sqrt(b.first * b.last) for b in shown]
    losses, errors = [b.loss for b in shown], [b.error for b in shown]
    panel.errorbar(centres, losses, errors, fmt="o-", markersize=4, color=colour, label=label, capsize=2)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the command prints and writes."""
    import torch

    from mamba2_min import devices
    from mamba2_min.checkpoints import checkpoint
    from mamba2_min.data.documents import read_documents
    from mamba2_min.data.tokenizer import WordTokenizer
    from mamba2_min.models.mamba2 import Mamba2LM
    from mamba2_min.models.transformer import TransformerLM

    device = devices.pick_device(args.device)
    model = Mamba2LM.from_pretrained(args.model).to(device)
    tokenizer = WordTokenizer.load(Path(args.model) / checkpoint.TOKENIZER)
    text = max(read_documents(args.data, encoding=args.encoding), key=lambda document: len(document.text))
    ids = torch.tensor(tokenizer.encode(text.text)[: args.max_tokens], dtype=torch.int32)
    reset = args.reset or _trained_context(args.model)
    carried = losses_by_position(model, ids, tokenizer.eos_id)
    curves, gain = {"state carried": buckets(carried)}, []
    if reset:
        again = losses_by_position(model, ids, tokenizer.eos_id, reset)
        curves[f"cleared every {reset:,}"] = buckets(again)
        gain = buckets(again - carried)
    if args.transformer:
        other = TransformerLM.from_pretrained(args.transformer).to(device)
        if other.config.vocab_size != model.config.vocab_size:
            raise UserError(f"{args.transformer} has another vocabulary than {args.model}: their losses do not compare")
        curves["Transformer"] = buckets(_until_memory_ends(other, ids, tokenizer.eos_id))
    return {"source": text.source, "tokens": len(ids), "trained": reset, "curves": curves, "gain": gain}


def _until_memory_ends(model: LanguageModel, ids: Tensor, start_id: int) -> Tensor:
    """Losses of as long a beginning of the text as the cache has room for: halved until it does."""
    from mamba2_min import devices

    length = len(ids)
    while True:
        try:
            return losses_by_position(model, ids[:length], start_id)
        except (RuntimeError, MemoryError) as error:
            if not devices.is_out_of_memory(error) or length < 2:
                raise
        length //= 2


def _trained_context(run: str) -> int | None:
    from mamba2_min import files
    from mamba2_min.checkpoints import checkpoint

    path = Path(run) / checkpoint.SETTINGS
    settings = files.load_json(path) if files.is_file(path) else {}
    training = settings.get("training") if isinstance(settings, dict) else None
    context = training.get("context") if isinstance(training, dict) else None
    return context if type(context) is int and 0 < context < 1 << 31 else None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mamba2_min.evaluation.position", description=__doc__, formatter_class=flags.HelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a run's folder")
    parser.add_argument("--data", required=True, metavar="FILE", help="a text; of a folder, its longest document")
    parser.add_argument("--encoding", metavar="NAME", help="how files that are not UTF-8 are encoded: cp1252, ...")
    parser.add_argument(
        "--out",
        type=flags.folder,
        default="position",
        metavar="DIR",
        help="for position.json and position.png (%(default)s)",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=1 << 20, metavar="N", help="read at most so many (%(default)s)"
    )
    parser.add_argument("--reset", type=int, metavar="N", help="clear the state every N tokens (the run's context)")
    parser.add_argument("--transformer", metavar="DIR", help="a Transformer's run with the same vocabulary")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps (%(default)s)")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    flags.check_integers(args, max_tokens=1, reset=1)
    from dataclasses import asdict

    from mamba2_min.files import make_folder, save_json

    out = make_folder(args.out)
    result = measure(args)
    print(f"{result['source']}: {result['tokens']:,} tokens\n")
    print(table(result["curves"], result["gain"]))
    curves = {name: [asdict(b) for b in found] for name, found in result["curves"].items()}
    save_json(out / "position.json", {**result, "curves": curves, "gain": [asdict(b) for b in result["gain"]]})
    plot(result["curves"], result["gain"], out / "position.png", result["trained"])
    print(f"\nwritten: {out / 'position.json'}, {out / 'position.png'}")
    return 0


if __name__ == "__main__":
    run_script(main)
