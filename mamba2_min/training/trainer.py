"""Training with early stopping. It can be stopped at any moment and resumes as if nothing had happened.

    batch ─► loss ─► gradients ─► clipped ─► AdamW          every step, in several micro-batches if asked
    every eval_every steps: the exact validation loss; the best model so far goes to model.pt
    every save_every steps: everything needed to resume goes to last.pt (resume.py)
    it ends after `patience` evaluations without a better one, max_steps or max_minutes

A run's folder: config.json, tokenizer.json, model.pt (the best on validation), last.pt (to resume), metrics.jsonl,
loss.png. On a CPU a run that is bounded by steps ends with the same weights, bit for bit, however often it was stopped,
killed and resumed: last.pt holds everything that the next step depends on, and what the other files have beyond that
is repaired or dropped.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamba2_min import devices, files
from mamba2_min.checkpoints import checkpoint
from mamba2_min.data.corpus import Corpus
from mamba2_min.data.epochs import Epochs
from mamba2_min.data.streams import LONG, Streams
from mamba2_min.errors import UserError
from mamba2_min.evaluation.perplexity import Score
from mamba2_min.models.base import LanguageModel, decay_groups
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.ops.loss import IGNORE
from mamba2_min.settings import LARGEST, Settings, learning_rate
from mamba2_min.training import distributed, memory, sharding
from mamba2_min.training.averaging import Average
from mamba2_min.training.carried import CarriedState
from mamba2_min.training.compile_check import compile_checked
from mamba2_min.training.distributed import Team
from mamba2_min.training.gradients import batch_gradients, own_rows
from mamba2_min.training.guards import LossGuard, deferred_signals
from mamba2_min.training.metrics import MetricsLog, NoLog, plot_run
from mamba2_min.training.muon import Muon, layer_matrices
from mamba2_min.training.noise import UnigramNoise
from mamba2_min.training.resume import capture, prepare_folder, repair_ended, restore, save_best
from mamba2_min.training.step_graph import GraphedGradients
from mamba2_min.training.task import Pretraining, Task

_SECONDS_BETWEEN_PLOTS = 30  # drawing takes most of a second, too much for every evaluation of a small model


@dataclass(frozen=True)
class Result:
    """How a training ended."""

    reason: str  # "max_steps", "max_minutes", "patience", "signal", "bad steps"
    step: int
    best_step: int
    best: Score | None  # None where no evaluation was finite
    signal: int = 0  # the signal that ended it, if one did


class Trainer:
    """Trains `model` on a corpus, or on another task, in the folder `out`. `resume` continues from its last.pt.

    Nothing is written before `train()`. With `accept_documents` a run resumes with other documents than it began with:
    from the start of the new ones, and with a new best. Of the settings only ACCEPTABLE may differ.

    `report(event, values)` is called after every step ("step"), evaluation ("evaluation"), skipped step ("skipped"),
    halved micro-batch ("memory") and attempt to compile ("compiled") or to record ("graph"): it is what a screen shows.
    `notes` holds lines that a user should read before the start. Raises UserError where the run cannot begin or resume.
    """

    def __init__(
        self,
        model: LanguageModel,
        corpus: Corpus | Task,
        settings: Settings,
        out: str | Path,
        device: torch.device | str = "cpu",
        resume: bool = False,
        report: Callable[[str, dict[str, Any]], None] = lambda event, values: None,
        accept_documents: bool = False,
    ):
        self.task = task = corpus if isinstance(corpus, Task) else Pretraining(corpus, settings.validate == "carried")
        self.corpus, self.out, self.report = corpus, Path(out), report
        self.device, self.team = torch.device(device), distributed.team()
        self.precision = devices.pick_precision(settings.precision, self.device)
        self.autocast = devices.autocast(self.device, self.precision)
        if settings.deterministic and self.device.type == "cuda":
            devices.make_deterministic()
        self.model = sharding.placed(task.files.unwrapped(model), self.device, self.team.sharded, settings)
        self.model.recompute = settings.recompute
        self.windows = _batches(task, settings, self.model)
        self.team.stretch(self.windows.context)  # raises now, and not in the first step
        self.asked, self.settings = settings, _resolved(settings, task, self.windows)
        self.micro_batch = min(settings.micro_batch or settings.batch_size, settings.batch_size)
        self.optimizer = _optimizer(self.model, settings, self.team.sharded)
        self.average = Average(self.model, settings.ema_decay)
        self.carried = CarriedState(self.model) if isinstance(self.windows, Streams) else None
        self.noise = _noise(task, settings.input_noise, self.device)
        self.guard = LossGuard(settings.spike)
        self.log = (MetricsLog if self.team.leads else NoLog)(self.out / checkpoint.METRICS)
        self.step, self.seconds = 0, 0.0  # seconds of training, over all sittings
        self.best: Score | None = None
        self.best_step, self.evaluated_step, self.stale = 0, -1, 0  # stale: evaluations since the best
        self.pending: list[float] = []  # training losses that are not in metrics.jsonl yet
        self.saved_records = 0  # lines of metrics.jsonl when last.pt was written
        self.notes = [self.windows.note] if self.windows.note else []
        if self.carried and settings.carry_state is None:
            self.notes.append(f"the state is carried on: most of the text is in documents longer than {LONG} windows")
        self._to_compile = settings.compile
        self.gradients = GraphedGradients(self)
        self._clock = self._drawn = 0.0  # when `seconds` was last counted, and when loss.png was drawn
        torch.manual_seed(settings.seed)
        self.resumed = resume and files.is_file(self.out / checkpoint.RESUME)
        if self.resumed:
            restore(self, accept_documents)

    def train(self) -> Result:
        """Trains to the end, leaves the best model in model.pt and in `self.model`, and returns how it ended.

        A run that has already ended is left as it is. Raises UserError where the disk is full or memory runs out; what
        was saved before is then still there.
        """
        if self.resumed and self.evaluated_step == self.step and (reason := self.ended()):
            repair_ended(self)
            return self._finish(reason)
        self.team.wait()  # until every process has read what the folder held
        prepare_folder(self)
        self._clock = self._drawn = time.perf_counter()
        precision = devices.matmul_precision(self.device, self.precision)
        with memory.explained(self), precision, deferred_signals() as signals:
            while not (reason := self._agreed_end(signals)):
                self._step()
                best = self.step % self.settings.eval_every == 0 and self._evaluate()
                if self.step % self.settings.save_every == 0 and not best:
                    self.save()
                self._count_time()
            if reason != "signal" and self.evaluated_step != self.step:
                self._evaluate()
            self.save()
            self._draw()
        return self._finish(reason, signals[0] if reason == "signal" else 0)

    def _step(self) -> None:
        """One step of the optimizer, unless the guard rejects its loss or gradient: then nothing changes."""
        s, began = self.settings, time.perf_counter()
        self.model.train()
        lr = learning_rate(self.progress, self.step, s)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = next(self.windows)
        input_ids, targets = batch[:2]
        if self._to_compile:
            self._to_compile = False
            _compile(self, batch)
        total = memory.backward(self, *batch)
        if self.carried:
            self.carried.commit(len(input_ids))
        total_norm = sharding.clip_gradients(self.model, s.clip or math.inf)
        self.windows.draw_ahead()  # while a GPU works on this batch
        loss, norm = torch.stack([total, total_norm.to(total.dtype)]).tolist()  # the only wait for a GPU in a step
        loss, norm = self.team.agree(loss, norm)[0]
        self.step += 1
        why = self.guard.judge(loss, norm, share=float((targets != IGNORE).float().mean()))
        if why:
            self.report("skipped", {"step": self.step, "loss": loss, "norm": norm, "why": why})
        else:
            self.optimizer.step()
            self.average.update(self.step - self.guard.skipped - 1)
            self.pending.append(loss)
        self.optimizer.zero_grad(set_to_none=True)
        if self.step % s.log_every == 0:
            mean = sum(self.pending) / len(self.pending) if self.pending else math.nan
            about = {"lr": lr, "norm": norm, "epoch": self.windows.epochs, "skipped": self.guard.skipped}
            self.log.append(step=self.step, split="train", loss=mean, **about)
            self.pending = []
        tokens, seconds = input_ids.numel(), time.perf_counter() - began
        self.report("step", {"step": self.step, "loss": loss, "lr": lr, "tokens": tokens, "seconds": seconds})

    def halve_micro_batch(self) -> None:
        self.micro_batch = -(-self.micro_batch // 2)
        self._to_compile = self.settings.compile  # for the new sizes, at the next step
        self.report("memory", {"step": self.step + 1, "micro_batch": self.micro_batch})

    def _evaluate(self) -> bool:
        """The exact validation loss, and whether it is the best so far: then the model goes to model.pt at once."""
        with self.average.in_place():
            score = self.task.evaluate(self.model, self.autocast)
        limit = self.best.loss - self.settings.min_delta if self.best else math.inf
        better = bool(self.team.agree(math.isfinite(score.loss) and score.loss < limit)[0][0])
        self.evaluated_step, self.stale = self.step, 0 if better else self.stale + 1
        self.log.append(step=self.step, split="validation", **score.measures(), best=better)
        if better:
            self.best, self.best_step = score, self.step
            self.save()  # before model.pt, which is then never ahead of last.pt
            save_best(self)
        if time.perf_counter() - self._drawn > _SECONDS_BETWEEN_PLOTS:
            self._draw()
        with self.average.in_place():  # for a screen that has the model write
            self.report("evaluation", {"step": self.step, "score": score, "best": better, "stale": self.stale})
        return better

    def ended(self) -> str:
        """Why the run is over (see `Result.reason`), or "" where it is not."""
        s = self.settings
        if self.guard.in_a_row >= s.max_bad_steps:
            return "bad steps"
        if s.patience and self.stale >= s.patience:
            return "patience"
        if self.step >= s.max_steps:
            return "max_steps"
        return "max_minutes" if s.max_minutes and self.seconds >= 60 * s.max_minutes else ""

    def _agreed_end(self, signals: list[int]) -> str:
        """Why the run is over, or "": by the leader's clock, and by a signal that reached any process."""
        every = self.team.agree(self.seconds, signals[0] if signals else 0)
        self.seconds = every[0][0]
        if not signals and (caught := max(signal for _, signal in every)):
            signals.append(int(caught))
        return self.ended() or ("signal" if signals else "")

    def save(self) -> None:
        """Writes last.pt: everything that the next step depends on. The lines of metrics.jsonl are on disk before."""
        self._count_time()
        if self.carried:
            self.carried.gather(self.team, own_rows(self))
        saved = capture(self) if self.team.leads or self.team.sharded else {}
        if self.team.leads:
            self.log.flush()
            checkpoint.save_tensors(self.out / checkpoint.RESUME, saved)

    def _finish(self, reason: str, signal: int = 0) -> Result:
        """Puts the best weights into the model, unless the run is to be resumed."""
        if reason != "signal":
            if self.best is not None and self.team.leads and not self.team.sharded:
                self.task.files.load(self.out, self.model)
            self.model.eval()
        return Result(reason, self.step, self.best_step, self.best, signal)

    @property
    def progress(self) -> float:
        """The share of the run that is done, in steps or minutes, whichever is further."""
        done = self.step / self.settings.max_steps
        return max(done, self.seconds / 60 / self.settings.max_minutes) if self.settings.max_minutes else done

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now

    def _draw(self) -> None:
        if self.team.leads:
            plot_run(self.out, self.seconds)
        self._drawn = time.perf_counter()


