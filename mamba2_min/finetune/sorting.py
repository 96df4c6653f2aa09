"""Sorting texts as a task for the trainer: batches of labelled texts, accuracy beside the loss, and a head on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamba2_min import files
from mamba2_min.checkpoints.safetensors import load_safetensors, save_safetensors
from mamba2_min.data.epochs import Epochs
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError, printable
from mamba2_min.evaluation.perplexity import Score
from mamba2_min.finetune.adapter import check_tensors, copy_tensors
from mamba2_min.finetune.classifier import Classifier
from mamba2_min.finetune.labels import HEAD, LABELS, LabelData, Sample
from mamba2_min.finetune.packing import Batch
from mamba2_min.finetune.spec import FinetuneSettings
from mamba2_min.finetune.spelling import Spelling
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.ops.loss import IGNORE
from mamba2_min.settings import Settings
from mamba2_min.training.task import ModelFiles, Task


@dataclass(frozen=True)
class SortingScore(Score):
    """As `Score`, with a text in the place of a token: accuracy, macro F1 and the confusion matrix (true, given)."""

    confusion: tuple[tuple[int, ...], ...] = ()

    @property
    def accuracy(self) -> float:
        return sum(row[k] for k, row in enumerate(self.confusion)) / max(self.tokens, 1)

    @property
    def f1(self) -> list[float]:
        """Of each label: the harmonic mean of precision and recall; 0 where it is neither there nor given."""
        given = [sum(column) for column in zip(*self.confusion, strict=True)]
        pairs = zip(self.confusion, given, strict=True)
        return [2 * row[k] / max(sum(row) + n, 1) for k, (row, n) in enumerate(pairs)]

    @property
    def macro_f1(self) -> float:
        """The mean of `f1` over the labels that occur."""
        there = [f1 for f1, row in zip(self.f1, self.confusion, strict=True) if sum(row)]
        return sum(there) / max(len(there), 1)

    def most_confused(self, names: Sequence[str], count: int = 3) -> list[str]:
        """The pairs of labels that are most often taken for each other, such as "card lost taken for card stolen 7"."""
        pairs = [
            (n, names[row], names[column])
            for row, counts in enumerate(self.confusion)
            for column, n in enumerate(counts)
            if n and row != column
        ]
        return [f"{true} taken for {given} {n}" for n, true, given in sorted(pairs, key=lambda p: -p[0])[:count]]

    def measures(self) -> dict[str, float]:
        return {"loss": self.loss, "accuracy": self.accuracy, "macro_f1": self.macro_f1}

    def __str__(self) -> str:
        return f"{self.loss:>7.4f}  accuracy {self.accuracy:>7.2%}  macro F1 {self.macro_f1:.4f}"


def pad(samples: Sequence[Sample]) -> Batch:
    """Texts of about one length in rows, padded on the right: input_ids, targets (a label at each text's last token,
    IGNORE elsewhere) and seq_idx (0 in a text, -1 in padding), each (b, l)."""
    longest = max(len(sample) for sample in samples)
    input_ids = torch.zeros(len(samples), longest, dtype=torch.long)
    targets, seq_idx = torch.full_like(input_ids, IGNORE), torch.full_like(input_ids, -1)
    for row, sample in enumerate(samples):
        input_ids[row, : len(sample)] = sample.ids
        targets[row, len(sample) - 1] = sample.label
        seq_idx[row, : len(sample)] = 0
    return input_ids, targets, seq_idx


class TextBatches(Epochs):
    """An endless iterator of training batches over labelled texts, each epoch in a new order, texts of about the same
    length together."""

    _batches: list[list[int]]
    _SORTED = 16  # batches whose texts are sorted by length among themselves

    def __init__(self, samples: Sequence[Sample], batch_size: int, seed: int):
        if not samples:
            raise UserError("nothing to learn from: the training part has no text")
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.context = max(len(sample) for sample in samples)
        self.targets_per_epoch = len(samples)
        self.sizes = {"batch_size": batch_size, "samples": len(samples)}
        self._begin(0)

    @property
    def length(self) -> int:
        return len(self._batches)

    def _draw(self) -> Batch:
        if self.position == len(self._batches):
            self._begin(self.epoch + 1)
        chosen = self._batches[self.position]
        self.position += 1
        return pad([self.samples[i] for i in chosen])

    def _shuffle(self, generator: torch.Generator) -> None:
        order = torch.randperm(len(self.samples), generator=generator).tolist()
        size, batches = self.batch_size, []
        for start in range(0, len(order), size * self._SORTED):
            part = sorted(order[start : start + size * self._SORTED], key=lambda i: len(self.samples[i]))
            batches += [part[k : k + size] for k in range(0, len(part), size)]
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        self._batches = [batches[i] for i in shuffled]


_OWN = ("head.", "spelling.")  # what a classifier has beside its language model


@dataclass
class ClassifierFiles(ModelFiles):
    """What `inner` keeps of the language model, and beside it the head, the spelling and the labels' names."""

    inner: ModelFiles
    names: list[str]
    pool: str
    spelling: int = 0

    @property
    def about(self) -> dict[str, Any]:
        """What labels.json says."""
        return {"labels": self.names, "pool": self.pool, "spelling": self.spelling}

    @property
    def best(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.inner.best, HEAD, LABELS)

    def unwrapped(self, model: Any) -> Any:
        model.model = self.inner.unwrapped(model.model)
        return model

    def check(self, tensors: dict[Any, Any], model: Any) -> None:
        head = {name: t for name, t in tensors.items() if isinstance(name, str) and name.startswith(_OWN)}
        self.inner.check({name: t for name, t in tensors.items() if name not in head}, model.model)
        check_tensors(head, self._head(model))

    def prepare(self, out: Path, model: Any) -> None:
        self.inner.prepare(out, model.model)

    def trained(self, model: Any) -> dict[str, Tensor]:
        return {**self.inner.trained(model.model), **self._head(model)}

    def restore(self, model: Any, tensors: dict[str, Tensor], source: Path) -> None:
        head = {name: tensor for name, tensor in tensors.items() if name.startswith(_OWN)}
        self.inner.restore(model.model, {n: t for n, t in tensors.items() if n not in head}, source)
        try:
            copy_tensors(head, self._head(model))
        except ValueError as error:
            raise UserError(f"{source}: {error}") from error

    def save(self, out: Path, model: Any) -> None:
        self.inner.save(out, model.model)
        save_safetensors(out / HEAD, self._head(model))
        files.save_json(out / LABELS, self.about)

    def load(self, out: Path, model: Any) -> None:
        self.inner.load(out, model.model)
        self.load_head(out, model)

    def load_head(self, out: Path, model: Any) -> None:
        """Puts the head that is on disk on the model. Raises UserError where it is of another shape."""
        try:
            copy_tensors(load_safetensors(out / HEAD)[0], self._head(model))
        except ValueError as error:
            raise UserError(f"{out / HEAD}: {error}") from error

    def is_saved(self, out: Path, model: Any) -> bool:
        try:
            there = load_safetensors(out / HEAD)[0]
            labels = files.load_json(out / LABELS)
        except UserError:
            return False
        here = self._head(model)
        same = there.keys() == here.keys() and all(torch.equal(there[name], here[name].cpu()) for name in here)
        return same and labels == self.about and self.inner.is_saved(out, model.model)

    @staticmethod
    def _head(model: Classifier) -> dict[str, Tensor]:
        state = model.state_dict()
        return {name: tensor.detach() for name, tensor in state.items() if name.startswith(_OWN)}


