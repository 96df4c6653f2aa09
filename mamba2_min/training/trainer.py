"""Training, in memory, with early stopping: it can be stopped at any moment and goes on as if it never had been.

    batch ─► loss ─► gradients ─► clipped ─► AdamW          once a step, on several micro-batches if asked
    every eval_every steps: the exact validation loss; the best model so far goes to model.pt
    every save_every steps: everything needed to go on goes to last.pt
    patience evaluations without a better one, max_steps or max_minutes: the end

A run's folder: config.json, tokenizer.json, model.pt (the best on validation), last.pt (to go on),
metrics.jsonl, loss.png. On a CPU a run bounded by steps ends with the same weights, bit for bit, however often it was
stopped, killed and resumed: whatever the next step depends on is in last.pt, and what the files beside it hold beyond
that is made again or taken back.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamba2_min import devices, files
from mamba2_min.checkpoints import checkpoint
from mamba2_min.data.corpus import IGNORE, Corpus, Windows
from mamba2_min.errors import UserError, printable
from mamba2_min.evaluation.perplexity import Score, evaluate
from mamba2_min.models.base import decay_groups
from mamba2_min.ops.autograd import widest
from mamba2_min.settings import ACCEPTABLE, Settings, defaults, learning_rate
from mamba2_min.training.guards import LossGuard, deferred_signals
from mamba2_min.training.metrics import MetricsLog, read_metrics

__all__ = ["Result", "Settings", "Trainer", "learning_rate"]

_SECONDS_BETWEEN_PICTURES = 30  # drawing takes a good part of a second, which short evaluations would feel


@dataclass(frozen=True)
class Result:
    """How a training ended."""

    reason: str  # "max_steps", "max_minutes", "patience", "signal", "bad steps"
    step: int
    best_step: int
    best: Score | None  # None where no evaluation was finite
    signal: int = 0  # the signal that ended it, if one did


def _resolved(settings: Settings, windows: Windows) -> Settings:
    """The settings with what depends on the data filled in, and a warm-up that a short run has time for."""
    max_steps = settings.max_steps
    if not max_steps:
        max_steps = max(200, round(10 * windows.targets_per_epoch / (windows.context * settings.batch_size)))
    return dataclasses.replace(settings, max_steps=max_steps, warmup_steps=min(settings.warmup_steps, max_steps // 5))


class Trainer:
    """Trains `model` on `corpus` in the folder `out`. `resume` goes on from its last.pt, where there is one.

    Nothing is written before `train()`. With `accept_documents` a run goes on with other documents than those it was
    begun with: from the start of the new ones, and with a new best. Of the settings only ACCEPTABLE may differ.

    `report(event, values)` is called after every step ("step"), evaluation ("evaluation"), skipped step ("skipped"),
    halved micro-batch ("memory") and attempt to compile ("compiled"): what a screen shows. `notes` holds lines that a
    user should read before the start.
    Raises UserError where the run cannot begin or go on.
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
        accept_documents: bool = False,
    ):
        self.out = Path(out)
        self.device = torch.device(device)
        self.precision = devices.pick_precision(settings.precision, self.device)
        self.autocast = devices.autocast(self.device, self.precision)
        if settings.deterministic and self.device.type == "cuda":
            devices.make_deterministic()
        self.model = model.to(self.device)
        self.model.recompute = settings.recompute
        self._to_compile = settings.compile
        self.corpus, self.report = corpus, report
        self.windows = Windows(corpus.train, settings.context, settings.batch_size, settings.seed)
        self.asked = settings
        self.settings = settings = _resolved(settings, self.windows)
        self.micro_batch = min(settings.micro_batch or settings.batch_size, settings.batch_size)
        self.optimizer = torch.optim.AdamW(
            decay_groups(self.model, settings.weight_decay),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.guard = LossGuard(settings.spike)
        self.log = MetricsLog(self.out / checkpoint.METRICS)
        self.step = 0
        self.seconds = 0.0  # of training, over all sittings
        self.best: Score | None = None
        self.best_step = 0
        self.evaluated_step = -1
        self.stale = 0  # evaluations since the best
        self.pending: list[float] = []  # training losses that are not in metrics.jsonl yet
        self.notes = [self.windows.note] if self.windows.note else []
        self._records = 0  # of metrics.jsonl, when last.pt was written
        self._since = self._drawn = 0.0  # the clock, when `seconds` was counted and when loss.png was drawn
        torch.manual_seed(settings.seed)
        self.resumed = resume and (self.out / checkpoint.RESUME).is_file()
        if self.resumed:
            self._load(accept_documents)

    @property
    def progress(self) -> float:
        """The share of the run that is done, in steps or minutes, whichever is further."""
        done = self.step / self.settings.max_steps
        return max(done, self.seconds / 60 / self.settings.max_minutes) if self.settings.max_minutes else done

    @property
    def seconds_left(self) -> float | None:
        """Until the steps or the minutes are over, at the speed so far; None before the first step."""
        return self.seconds / self.progress * (1 - min(self.progress, 1)) if self.seconds and self.progress else None

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

    def train(self) -> Result:
        """Trains to the end, leaves the best model in model.pt and in `self.model`, and says how it ended.

        A run that had ended already is left as it is. Raises UserError where the disk is full or memory runs out; what
        was saved before is then still there.
        """
        over = self.resumed and self.evaluated_step == self.step and self.ended()
        if over:
            self._mend_best()
            reason, caught = over, []
        else:
            try:
                reason, caught = self._run()
            except (RuntimeError, MemoryError) as error:
                if not devices.is_out_of_memory(error):
                    raise
                raise self._out_of_memory() from error
        if reason != "signal":
            self._restore_best()
        return Result(reason, self.step, self.best_step, self.best, caught[0] if reason == "signal" else 0)

    def _run(self) -> tuple[str, list[int]]:
        """Steps until there is a reason to stop: the reason, and the signals that came."""
        self._begin()
        self._since = self._drawn = time.perf_counter()
        with devices.matmul_precision(self.device, self.precision), deferred_signals() as caught:
            while not (reason := self.ended() or ("signal" if caught else "")):
                self._step()
                best = self.step % self.settings.eval_every == 0 and self._evaluate()
                if self.step % self.settings.save_every == 0 and not best:
                    self.save()
                self._count_time()
            if reason != "signal" and self.evaluated_step != self.step:
                self._evaluate()
            self.save()
            self._draw()
        return reason, caught

    def _step(self) -> None:
        """One step of the optimiser, unless the guard finds fault with its loss or gradient: then nothing changes."""
        s = self.settings
        self.model.train()
        lr = learning_rate(self.progress, self.step, s)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        began = time.perf_counter()
        input_ids, targets = next(self.windows)
        if self._to_compile:
            self._compile(input_ids, targets)
        loss = self._gradients(input_ids, targets)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), s.clip or math.inf)
        loss, norm = torch.stack([loss, norm.to(loss.dtype)]).tolist()  # the one moment of a step that waits for a GPU
        self.step += 1
        why = self.guard.judge(loss, norm, share=float((targets != IGNORE).float().mean()))
        if why:
            self.report("skipped", {"step": self.step, "loss": loss, "norm": norm, "why": why})
        else:
            self.optimizer.step()
            self.pending.append(loss)
        self.optimizer.zero_grad(set_to_none=True)
        if self.step % s.log_every == 0:
            self._log_training(lr, norm)
        self.report(
            "step",
            {
                "step": self.step,
                "loss": loss,
                "lr": lr,
                "tokens": input_ids.numel(),
                "seconds": time.perf_counter() - began,
            },
        )

    def _log_training(self, lr: float, norm: float) -> None:
        """One line for the steps since the last: the mean loss of those that were taken."""
        loss = sum(self.pending) / len(self.pending) if self.pending else math.nan
        self.log.append(
            step=self.step,
            split="train",
            loss=loss,
            lr=lr,
            norm=norm,
            epoch=self.windows.epochs,
            skipped=self.guard.skipped,
        )
        self.pending = []

    def _compile(self, input_ids: Tensor, targets: Tensor) -> None:
        """Compiles the blocks, unless that fails or gives another loss or gradient than without: compilers have their
        faults, and one that goes unnoticed costs a run."""
        self._to_compile = False
        rows = self.micro_batch + len(input_ids) % self.micro_batch  # a part of each size that a step has
        found, why = [], ""
        for compiled in (False, True):
            self.model.compile_blocks(compiled)
            try:
                with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                    loss = self._backward(input_ids[:rows], targets[:rows])
                norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
                found.append((float(loss), float(norm)))
            except Exception as error:
                if devices.is_out_of_memory(error):
                    why = "memory ran out before it could be compared"
                elif compiled:
                    why = f"the compiler failed: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"
                else:
                    raise
            self.optimizer.zero_grad(set_to_none=True)
            devices.release_memory(self.device)
        if len(found) == 2:
            (loss, norm), (again, norm_again) = found  # dropout draws other numbers when compiled
            if not (abs(again - loss) <= 0.02 * abs(loss) and abs(norm_again - norm) <= 0.1 * norm):
                why = (
                    f"compiled, the loss is {again:.4g} and the gradient's norm {norm_again:.4g}, and they should be "
                    f"{loss:.4g} and {norm:.4g}"
                )
        if why:
            self.model.compile_blocks(False)
        self.report("compiled", {"step": self.step + 1, "why_not": why})

    def _gradients(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """The gradients and the mean loss of a batch; where memory runs out, again with half the micro-batch."""
        while True:
            try:
                return self._backward(input_ids, targets)
            except (RuntimeError, MemoryError) as error:
                if not devices.is_out_of_memory(error) or not self.settings.adapt_micro_batch or self.micro_batch == 1:
                    raise
            # Not before the error is forgotten: it holds on to the tensors that there was no room for.
            self.optimizer.zero_grad(set_to_none=True)
            devices.release_memory(self.device)
            self.micro_batch = -(-self.micro_batch // 2)
            self._to_compile = self.settings.compile  # other sizes, to be proved anew at the next step
            self.report("memory", {"step": self.step + 1, "micro_batch": self.micro_batch})

    def _backward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Adds the gradients of a batch's mean loss, micro-batch by micro-batch, and returns that loss."""
        counts = [int((part != IGNORE).sum()) for part in targets.split(self.micro_batch)]
        total = torch.zeros((), dtype=widest(self.device), device=self.device)
        parts = zip(input_ids.split(self.micro_batch), targets.split(self.micro_batch), counts, strict=True)
        for ids, wanted, count in parts:
            with self.autocast:
                loss = self.model.loss(ids.to(self.device), wanted.to(self.device))
            loss = loss * (count / sum(counts))
            loss.backward()
            total += loss.detach()
        return total

    def _evaluate(self) -> bool:
        """The exact validation loss, and whether it is the best so far: then the model goes to model.pt at once."""
        score = evaluate(
            self.model,
            self.corpus.validation,
            self.corpus.validation_bytes,
            self.corpus.tokenizer.eos_id,
            autocast=self.autocast,
        )
        better = math.isfinite(score.loss) and (
            self.best is None or score.loss < self.best.loss - self.settings.min_delta
        )
        self.evaluated_step = self.step
        self.stale = 0 if better else self.stale + 1
        self.log.append(
            step=self.step,
            split="validation",
            loss=score.loss,
            perplexity=score.perplexity,
            bits_per_byte=score.bits_per_byte,
            best=better,
        )
        if better:
            self.best, self.best_step = score, self.step
            self.save()  # before model.pt, which is thus never of a step that a resumed run has not reached
            checkpoint.save_model(self.out, self.model.config, self.model.state_dict())
        if time.perf_counter() - self._drawn > _SECONDS_BETWEEN_PICTURES:
            self._draw()
        self.report("evaluation", {"step": self.step, "score": score, "best": better, "stale": self.stale})
        return better

    def _draw(self) -> None:
        from mamba2_min.training.plots import plot_loss  # matplotlib takes a second to import: not before it is needed

        title = printable(str(self.out)).replace("$", r"\$")  # between two of them would be a formula
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a folder's name may have letters that the font lacks
            plot_loss(read_metrics(self.log.path), self.out / checkpoint.CURVE, title=title)
        self._drawn = time.perf_counter()

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now

    def save(self) -> None:
        """Writes last.pt: everything that the next step depends on. The lines of metrics.jsonl are on disk before."""
        self._count_time()
        self.log.flush()
        checkpoint.save_tensors(
            self.out / checkpoint.RESUME,
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "windows": self.windows.state_dict(),
                "guard": self.guard.state_dict(),
                "torch_rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
                "step": self.step,
                "seconds": self.seconds,
                "pending": self.pending,
                "records": self.log.records,
                "best": dataclasses.asdict(self.best) if self.best else None,
                "best_step": self.best_step,
                "evaluated_step": self.evaluated_step,
                "stale": self.stale,
                "micro_batch": self.micro_batch,
                "settings": dataclasses.asdict(self.asked),
                "config": self.model.config.to_dict(),
                "documents": self.corpus.digest,
                "tokenizer": self.corpus.tokenizer.digest(),
                "environment": self._environment(),
            },
        )

    def _environment(self) -> dict[str, Any]:
        """What the last bit of a sum depends on, beside the numbers."""
        return {
            "torch": str(torch.__version__),
            "device": self.device.type,
            "precision": self.precision,
            "threads": torch.get_num_threads(),
        }

    def _begin(self) -> None:
        """Leaves the folder as the next step expects it: of a new run, or of the saved one at its saved step."""
        if self.resumed:
            self.log.rewind(self._records)
            self._mend_best()
            return
        files.make_folder(self.out)
        for name in (checkpoint.RESUME, checkpoint.WEIGHTS, checkpoint.METRICS, checkpoint.CURVE):
            files.remove(self.out / name)
        self.corpus.tokenizer.save(self.out / checkpoint.TOKENIZER)
        files.flush(self.out / checkpoint.TOKENIZER)
        files.save_json(self.out / checkpoint.CONFIG, self.model.config.to_dict())

    def _load(self, accept_documents: bool) -> None:
        path = self.out / checkpoint.RESUME
        saved = checkpoint.load_tensors(path)
        try:
            self._check_same(saved, accept_documents)
            checkpoint.load_weights(self.model, saved["model"], path)
            self._load_optimizer(saved["optimizer"])
            self._load_counts(saved)
            self.guard.load_state_dict(saved["guard"])
            if saved["documents"] == self.corpus.digest:
                self.windows.load_state_dict(saved["windows"])
            else:
                self.best, self.best_step, self.evaluated_step, self.stale = None, 0, -1, 0
                self.notes.append("other documents than before: read from their start, with a new best to be found")
            torch.set_rng_state(saved["torch_rng"])
            if self.device.type == "cuda" and saved["cuda_rng"]:
                torch.cuda.set_rng_state_all(saved["cuda_rng"])
            changed = _difference(saved["environment"], self._environment())
        except UserError:
            raise
        except Exception as error:  # a file that was damaged or made by something else fails in many ways
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise UserError(f"{path} is not a training that can go on: {reason}") from error
        if changed:
            self.notes.append(f"the last bits may differ from those of an undisturbed run: {changed}")

    def _check_same(self, saved: dict[str, Any], accept_documents: bool) -> None:
        """Raises UserError where the run in last.pt is another one than this."""
        before = {**defaults(Settings), **saved["settings"]}
        for name, value in dataclasses.asdict(self.asked).items():
            if name not in ACCEPTABLE and before[name] != value:
                raise UserError(f"{name} was {before[name]} when the run in {self.out} began, and is now {value}")
        changed = _difference(saved["config"], self.model.config.to_dict())
        if changed:
            raise UserError(f"the model is not that of the run in {self.out}: {changed}")
        if saved["tokenizer"] != self.corpus.tokenizer.digest():
            raise UserError(
                f"the vocabulary in {self.out / checkpoint.TOKENIZER} is not that with which the run was begun; bring "
                "that file back, or train anew with another --out"
            )
        if saved["documents"] != self.corpus.digest and not accept_documents:
            raise UserError(
                f"the documents are not those that {self.out} was trained on; bring them back, or add --accept "
                "documents to go on with what is there now"
            )

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
        for parameter, moments in self.optimizer.state.items():
            if moments["exp_avg"].shape != parameter.shape or moments["exp_avg_sq"].shape != parameter.shape:
                raise ValueError("its optimiser belongs to another model")

    def _load_counts(self, saved: dict[str, Any]) -> None:
        for name in ("step", "best_step", "evaluated_step", "stale", "records", "micro_batch"):
            least = -1 if name == "evaluated_step" else 0
            if type(saved[name]) is not int or not least <= saved[name] < 2**31:
                raise ValueError(f"its {name} is no number of anything")
        self.step, self.best_step, self.stale = saved["step"], saved["best_step"], saved["stale"]
        self.evaluated_step, self._records = saved["evaluated_step"], saved["records"]
        self.seconds, self.pending = float(saved["seconds"]), [float(loss) for loss in saved["pending"]]
        self.best = Score(**saved["best"]) if saved["best"] else None
        if self.asked.micro_batch == saved["settings"].get("micro_batch", 0):  # what memory allowed then, it allows now
            self.micro_batch = max(1, min(saved["micro_batch"], self.settings.batch_size))

    def _mend_best(self) -> None:
        """Where the run was killed between last.pt and model.pt, makes model.pt: last.pt holds the same weights."""
        if self.best is None or self.best_step != self.step:
            return
        weights = self.model.state_dict()
        try:
            _, there = checkpoint.load_model(self.out)
            same = all(torch.equal(there[name], tensor.cpu()) for name, tensor in weights.items())
        except (UserError, KeyError):
            same = False
        if not same:
            checkpoint.save_model(self.out, self.model.config, weights)

    def _restore_best(self) -> None:
        if self.best is not None:
            weights = checkpoint.load_tensors(self.out / checkpoint.WEIGHTS)
            checkpoint.load_weights(self.model, weights, self.out / checkpoint.WEIGHTS)
        self.model.eval()

    def _out_of_memory(self) -> UserError:
        micro, context = self.micro_batch, self.windows.context
        if micro > 1:
            lower = f"pass --micro-batch {-(-micro // 2)} (the same training in smaller parts) or --batch-size auto"
        else:
            lower = f"lower --context (now {context}), --d-model or --n-layer"
        saved = "; what was saved before is intact" if (self.out / checkpoint.RESUME).exists() else ""
        where = f"in step {self.step + 1}, with {micro} windows of {context} at a time"
        return UserError(f"out of memory {where}: {lower}{saved}")


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What changed, as "d_model was 64, now 32"."""
    changed = [name for name in now if before.get(name) != now[name]]
    return ", ".join(f"{name} was {str(before.get(name))[:40]}, now {now[name]}" for name in changed)