def _compile(trainer: Trainer, batch: tuple[Tensor, ...]) -> None:
    """Compiles the model, if that works with the first rows of a batch: enough for each size of part in a step."""
    rows = trainer.micro_batch + len(batch[0]) % trainer.micro_batch
    backward = partial(batch_gradients, trainer, Team(), *(t[:rows] for t in batch))
    why_not = compile_checked(trainer.model, backward, trainer.device)
    if any(failed for (failed,) in trainer.team.agree(bool(why_not))):
        trainer.model.compile_blocks(False)
        why_not = why_not or "another process could not"
    if trainer.carried:
        trainer.carried.forget()
    trainer.report("compiled", {"step": trainer.step + 1, "why_not": why_not})


def _optimizer(model: LanguageModel, s: Settings, sharded: bool) -> torch.optim.AdamW:
    groups = decay_groups(model, s.weight_decay)
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    options: dict[str, Any] = {"lr": s.lr, "betas": (s.beta1, s.beta2), "fused": fused}
    if s.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    if sharded:
        raise UserError("--optimizer muon needs whole matrices, and --shard divides them: leave one of them out")
    return Muon(groups, layer_matrices(model), **options)


def _batches(task: Task, settings: Settings, model: nn.Module) -> Epochs:
    """The task's batches. Only a state of constant size can be carried from one to the next."""
    if isinstance(model, Mamba2LM):
        return task.batches(settings)
    if settings.carry_state:
        raise UserError(f"carry-state needs a Mamba-2, not a {type(model).__name__}")
    return task.batches(dataclasses.replace(settings, carry_state=False))


def _noise(task: Task, p: float, device: torch.device) -> UnigramNoise:
    text = task.text if p else torch.zeros(0, dtype=torch.int32)  # a large text is not counted for nothing
    if text is None:
        raise UserError("input-noise is for training on documents, not for this task")
    return UnigramNoise(text, p, task.tokenizer.eos_id, device)


def _resolved(settings: Settings, task: Task, batches: Epochs) -> Settings:
    """The settings with what depends on the data filled in, and a warm-up that a short run has time for."""
    planned = round(settings.epochs * task.steps_per_epoch(batches, settings))
    max_steps = settings.max_steps or min(max(200, planned), LARGEST)
    return dataclasses.replace(settings, max_steps=max_steps, warmup_steps=min(settings.warmup_steps, max_steps // 5))
