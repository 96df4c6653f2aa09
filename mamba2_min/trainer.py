"""Training, in memory, with early stopping: it can be stopped at any moment and goes on as if it never had been.

    batch ─► loss ─► gradients ─► clipped ─► AdamW          once a step, on several micro-batches if asked
    every eval_every steps: the exact validation loss; the best model so far goes to model.pt
    every save_every steps: everything needed to go on goes to last.pt
    patience evaluations without a better one, max_steps or max_minutes: the end

A run's folder: config.json, tokenizer.json, model.pt (the best on validation), last.pt (to go on),
metrics.jsonl, loss.png. On a CPU a run bounded by steps ends with the same weights, bit for bit, however often it was
stopped and resumed.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamba2_min import checkpoint, devices
from mamba2_min.corpus import Corpus, Windows
from mamba2_min.errors import UserError
from mamba2_min.evaluation.perplexity import Score, evaluate
from mamba2_min.metrics import MetricsLog, read_metrics


@dataclass(frozen=True)
class Settings:
    """How to train. Impossible values raise ValueError."""

    context: int = 256  # tokens a window; what is remembered from before a window is not trained
    batch_size: int = 8  # windows a step
    micro_batch: int = 0  # windows at a time; their gradients add up to those of the whole batch; 0: all at once
    max_steps: int = 0  # 0: as many as make 20 passes over the training part, at least 200
    max_minutes: float = 0.0  # 0: no limit. The learning rate then also falls with the clock
    eval_every: int = 100  # steps
    save_every: int = 100  # steps; also at every evaluation that is the best, at the end and on a signal
    patience: int = 5  # evaluations without a better one, then it stops; 0: never
    min_delta: float = 0.0  # nats by which the loss must fall to count as better
    lr: float = 3e-3  # the peak
    min_lr: float = 1e-5
    warmup_steps: int = 50
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0  # largest norm of the gradient; 0: none
    seed: int = 0
    precision: str = "auto"
    log_every: int = 10  # steps a training line of metrics.jsonl is the mean of
    max_bad_steps: int = 10  # steps in a row whose loss or gradient is not finite, then it stops

    def __post_init__(self) -> None:
        for name, least in (
            ("context", 1), ("batch_size", 1), ("micro_batch", 0), ("max_steps", 0), ("eval_every", 1),
            ("save_every", 1), ("patience", 0), ("warmup_steps", 0), ("seed", 0), ("log_every", 1),
            ("max_bad_steps", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
        for name in ("max_minutes", "min_delta", "lr", "min_lr", "weight_decay", "clip"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, not {value!r}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)!r}")
        if self.lr <= 0:
            raise ValueError("lr must be above 0")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr must not exceed lr, and {self.min_lr} is above {self.lr}")


@dataclass(frozen=True)
class Result:
    """How a training ended."""

    reason: str  # "max_steps", "max_minutes", "patience", "signal", "not finite"
    step: int
    best_step: int
    best: Score
    signal: int = 0  # the signal that ended it, if one did


def learning_rate(progress: float, step: int, settings: Settings) -> float:
    """Linear warm-up over warmup_steps, then a cosine from lr to min_lr as `progress` goes from 0 to 1."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    return settings.min_lr + (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * min(progress, 1))) / 2


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's two groups of parameters: matrices are decayed; vectors (A_log, D, dt_bias, norms, biases) and the
    convolution's taps, which are a vector a channel, never are."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() == 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0},
    ]


