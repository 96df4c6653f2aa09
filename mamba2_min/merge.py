"""Merges a LoRA adapter into its base: the result is an ordinary run's folder, as fast and as large as the base.

    python -m mamba2_min.merge --adapter runs/chat --out runs/chat-merged

The logits before and after are compared; where they differ by more than 1e-4 of their size, nothing is written.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mamba2_min import console, flags
from mamba2_min.errors import UserError, run_script

_LARGEST = 1e-4  # relative difference of the logits


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mamba2_min.merge", description=__doc__, formatter_class=flags.HelpFormatter
    )
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the folder of a fine-tuning with lora")
    parser.add_argument("--model", metavar="DIR", help="the base, where it has moved (the one that the adapter names)")
    parser.add_argument("--out", type=flags.folder, required=True, metavar="DIR", help="the new folder")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    console.install("the merge goes on")
    difference = merge(args.adapter, args.out, args.model)
    console.print(f"merged: {args.out}; the logits differ by {difference:.1e} of their size")
    console.print(f"complete text with: python run.py --model {args.out}")
    return 0


def merge(adapter_folder: str | Path, out: str | Path, base: str | Path | None = None) -> float:
    """Writes the merged model to `out` and returns the relative difference of its logits. Raises UserError."""
    import torch

    from mamba2_min import files
    from mamba2_min.checkpoints import checkpoint
    from mamba2_min.finetune import adapter, labels
    from mamba2_min.finetune.initial_state import TunedStateLM
    from mamba2_min.finetune.lora import merge_lora

    folder, out = Path(adapter_folder), Path(out)
    if files.exists(out / checkpoint.CONFIG) or files.exists(out / checkpoint.WEIGHTS):
        raise UserError(f"{out} already holds a model; name another folder")
    model, source = adapter.load_base(folder, base)
    model = adapter.load_adapter(folder, model).eval()
    if isinstance(model, TunedStateLM):
        raise UserError(f"{folder} holds a learnt initial state, which has no weight to be merged into")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, 64), generator=generator)
    with torch.inference_mode():
        before = model(ids)[0].double()
    merge_lora(model)
    with torch.inference_mode():
        difference = float((model(ids)[0].double() - before).norm() / before.norm())
    if not difference <= _LARGEST:
        raise UserError(f"the merged model's logits differ by {difference:.1e} of their size: nothing was written")
    with files.locked(out, checkpoint.RUN_FILES):
        for name in (checkpoint.TOKENIZER, checkpoint.SETTINGS, labels.LABELS, labels.HEAD):
            where = folder if files.is_file(folder / name) else Path(source)
            if files.is_file(where / name):
                _copy(where / name, out / name)
        model.save_pretrained(out)
    return difference


def _copy(source: Path, target: Path) -> None:
    from mamba2_min import files

    content = files.read_bytes(source, 1 << 30)
    files.write_atomically(target, lambda file: file.write(content))


if __name__ == "__main__":
    run_script(main)
