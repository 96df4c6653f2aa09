"""A training's task: its batches, how a model is validated, and which parts of the model are saved.

The trainer's loop uses nothing else. Pretraining on a corpus is below; fine-tuning (finetune/) has other tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamba2_min import files
from mamba2_min.checkpoints import checkpoint
from mamba2_min.data.corpus import Corpus
from mamba2_min.data.epochs import Epochs
from mamba2_min.data.streams import Streams, are_long
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.data.windows import Windows
from mamba2_min.errors import UserError
from mamba2_min.evaluation.perplexity import Score, evaluate
from mamba2_min.settings import Settings
from mamba2_min.training.distributed import team
from mamba2_min.training.last import check_model


class ModelFiles:
    """A run's config.json and model.pt: the whole model. A subclass saves another part of it."""

    best: tuple[str, ...] = (checkpoint.WEIGHTS,)  # the files that hold the best model

    def prepare(self, out: Path, model: Any) -> None:
        """Writes what a new run's folder needs before the first step, besides its tokenizer."""
        files.save_json(out / checkpoint.CONFIG, model.config.to_dict())

    def trained(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors that training changes: what last.pt holds."""
        return model.state_dict()

    def unwrapped(self, model: Any) -> Any:
        """The model to train, without wrappers. Raises UserError if `save` could not save it."""
        return checkpoint.plain_model(model)

    def check(self, tensors: dict[Any, Any], model: nn.Module) -> None:
        """Raises ValueError unless `tensors`, from a file, can be what `trained` returned for this model."""
        check_model(tensors, model)

    def restore(self, model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
        """Copies what `trained` returned into the model. Raises UserError if it is of another model."""
        checkpoint.load_weights(model, tensors, source)

    def save(self, out: Path, model: Any) -> None:
        """Writes the best model, atomically."""
        checkpoint.save_model(out, model.config, model.state_dict())

    def load(self, out: Path, model: nn.Module) -> None:
        """Puts the best model back. Raises UserError where it cannot be read."""
        path = out / checkpoint.WEIGHTS
        checkpoint.load_weights(model, checkpoint.load_tensors(path), path)

    def is_saved(self, out: Path, model: nn.Module) -> bool:
        """Whether the files that `save` writes are on disk already, equal to the model's present tensors."""
        try:
            _, there = checkpoint.load_model(out)
            return all(torch.equal(there[name], tensor.cpu()) for name, tensor in model.state_dict().items())
        except (UserError, KeyError):
            return False


class Task(ABC):
    """`tokenizer` and `digest` identify a task: a run resumes only with the same ones."""

    tokenizer: WordTokenizer
    files: ModelFiles = ModelFiles()

    @property
    @abstractmethod
    def digest(self) -> str:
        """The sha256 of all data, in hexadecimal."""

    @abstractmethod
    def batches(self, settings: Settings) -> Epochs:
        """The training batches, from the first: (input_ids, targets) or (input_ids, targets, seq_idx), each (b, l)
        int64. A fourth, fresh (b,) bool, says that rows go on from batch to batch (`Streams`).

        Raises UserError where there is nothing to learn from.
        """

    @abstractmethod
    def evaluate(self, model: Any, autocast: AbstractContextManager) -> Score:
        """The validation score. The model's mode is put back as it was."""

    @property
    def text(self) -> Tensor | None:
        """(l,): the tokens of a training text whose distribution `input_noise` draws from, or None where it is not for
        this task."""
        return None

    @property
    @abstractmethod
    def validation_size(self) -> tuple[int, int]:
        """The number of predictions that `evaluate` scores, and of the bytes that they spell."""

    def restored_score(self, values: dict[str, Any]) -> Score:
        """The score that was saved as a dictionary. Raises ValueError where it is not of this validation part."""
        if values.keys() != {"nats", "tokens", "n_bytes"}:
            raise ValueError("its best score is of another kind")
        if (values["tokens"], values["n_bytes"]) != self.validation_size:
            raise ValueError("its best score is of another validation part")
        return Score(**values)

    def steps_per_epoch(self, batches: Epochs, settings: Settings) -> float:
        """How many steps go through the data once."""
        return batches.targets_per_epoch / (batches.context * settings.batch_size)


class Pretraining(Task):
    """The next token of every document of a corpus."""

    def __init__(self, corpus: Corpus, carried: bool = False):
        """`carried`: validation carries the state from one document to the next, else each begins from an empty one."""
        self.corpus, self.tokenizer, self.carried = corpus, corpus.tokenizer, carried

    @property
    def digest(self) -> str:
        return self.corpus.digest

    @property
    def text(self) -> Tensor:
        return self.corpus.train

    @property
    def validation_size(self) -> tuple[int, int]:
        return len(self.corpus.validation), self.corpus.validation_bytes

    def batches(self, settings: Settings) -> Epochs:
        c, (context, rows, seed) = self.corpus, (settings.context, settings.batch_size, settings.seed)
        carry = settings.carry_state
        if carry is None:
            carry = are_long(c.train_starts, len(c.train), context) and len(c.train) >= rows * context
        if carry:
            return Streams(c.train, c.train_starts, context, rows, c.tokenizer.eos_id, seed)
        return Windows(c.train, context, rows, seed)

    def evaluate(self, model: Any, autocast: AbstractContextManager) -> Score:
        c, starts = self.corpus, None if self.carried else self.corpus.validation_starts
        together = team()  # the processes of a sharded model run each block together, and so read the same
        return evaluate(
            model,
            c.validation,
            c.validation_bytes,
            c.tokenizer.eos_id,
            autocast=autocast,
            starts=starts,
            processes=None if together.sharded else together,
        )