class Sorting(Task):
    """The label of each text."""

    def __init__(self, data: LabelData, tokenizer: WordTokenizer, kept: ClassifierFiles):
        self.data, self.tokenizer, self.files = data, tokenizer, kept

    @property
    def digest(self) -> str:
        content = hashlib.sha256(self.tokenizer.digest().encode() + repr(self.data.names).encode())
        for part in (self.data.train, self.data.validation):
            content.update(len(part).to_bytes(8, "little"))
            for sample in part:
                content.update(sample.ids.numpy().astype("<i8").tobytes() + sample.label.to_bytes(8, "little"))
        return content.hexdigest()

    @property
    def validation_size(self) -> tuple[int, int]:
        return len(self.data.validation), len(self.data.validation)

    def restored_score(self, values: dict[str, Any]) -> SortingScore:
        counted = {name: value for name, value in values.items() if name != "confusion"}
        plain, labels = super().restored_score(counted), len(self.data.names)
        rows = values.get("confusion")
        square = (
            isinstance(rows, (list, tuple))
            and [len(r) for r in rows if isinstance(r, (list, tuple))] == [labels] * labels
        )
        if not isinstance(rows, (list, tuple)) or not square or len(rows) != labels:
            raise ValueError("its best score has no confusion matrix of these labels")
        if not all(type(n) is int and n >= 0 for row in rows for n in row) or sum(map(sum, rows)) != plain.tokens:
            raise ValueError("its best score has a confusion matrix of other texts")
        return SortingScore(plain.nats, plain.tokens, plain.n_bytes, tuple(map(tuple, rows)))

    def batches(self, settings: Settings) -> TextBatches:
        return TextBatches(self.data.train, settings.batch_size, settings.seed)

    def steps_per_epoch(self, batches: Any, settings: Settings) -> float:
        return batches.length

    def evaluate(self, model: Classifier, autocast: AbstractContextManager) -> SortingScore:
        """Loss, accuracy, macro F1 and the confusion matrix on the validation texts."""
        return score(model, self.data.validation, len(self.data.names), autocast)

    def example_of(self, model: Classifier) -> Callable[[int], str]:
        """A function for the screen: one of the validation texts, its label and what the model gives."""

        def sample(step: int) -> str:
            chosen = self.data.validation[step % len(self.data.validation)]
            with torch.no_grad():
                training = model.training
                model.eval()
                device = next(model.parameters()).device
                given = int(model(chosen.ids[None].to(device)).argmax())
                model.train(training)
            text = " ".join(self.tokenizer.decode(chosen.ids[1:].tolist()).split())
            names = self.data.names
            mark = "right" if given == chosen.label else f"it is {names[chosen.label]}"
            return printable(f"{text[:100]} -> {names[given]} ({mark})")

        return sample