def _resolved(settings: Settings, windows: Windows) -> Settings:
    """The settings with what depends on the data filled in, and a warm-up that a short run has time for."""
    max_steps = settings.max_steps
    if not max_steps:
        max_steps = max(200, round(20 * windows.targets_per_epoch / (windows.context * settings.batch_size)))
    return dataclasses.replace(settings, max_steps=max_steps, warmup_steps=min(settings.warmup_steps, max_steps // 5))


class Trainer:
    """Trains `model` on `corpus` in the folder `out`. `resume` goes on from its last.pt, where there is one.

    `report(event, values)` is called after every step ("step"), evaluation ("evaluation"), skipped step ("skipped"):
    what a screen shows. Raises UserError where the run cannot begin or go on.
    """

    def __init__(
        self,
        model: nn.Module,
        corpus: Corpus,
        settings: Settings,
        out: str | Path,
        device: torch.device | str = "cpu",
        resume: bool = False,
        report: Callable[[str, dict[str, Any]], None] = lambda event, values: None,
    ):
        self.out = Path(out)
        self.device = torch.device(device)
        self.precision = devices.pick_precision(settings.precision, self.device)
        self.model = model.to(self.device)
        self.corpus, self.report = corpus, report
        self.windows = Windows(corpus.train, settings.context, settings.batch_size, settings.seed)
        self.settings = settings = _resolved(settings, self.windows)
        self.optimizer = torch.optim.AdamW(
            decay_groups(self.model, settings.weight_decay),
            lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=self.device.type in ("cpu", "cuda"),
        )  # fmt: skip
        self.step = 0
        self.seconds = 0.0  # of training, over all sittings
        self.best: Score | None = None
        self.best_step = 0
        self.evaluated_step = -1
        self.stale = 0  # evaluations since the best
        self.bad_steps = 0  # in a row
        self.skipped = 0
        self.pending: list[float] = []  # training losses that are not in metrics.jsonl yet
        self.log = MetricsLog(self.out / checkpoint.METRICS)
        self.autocast = devices.autocast(self.device, self.precision)
        torch.manual_seed(settings.seed)
        if resume and (self.out / checkpoint.RESUME).exists():
            self._load()
        else:
            self._begin()

    @property
    def progress(self) -> float:
        """The share of the run that is done, in steps or minutes, whichever is further."""
        done = self.step / self.settings.max_steps
        return max(done, self.seconds / 60 / self.settings.max_minutes) if self.settings.max_minutes else done

    def train(self) -> Result:
        """Trains to the end, leaves the best model in model.pt and in `self.model`, and says how it ended."""
        with _deferred_signals() as caught:
            while True:
                reason = self._ended()
                if not reason and caught:
                    reason = "signal"
                if reason:
                    break
                began = time.perf_counter()
                self._step()
                better = self.step % self.settings.eval_every == 0 and self._evaluate()
                self.seconds += time.perf_counter() - began
                if better or self.step % self.settings.save_every == 0:
                    self.save()
            if reason != "signal" and self.evaluated_step != self.step:
                self._evaluate()
            self.save()
        if reason != "signal":
            self._restore_best()
        return Result(reason, self.step, self.best_step, self.best, caught[0] if reason == "signal" else 0)

    def _ended(self) -> str:
        s = self.settings
        if self.bad_steps >= s.max_bad_steps:
            return "not finite"
        if s.patience and self.stale >= s.patience:
            return "patience"
        if self.step >= s.max_steps:
            return "max_steps"
        return "max_minutes" if s.max_minutes and self.seconds >= 60 * s.max_minutes else ""

    def _step(self) -> None:
        """One step of the optimiser; a loss or a gradient that is not finite changes nothing and is counted."""
        s = self.settings
        self.model.train()
        lr = learning_rate(self.progress, self.step, s)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        began = time.perf_counter()
        input_ids, targets = next(self.windows)
        loss = self._backward(input_ids, targets)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), s.clip or math.inf))
        self.step += 1
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            self.bad_steps = 0
            self.pending.append(loss)
        else:
            self.bad_steps += 1
            self.skipped += 1
            self.report("skipped", {"step": self.step, "loss": loss, "norm": norm})
        self.optimizer.zero_grad(set_to_none=True)
        if self.step % s.log_every == 0 and self.pending:
            self.log.append(
                step=self.step, split="train", loss=sum(self.pending) / len(self.pending), lr=lr, norm=norm,
                epoch=self.windows.epochs,
            )  # fmt: skip
            self.pending = []
        self.report("step", {
            "step": self.step, "loss": loss, "lr": lr, "tokens": input_ids.numel(),
            "seconds": time.perf_counter() - began,
        })  # fmt: skip

    def _backward(self, input_ids: Tensor, targets: Tensor) -> float:
        """Adds the gradients of a batch's mean loss, micro-batch by micro-batch, and returns that loss."""
        micro = self.settings.micro_batch or len(input_ids)
        counts = [int((part != -100).sum()) for part in targets.split(micro)]
        total = 0.0
        for ids, wanted, count in zip(input_ids.split(micro), targets.split(micro), counts, strict=True):
            with self.autocast:
                loss = self.model.loss(ids.to(self.device), wanted.to(self.device))
            loss = loss * (count / sum(counts))
            loss.backward()
            total += float(loss.detach())
        return total

    def _evaluate(self) -> bool:
        """The exact validation loss, and whether it is the best so far: then the model goes to model.pt at once."""
        score = evaluate(
            self.model, self.corpus.validation, self.corpus.validation_bytes, self.corpus.tokenizer.eos_id,
            autocast=self.autocast,
        )  # fmt: skip
        better = math.isfinite(score.loss) and (
            self.best is None or score.loss < self.best.loss - self.settings.min_delta
        )
        self.stale = 0 if better else self.stale + 1
        if better:
            self.best, self.best_step = score, self.step
            checkpoint.save_model(self.out, self.model.config, self.model.state_dict())
        self.log.append(
            step=self.step, split="validation", loss=score.loss, perplexity=score.perplexity,
            bits_per_byte=score.bits_per_byte, best=better,
        )  # fmt: skip
        self.evaluated_step = self.step
        self._draw()
        self.report("evaluation", {"step": self.step, "score": score, "best": better, "stale": self.stale})
        return better

    def _draw(self) -> None:
        from mamba2_min.plots import plot_loss  # matplotlib takes a second to import: not before it is needed

        plot_loss(read_metrics(self.log.path), self.out / checkpoint.CURVE, title=str(self.out))

    def save(self) -> None:
        """Writes last.pt: everything that the next step depends on."""
        checkpoint.save_tensors(self.out / checkpoint.RESUME, {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "windows": self.windows.state_dict(), "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "step": self.step, "seconds": self.seconds, "pending": self.pending,
            "best": dataclasses.asdict(self.best) if self.best else None, "best_step": self.best_step,
            "evaluated_step": self.evaluated_step, "stale": self.stale,
            "bad_steps": self.bad_steps, "skipped": self.skipped,
            "digest": self.corpus.digest,
        })  # fmt: skip

    def _begin(self) -> None:
        checkpoint.make_folder(self.out)
        for name in (checkpoint.WEIGHTS, checkpoint.RESUME, checkpoint.METRICS, checkpoint.CURVE):
            (self.out / name).unlink(missing_ok=True)
        self.corpus.tokenizer.save(self.out / checkpoint.TOKENIZER)
        checkpoint.save_json(self.out / checkpoint.CONFIG, self.model.config.to_dict())

    def _load(self) -> None:
        path = self.out / checkpoint.RESUME
        saved = checkpoint.load_tensors(path)
        try:
            if saved["digest"] != self.corpus.digest:
                raise UserError(
                    f"the documents are not those that {self.out} was trained on; bring them back, or train anew with "
                    "another --out"
                )
            checkpoint.load_weights(self.model, saved["model"], path)
            self.optimizer.load_state_dict(saved["optimizer"])
            self.windows.load_state_dict(saved["windows"])
            self.step, self.seconds, self.pending = saved["step"], saved["seconds"], saved["pending"]
            self.best = Score(**saved["best"]) if saved["best"] else None
            self.best_step, self.evaluated_step, self.stale = (
                saved["best_step"], saved["evaluated_step"], saved["stale"],
            )  # fmt: skip
            self.bad_steps, self.skipped = saved["bad_steps"], saved["skipped"]
            torch.set_rng_state(saved["torch_rng"])
            if self.device.type == "cuda" and saved["cuda_rng"]:
                torch.cuda.set_rng_state_all(saved["cuda_rng"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} is not a training that can go on: {error}") from error
        self.log.rewind(self.step)

    def _restore_best(self) -> None:
        if self.best is not None:
            _, weights = checkpoint.load_model(self.out)
            checkpoint.load_weights(self.model, weights, self.out / checkpoint.WEIGHTS)
        self.model.eval()


@contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Within, SIGINT and SIGTERM are noted in the list that it yields, for the loop to end at a whole step; a second
    one ends the process at once. Outside of the main thread nothing is changed."""
    caught: list[int] = []

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    numbers = [signal.SIGINT, signal.SIGTERM]
    try:
        old = {number: signal.signal(number, note) for number in numbers}
    except ValueError:  # not the main thread
        old = {}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
