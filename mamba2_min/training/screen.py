"""What a training shows: a summary before it, lines and a progress bar during it, and how it ended."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from mamba2_min import console
from mamba2_min.config import Mamba2Config
from mamba2_min.data.corpus import Corpus
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import printable
from mamba2_min.evaluation.perplexity import Score
from mamba2_min.inference.completer import Completer
from mamba2_min.inference.terminal import DIM, styled, wrapped
from mamba2_min.inference.writing import FEW_WORDS, WRITING
from mamba2_min.models.evaluating import evaluating
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.ops.sampling import Sampler
from mamba2_min.settings import DataSettings, Settings
from mamba2_min.training.guards import JUMPED, NOT_FINITE
from mamba2_min.training.metrics import clock
from mamba2_min.training.trainer import Result, Trainer

_SECONDS_BETWEEN_LINES = 30
_SAMPLE_TOKENS = 48
_MARGIN = " " * 13 + "| "  # of a sample
_SENTENCES = re.compile(r"""(?s).*[.!?][”"’')]*(?=\s)""")  # as many as are whole
_MANY_BYTES = 0.2  # of a text outside the vocabulary


class Screen:
    """A line and a sample of text at each evaluation, and a bar between them; in a file or pipe a line every 30 s.

    `sample(step)`, if given, returns text that the model writes. Give `report` to the trainer, and train within
    `watching`.
    """

    def __init__(self, sample: Callable[[int], str] | None = None):
        self.sample = sample
        self.validation = ""
        self.printed = time.perf_counter()

    def watching(self, trainer: Trainer) -> tqdm:
        """The context of a training: a progress bar on standard error, if that is a terminal."""
        self.trainer = trainer
        self.bar = tqdm(
            total=trainer.settings.max_steps,
            initial=trainer.step,
            dynamic_ncols=True,
            mininterval=0.5,
            leave=False,  # the lines after it say how the training ended; the bar's last figures are older
            bar_format="{n:>6,}/{total:,} |{bar}| {desc}",
            disable=sys.stderr is None or not sys.stderr.isatty(),
        )
        return self.bar

    def report(self, event: str, values: dict[str, Any]) -> None:
        """Shows what the trainer reports."""
        if event == "step":
            self._progress(values)
            return
        step = f"step {values['step']:>6,}  "
        if event == "skipped":
            norm = "" if values["why"] == JUMPED else f", gradient norm {values['norm']:.4g}"
            self._write(f"{step}skipped: loss {values['loss']:.4g}{norm or ' jumped'}")
        elif event == "compiled":
            why = values["why_not"]
            self._write(step + (f"not compiled: {printable(why)}" if why else "compiled"))
        elif event == "graph":
            why = values["why_not"]
            self._write(step + (f"no CUDA graph: {printable(why)}" if why else "one CUDA graph per step"))
        elif event == "memory":
            self._write(f"{step}out of memory: now {values['micro_batch']} windows at a time, the same batch")
        elif event == "evaluation":
            score = values["score"]
            self.validation = f", val {score.loss:.3f}"
            self._write(f"{step}validation {score}" + ("  *" if values["best"] else ""))
            if self.sample and values["best"]:  # what a worse model writes would only mislead
                sample = wrapped(self.sample(values["step"]), _MARGIN, _MARGIN)
                self._write("\n".join(styled(line, DIM) for line in sample.split("\n")))

    def _progress(self, values: dict[str, Any]) -> None:
        trainer, now = self.trainer, time.perf_counter()
        loss, speed, left = values["loss"], values["tokens"] / values["seconds"], _time_left(trainer)
        if not self.bar.disable:
            if trainer.progress:  # if a time limit ends the run, the number of steps depends on the speed
                self.bar.total = max(trainer.step, round(trainer.step / trainer.progress))
            text = f"loss {loss:.3f}{self.validation}, {speed:,.0f} tokens/s, {left} left"
            self.bar.set_description_str(text, refresh=False)
            self.bar.update(trainer.step - self.bar.n)
        elif now - self.printed > _SECONDS_BETWEEN_LINES:
            self.printed = now
            self._write(f"step {trainer.step:>6,}  training   {loss:>7.4f}  {speed:>9,.0f} tokens/s  {left:>8} left")

    def _write(self, line: str) -> None:
        with tqdm.external_write_mode(file=sys.stdout):  # hides the bar meanwhile
            console.print(line)


def sample_of(model: Mamba2LM, tokenizer: WordTokenizer) -> Callable[[int], str]:
    """A function for `Screen`: it returns the start of a document that the model writes, on one line.

    It writes as the completer does, in its likelier words and to the end of a sentence, where one ends in time.
    """

    def sample(step: int) -> str:
        with evaluating(model):
            completer = Completer(model, tokenizer, known_words=len(tokenizer.words) >= FEW_WORDS)
            text = "".join(completer.complete("", _SAMPLE_TOKENS, Sampler(0.6, seed=0, **WRITING)))
        if completer.stopped_by != "end":
            sentences = _SENTENCES.match(text)
            text = sentences[0] if sentences else text + "…"
        return printable(" ".join(text.split()))

    return sample


def show(label: str, text: str) -> None:
    """Prints one line of a summary, wrapped in a narrow terminal, with control characters escaped."""
    console.print(wrapped(printable(text), f"{label:<12}", " " * 12))