@torch.no_grad()
def score(
    model: Classifier, samples: Sequence[Sample], labels: int, autocast: AbstractContextManager, batch: int = 32
) -> SortingScore:
    """The score of a classifier on texts. The modes of its modules are put back as they were."""
    device, modes = next(model.parameters()).device, [(m, m.training) for m in model.modules()]
    model.eval()
    nats, confusion = 0.0, torch.zeros(labels, labels, dtype=torch.long)
    try:
        order = sorted(range(len(samples)), key=lambda i: len(samples[i]))
        for start in range(0, len(order), batch):
            part = [samples[i] for i in order[start : start + batch]]
            input_ids, _, seq_idx = (t.to(device) for t in pad(part))
            truth = torch.tensor([sample.label for sample in part])
            with autocast:
                scores = model(input_ids, seq_idx >= 0).float().cpu()
            nats += float(nn.functional.cross_entropy(scores, truth, reduction="sum"))
            confusion.index_put_((truth, scores.argmax(1)), torch.ones(len(part), dtype=torch.long), accumulate=True)
    finally:
        for module, mode in modes:
            module.training = mode
    return SortingScore(nats, len(samples), len(samples), tuple(map(tuple, confusion.tolist())))


def make_classifier(
    model: Mamba2LM, data: LabelData, f: FinetuneSettings, seed: int, tokenizer: WordTokenizer
) -> Classifier:
    """A classifier on `model` as the settings ask. With class weights, each label weighs the same in all."""
    weights = None
    if f.class_weights:
        counts = torch.bincount(torch.tensor([sample.label for sample in data.train]), minlength=len(data.names))
        weights = (len(data.train) / (len(data.names) * counts.double())).tolist()
    return Classifier(
        model,
        len(data.names),
        f.pool,
        weights,
        f.label_smoothing,
        f.head_dropout,
        seed,
        f.word_dropout,
        f.consistency,
        Spelling(tokenizer, model.config.d_model, f.spelling, seed) if f.spelling else None,
    )
