"""What fine-tuning is about, for the trainer: answers to learn or texts to sort, and what of a model goes to disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamba2_min.checkpoints.safetensors import load_safetensors
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError
from mamba2_min.evaluation.perplexity import Score
from mamba2_min.finetune import adapter
from mamba2_min.finetune.conversations import Example
from mamba2_min.finetune.lora import LoRAConfig
from mamba2_min.finetune.packing import PackedWindows, batches_of, lay_out
from mamba2_min.ops.loss import IGNORE
from mamba2_min.settings import Settings
from mamba2_min.training.distributed import team
from mamba2_min.training.task import ModelFiles, Task


@dataclass
class AdapterFiles(ModelFiles):
    """An adapter's two files instead of the whole model. `base` is the folder of the base, `digest` of its weights."""

    base: str
    lora: LoRAConfig | None
    digest: str

    best = (adapter.CONFIG, adapter.WEIGHTS)

    def prepare(self, out: Path, model: Any) -> None:
        """An adapter's folder needs nothing before the first step."""

    def trained(self, model: nn.Module) -> dict[str, Tensor]:
        return adapter.adapter_tensors(model)  # type: ignore[arg-type]

    def unwrapped(self, model: Any) -> Any:
        return model

    def check(self, tensors: dict[Any, Any], model: nn.Module) -> None:
        adapter.check_tensors(tensors, self.trained(model))

    def restore(self, model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
        try:
            adapter.put_tensors(model, tensors)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"{source}: {error}") from error

    def save(self, out: Path, model: Any) -> None:
        adapter.save_adapter(out, model, self.base, self.lora, self.digest)

    def load(self, out: Path, model: nn.Module) -> None:
        self.restore(model, load_safetensors(out / adapter.WEIGHTS)[0], out / adapter.WEIGHTS)

    def is_saved(self, out: Path, model: nn.Module) -> bool:
        try:
            there, metadata = load_safetensors(out / adapter.WEIGHTS)
            adapter.read_config(out)
        except UserError:
            return False
        here = self.trained(model)
        same = there.keys() == here.keys() and all(torch.equal(there[name], here[name].cpu()) for name in here)
        return same and metadata.get(adapter.DIGEST) == self.digest


class Answers(Task):
    """The answers of conversations, each given all that was said before it in its own conversation."""

    def __init__(
        self,
        train: Sequence[Example],
        validation: Sequence[Example],
        tokenizer: WordTokenizer,
        files: ModelFiles | None = None,
        alone: bool = False,
    ):
        """`alone`: one conversation per row, for a learnt initial state, which only the first of a row begins with."""
        self.train, self.validation, self.tokenizer, self.alone = train, validation, tokenizer, alone
        self.files = files or ModelFiles()

    @property
    def digest(self) -> str:
        content = hashlib.sha256(self.tokenizer.digest().encode())
        for part in (self.train, self.validation):
            content.update(len(part).to_bytes(8, "little"))
            for example in part:
                content.update(example.ids.numpy().astype("<i8").tobytes())
                content.update(example.learnt.numpy().tobytes())
        return content.hexdigest()

    @property
    def validation_size(self) -> tuple[int, int]:
        return sum(int(e.learnt.sum()) for e in self.validation), sum(e.n_bytes for e in self.validation)

    def batches(self, settings: Settings) -> PackedWindows:
        return PackedWindows(self.train, settings.context, settings.batch_size, settings.seed, self.alone)

    def steps_per_epoch(self, batches: Any, settings: Settings) -> float:
        return batches.length

    @torch.no_grad()
    def evaluate(self, model: Any, autocast: AbstractContextManager) -> Score:
        """The loss of the validation answers: nats per token of an answer, its end token included.

        Several processes share the batches out, and have the same figure.
        """
        if not self.validation:
            raise UserError("nothing to validate with: the validation part has no record")
        device, modes = next(model.parameters()).device, [(m, m.training) for m in model.modules()]
        model.eval()
        processes = team()
        nats: list[float] = []  # of each batch
        tokens = 0
        try:
            longest = max(len(example) for example in self.validation)
            batches = batches_of(self.validation, range(len(self.validation)), min(longest, 512), 8, self.alone)
            for k, (room, rows) in enumerate(batches):
                input_ids, targets, seq_idx = lay_out(self.validation, rows, room)
                count = int((targets != IGNORE).sum())
                tokens += count
                if k % processes.size != processes.rank:
                    nats.append(0.0)
                    continue
                with autocast:
                    loss = model.loss(input_ids.to(device), targets.to(device), seq_idx=seq_idx.to(device))
                nats.append(float(loss) * count)
        finally:
            for module, mode in modes:
                module.training = mode
        every = torch.tensor(nats, dtype=torch.float64)
        processes.total([every])
        return Score(sum(every.tolist()), tokens, self.validation_size[1])