def show_command(label: str, purpose: str, command: str) -> None:
    """Prints what to do next; a command that does not fit beside the rest has a line of its own, to be copied whole."""
    text, command = printable(f"{purpose}:"), printable(command)
    line = wrapped(f"{text} {command}", f"{label:<12}", " " * 12)
    console.print(f"{wrapped(text, f'{label:<12}', ' ' * 12)}\n{command}" if "\n" in line else line)


def show_corpus(data: DataSettings, corpus: Corpus) -> None:
    """Prints what was read and how large it is."""
    show(
        "documents",
        f"{corpus.documents:,} in {data.data}: {corpus.train_documents:,} to train on, "
        f"{corpus.validation_documents:,} to validate with; {corpus.words:,} words",
    )
    show(
        "tokens",
        f"{len(corpus.train):,} + {len(corpus.validation):,}, vocabulary {len(corpus.tokenizer):,} "
        f"(pattern {data.pattern}, min-count {data.min_count}); {corpus.coverage}",
    )
    for note in corpus.notes:
        show("note", note)


def show_training(trainer: Trainer, needed: str, free: str) -> None:
    """Prints the model, the resolved settings and the device. `needed`, `free`: what `check_memory` returns."""
    s, c = trainer.settings, trainer.model.config
    show(
        "model",
        f"{c.num_parameters():,} parameters: d-model {c.d_model}, {c.n_layer} layers, {c.nheads} heads of {c.headdim}, "
        f"d-state {c.d_state}, A {c.a_init}",
    )
    limit = f" or {s.max_minutes:g} minutes" if s.max_minutes else ""
    parts = f" in parts of {trainer.micro_batch}" if trainer.micro_batch < s.batch_size else ""
    show(
        "training",
        f"context {trainer.windows.context}, batch {s.batch_size}{parts}, at most {s.max_steps:,} steps{limit}, "
        f"learning rate {s.lr:g} to {s.min_lr:g}, patience {s.patience}, seed {s.seed}",
    )
    show(
        "recipe",
        f"{s.recipe}: {s.optimizer}, warm-up {s.warmup_steps:,} steps, decay {s.weight_decay:g}, betas ({s.beta1:g}, "
        f"{s.beta2:g}), clip {s.clip:g}, {_regularisation(s, c)}",
    )
    for note in trainer.notes:
        show("note", note)
    memory = f"needs about {needed}" + (f" of {free} free" if free else "")
    show("device", f"{trainer.device}, {trainer.precision}; {memory}")


def _regularisation(s: Settings, c: Mamba2Config) -> str:
    """The dropout of blocks, and what else of this kind is on."""
    more = [
        (c.variational_dropout, f"{c.variational_dropout:g} of channels"),
        (c.embedding_dropout, f"{c.embedding_dropout:g} of words"),
        (s.input_noise, f"input noise {s.input_noise:g}"),
        (s.ema_decay, f"average of weights {s.ema_decay:g}"),
    ]
    return ", ".join([f"dropout {c.dropout:g}", *(text for value, text in more if value)])


def show_start(trainer: Trainer, folder: str, corpus: Corpus) -> None:
    """Prints what a run begins from, how good that is on the new documents, and how much its vocabulary lacks."""
    before = trainer.task.evaluate(trainer.model, trainer.autocast)
    show("begins as", f"{folder}, on the validation part: {_in_words(before)}")
    if corpus.outside > _MANY_BYTES:
        show(
            "note",
            f"{corpus.outside:.0%} of the bytes are outside the vocabulary of {folder}, which spells them letter by "
            "letter; a new model with a vocabulary of its own, without --init-from, may do better",
        )


def show_result(
    result: Result, trainer: Trainer, resume_command: str, next_command: tuple[str, str] | None = None
) -> None:
    """Prints how the training ended, and what to do next: `next_command` (what for, the line) or text."""
    guard = trainer.guard
    reason = _REASONS[result.reason].format(**vars(trainer.settings), first=result.step - guard.in_a_row + 1)
    show("ended", f"at step {result.step:,}: {reason}{_FAULTS[guard.reason] if result.reason == 'bad steps' else ''}")
    if guard.skipped:
        show("skipped", f"{guard.skipped:,} of {result.step:,} steps")
    if result.signal:
        show_command("saved", "go on with", resume_command)
    elif result.best is None:
        show("saved", "no model: no validation had a finite loss; train again with a lower --lr")
    else:
        complete = "complete text with", f"python run.py --model {shlex.quote(str(trainer.out))}"
        purpose, command = next_command or complete
        show("best", f"step {result.best_step:,}: {_in_words(result.best)}")
        show_command("saved", f"{trainer.out}; {purpose}", command)


_REASONS = {
    "patience": "no better validation for {patience} evaluations",
    "max_steps": "all {max_steps:,} steps done",
    "max_minutes": "{max_minutes:g} minutes are over",
    "signal": "stopped",
    "bad steps": "every step since {first:,} was skipped: ",
}
_FAULTS = {
    NOT_FINITE: "the loss or its gradient was not finite",
    JUMPED: "the loss jumped and did not come back",
    "": "",
}


def _in_words(score: Score) -> str:
    """A score of the lines in columns, in a sentence: loss 3.2798, perplexity 26.6, bits per byte 2.3351."""
    return "loss " + ", ".join(" ".join(part.split()) for part in re.split("  (?=[a-z])", str(score)))


def _time_left(trainer: Trainer) -> str:
    """Until the steps or the minutes are over, at the speed so far; "?" before the first step."""
    done = trainer.progress
    return clock(trainer.seconds / done * (1 - min(done, 1))) if trainer.seconds and done else "?"
