"""A fine-tuning from its spec: the base, the data, what of the model is trained, and the trainer's run."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mamba2_min import devices
from mamba2_min.checkpoints import checkpoint
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError, printable
from mamba2_min.finetune import adapter, labels
from mamba2_min.finetune.chat import ChatData, load_chat
from mamba2_min.finetune.conversations import TEMPLATES, Example, prompt_ids
from mamba2_min.finetune.initial_state import TunedStateLM
from mamba2_min.finetune.lora import LoRAConfig, add_lora, trainable
from mamba2_min.finetune.sorting import ClassifierFiles, Sorting, SortingScore, make_classifier
from mamba2_min.finetune.spec import FinetuneSettings, FinetuneSpec
from mamba2_min.finetune.tasks import AdapterFiles, Answers
from mamba2_min.finetune.token_rows import train_rows
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.training import distributed, screen
from mamba2_min.training.memory import shared_out, training_memory
from mamba2_min.training.muon import layer_matrices
from mamba2_min.training.task import ModelFiles, Task
from mamba2_min.training.trainer import Result, Trainer

FILES = (*checkpoint.RUN_FILES, adapter.CONFIG, adapter.WEIGHTS, labels.LABELS, labels.HEAD, labels.CONFUSION)


@dataclass
class Prepared:
    """A model with what of it is trained, its task, and what settings.json says of it besides the settings."""

    model: Any
    task: Task
    about: dict[str, Any]
    sample: Callable[[int], str]
    next_command: tuple[str, str]  # what for, and the line
    notes: list[str]
    largest: tuple[int, int]  # rows and tokens per row of the largest batch
    longest: str  # where the longest text comes from


def finetune(spec: FinetuneSpec, out: str | Path, device: torch.device, again: str, quiet: bool = False) -> Result:
    """Trains as the spec says, in the folder `out`. `again` is the command that resumes. Raises UserError."""
    team = distributed.team()
    spec = dataclasses.replace(spec, training=shared_out(spec.training, team.size))
    ready = prepare(spec, Path(out))
    view = screen.Screen(ready.sample)
    report = (lambda event, values: None) if quiet else view.report
    check_memory(ready, spec, device)
    trainer = Trainer(ready.model, ready.task, spec.training, out, device, spec.resume, report)
    team.wait()  # until every process has read what the folder held
    if team.leads:
        spec.save(out, **ready.about)
    if quiet:
        result = trainer.train()
        _draw_confusion(result, ready.task, Path(out))
        return result
    f, s = spec.finetune, trainer.settings
    trained, everything = trainable(ready.model)
    screen.show("base", f"{f.model}: {everything:,} parameters, of which {trained:,} are trained ({f.method})")
    for note in (*ready.notes, *trainer.notes):
        screen.show("note", note)
    screen.show(
        "training",
        f"context {s.context}, batch {s.batch_size}, at most {s.max_steps:,} steps, learning rate {s.lr:g} to "
        f"{s.min_lr:g}, patience {s.patience}, seed {s.seed}; {device}, {trainer.precision}",
    )
    if spec.resume:
        screen.show("resume", f"from step {trainer.step:,}" if trainer.resumed else "nothing saved yet: from the start")
    if not trainer.resumed:
        before = ready.task.evaluate(trainer.model, trainer.autocast)
        screen.show("before", f"loss {before.loss:.4f} on the validation part")
    with view.watching(trainer):
        result = trainer.train()
    _draw_confusion(result, ready.task, Path(out))
    if isinstance(result.best, SortingScore) and isinstance(ready.task, Sorting):
        confused = "; ".join(result.best.most_confused(ready.task.data.names)) or "nothing"
        screen.show("confused", f"{confused} ({Path(out) / labels.CONFUSION} shows all)")
    screen.show_result(result, trainer, again, ready.next_command)
    return result


_OFF = {"embedding_dropout": 0.0, "variational_dropout": 0.0}


def check_memory(ready: Prepared, spec: FinetuneSpec, device: torch.device) -> None:
    """Raises UserError where a step with the longest text needs more memory than is free: nothing is ever cut."""
    s, free = spec.training, devices.free_memory(device)
    rows, length = ready.largest
    micro = min(s.micro_batch or rows, rows)
    precision = devices.pick_precision(s.precision, device)
    optimizer = s.optimizer if layer_matrices(ready.model) else "adamw"
    needed = training_memory(ready.model.config, micro, length, device, s.recompute, precision, optimizer=optimizer)
    # What is frozen has no gradient and no moments.
    needed -= 12 * sum(p.numel() for p in ready.model.parameters() if not p.requires_grad)
    if free is not None and needed > free:
        raise UserError(
            f"training needs about {devices.size(needed)}, and {devices.size(free)} is free: the longest text, "
            f"{ready.longest}, takes {length:,} tokens; leave it out, lower --batch-size (now {s.batch_size}), or pass "
            "--micro-batch 1 or --recompute"
        )


def _draw_confusion(result: Result, task: Task, out: Path) -> None:
    """Draws the confusion matrix of the best score of a sorting, in the run's folder."""
    if not isinstance(result.best, SortingScore) or not isinstance(task, Sorting) or not distributed.team().leads:
        return
    from mamba2_min.plots import plot_confusion  # matplotlib takes a second to import

    title = " ".join(str(result.best).split())
    plot_confusion(result.best.confusion, task.data.names, out / labels.CONFUSION, title)


def prepare(spec: FinetuneSpec, out: Path) -> Prepared:
    """Reads the base and the data, and freezes what is not trained. Raises UserError."""
    f = spec.finetune
    model = Mamba2LM.from_pretrained(f.model)
    # Dropout of channels and words is for a corpus that is read dozens of times. Of the model's own config nothing
    # changes: the base is known by it (adapter.base_digest).
    model.backbone.config = dataclasses.replace(model.config, **_OFF)
    tokenizer = checkpoint.load_tokenizer(f.model, model.config.vocab_size)
    with _user_errors():
        if f.task == "classify":
            return _sorting(f, spec, model, tokenizer, out)
        data = load_chat(f.data, tokenizer, f.val_data, f.val_fraction, f.encoding)
        model, kept = _method(f, spec.training.seed, model, tokenizer, data.train)
    task = Answers(data.train, data.validation, tokenizer, kept, alone=f.method == "state")
    return Prepared(
        model=model,
        task=task,
        about={"chat": {"template": data.template}},
        sample=_answer_to_a_request(model, data, tokenizer),
        next_command=_chat_command(f, out),
        notes=[
            f"{len(data.train):,} conversations to train on, {len(data.validation):,} to validate with; template "
            f"{data.template}",
            *data.notes,
        ],
        largest=_largest([len(e) for e in data.train], spec),
        longest=_where_longest(data),
    )


def _largest(lengths: list[int], spec: FinetuneSpec) -> tuple[int, int]:
    """Rows and tokens per row of the batch of packed conversations that needs the most memory."""
    context, rows = spec.training.context, spec.training.batch_size
    room = context
    while room < max(lengths):
        room *= 2
    return max(1, rows * context // room), room


def _where_longest(data: ChatData) -> str:
    longest = max(range(len(data.train)), key=lambda i: len(data.train[i]))
    return f"{data.train_talks[longest].where} ({len(data.train[longest]):,} tokens)"


def _method(
    f: FinetuneSettings, seed: int, model: Mamba2LM, tokenizer: WordTokenizer, texts: Sequence[Example | labels.Sample]
) -> tuple[Mamba2LM, ModelFiles]:
    if f.method == "full":
        return model, ModelFiles()
    digest = adapter.base_digest(model)
    if f.method == "state":
        return TunedStateLM.of(model), AdapterFiles(f.model, None, digest)
    config = lora_config(f)
    add_lora(model, config, seed)
    if f.lora_tokens != "none":
        spelling = 257 if tokenizer.unk_id is None else 2  # the end token and the bytes, or it and the unknown word
        train_rows(model, range(spelling) if f.lora_tokens == "bytes" else {i for t in texts for i in t.ids.tolist()})
    return model, AdapterFiles(f.model, config, digest)


def lora_config(f: FinetuneSettings) -> LoRAConfig:
    targets = tuple(name.strip() for name in f.lora_targets.split(",") if name.strip())
    return LoRAConfig(f.lora_r, f.lora_alpha, f.lora_dropout, targets)


def _sorting(f: FinetuneSettings, spec: FinetuneSpec, model: Mamba2LM, tokenizer: WordTokenizer, out: Path) -> Prepared:
    scratch = f.method == "scratch"
    data = labels.load_texts(
        f.data, tokenizer, f.val_data, f.val_fraction, f.text_column, f.label_column, f.encoding, own_words=scratch
    )
    if scratch:
        tokenizer = data.own_words or tokenizer
        config = dataclasses.replace(model.config, vocab_size=len(tokenizer), **_OFF)
        model, kept = Mamba2LM(config, seed=spec.training.seed), ModelFiles()
    else:
        model, kept = _method(f, spec.training.seed, model, tokenizer, data.train)
    classifier = make_classifier(model, data, f, spec.training.seed, tokenizer)
    task = Sorting(data, tokenizer, ClassifierFiles(kept, data.names, f.pool, f.spelling))
    longest = max(len(sample) for sample in data.train)
    return Prepared(
        model=classifier,
        task=task,
        about={"classify": {"labels": data.names, "pool": f.pool}},
        sample=task.example_of(classifier),
        next_command=("sort texts with", f"python -m mamba2_min.classify --model {shlex.quote(str(out))}"),
        notes=[
            f"{len(data.train):,} texts to train on, {len(data.validation):,} to validate with, "
            f"{len(data.names)} labels",
            *data.notes,
        ],
        largest=(spec.training.batch_size * (2 if f.consistency else 1), longest),
        longest=f"one of {f.data}",
    )


def _answer_to_a_request(model: Mamba2LM, data: ChatData, tokenizer: WordTokenizer) -> Callable[[int], str]:
    """A function for the screen: what the model answers to one of the validation requests."""
    template, eos = TEMPLATES[data.template], tokenizer.eos_id
    talk = data.validation_talks[0]
    user = next(m.content for m in talk.messages if m.role == "user")
    ids = [eos, *prompt_ids(tokenizer, template, user)]

    def sample(seed: int) -> str:
        written = list(model.generate(ids, 48, temperature=0, stop_ids=[eos]))
        short = user if len(user) <= 60 else user[:57] + "..."
        return printable(" ".join(f"{short} -> {tokenizer.decode(written)}".split()))

    return sample


def _chat_command(f: FinetuneSettings, out: Path) -> tuple[str, str]:
    folder = shlex.quote(str(out))
    where = f"--model {folder}" if f.method == "full" else f"--model {shlex.quote(f.model)} --adapter {folder}"
    return "talk to it with", f"python run.py {where} --chat"


class _user_errors:
    """A context in which a ValueError, such as that of a bad LoRA target, becomes a UserError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError):
            raise UserError(str(error)) from error
