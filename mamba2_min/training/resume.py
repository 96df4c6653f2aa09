"""Resuming: everything a training needs is saved in last.pt, checked to be of the same run, and restored."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from mamba2_min import files
from mamba2_min.checkpoints import checkpoint
from mamba2_min.checkpoints.weights import with_tied_head
from mamba2_min.errors import UserError
from mamba2_min.settings import ACCEPTABLE, BEFORE, Settings, defaults
from mamba2_min.training import sharding
from mamba2_min.training.last import check_fit, check_last, optimizer_state

if TYPE_CHECKING:
    from mamba2_min.training.trainer import Trainer


def capture(trainer: Trainer) -> dict[str, Any]:
    """Everything that the next step depends on, and what distinguishes one run from another.

    Where the model is sharded, all processes must call it, and the leader gets whole tensors.
    """
    sharded, keep = trainer.team.sharded, trainer.team.leads
    optimizer, average = trainer.optimizer.state_dict(), trainer.average.state_dict()
    return {
        "model": sharding.whole_weights(trainer.model, keep) if sharded else trainer.task.files.trained(trainer.model),
        "optimizer": sharding.whole(optimizer, keep) if sharded else optimizer,
        "windows": trainer.windows.state_dict(),
        "guard": trainer.guard.state_dict(),
        "average": sharding.whole(average, keep) if sharded else average,
        "carried": trainer.carried.state_dict() if trainer.carried else {},
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if trainer.device.type == "cuda" else [],
        "step": trainer.step,
        "seconds": trainer.seconds,
        "pending": trainer.pending,
        "records": trainer.log.records,
        "best": dataclasses.asdict(trainer.best) if trainer.best else None,
        "best_step": trainer.best_step,
        "evaluated_step": trainer.evaluated_step,
        "stale": trainer.stale,
        "micro_batch": trainer.micro_batch,
        "settings": dataclasses.asdict(trainer.asked),
        "config": trainer.model.config.to_dict(),
        "documents": trainer.task.digest,
        "tokenizer": trainer.task.tokenizer.digest(),
        "environment": _environment(trainer),
    }


def restore(trainer: Trainer, accept_documents: bool) -> None:
    """Puts what `capture` saved into a new trainer. Raises UserError if the file is damaged or of another run."""
    path = trainer.out / checkpoint.RESUME
    saved = checkpoint.load_tensors(path)
    try:
        check_last(saved)
        _check_same_run(trainer, saved, accept_documents)
        task, same = trainer.task, saved["documents"] == trainer.task.digest
        check_fit(saved, trainer.model, trainer.optimizer, trainer.windows.state_dict() if same else None)
        task.files.check(saved["model"], trainer.model)
        best = task.restored_score(saved["best"]) if same and saved["best"] else None
        state = optimizer_state(saved["optimizer"], trainer.optimizer)
        if trainer.team.sharded:
            weights = with_tied_head(saved["model"], trainer.model.config.tie_embeddings)
            sharding.load_weights(trainer.model, weights)
            state = sharding.with_parts(state, trainer.optimizer)
        else:
            task.files.restore(trainer.model, saved["model"], path)
        trainer.optimizer.load_state_dict(state)
        _restore_counts(trainer, saved)
        trainer.guard.load_state_dict(saved["guard"])
        trainer.average.load_state_dict(saved.get("average", {}))
        before = saved["settings"].get("lr", trainer.asked.lr)
        if before != trainer.asked.lr:
            trainer.guard.forgive()
            trainer.stale = 0
            trainer.notes.append(f"learning rate {trainer.asked.lr:g} from here on, {before:g} before")
        if same:
            trainer.best = best
            trainer.windows.load_state_dict(saved["windows"])
            if trainer.carried:
                trainer.carried.load_state_dict(saved.get("carried", {}), trainer.settings.batch_size)
        else:
            trainer.best, trainer.best_step, trainer.evaluated_step, trainer.stale = None, 0, -1, 0
            trainer.notes.append("other documents than before: reading from their start, looking for a new best")
        torch.set_rng_state(saved["torch_rng"])
        if trainer.device.type == "cuda" and saved["cuda_rng"]:
            torch.cuda.set_rng_state_all(saved["cuda_rng"])
        changed = _difference(saved["environment"], _environment(trainer))
        _note_what_is_gone(trainer)
    except UserError:
        raise
    except Exception as error:  # a file that was damaged or made by something else fails in many ways
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a training that can be resumed: {reason}") from error
    if changed:
        trainer.notes.append(f"the last bits may differ from those of an undisturbed run: {changed}")


def prepare_folder(trainer: Trainer) -> None:
    """Prepares the folder for the next step: that of a new run, or of the resumed one at its saved step.

    All processes call it, and the leader writes.
    """
    out = trainer.out
    if not trainer.team.leads:
        if trainer.resumed:
            repair_best(trainer)
        return
    if trainer.resumed:
        trainer.log.rewind(trainer.saved_records)
        repair_best(trainer)
        return
    files.make_folder(out)
    for name in (checkpoint.RESUME, *trainer.task.files.best, checkpoint.METRICS, checkpoint.CURVE):
        files.remove(out / name)
    trainer.task.tokenizer.save(out / checkpoint.TOKENIZER)
    files.flush(out / checkpoint.TOKENIZER)
    trainer.task.files.prepare(out, trainer.model)


def repair_ended(trainer: Trainer) -> None:
    """Writes what a run lacks that was killed after its last save: the best model, and the curve."""
    repair_best(trainer)
    if trainer.team.leads and not files.exists(trainer.out / checkpoint.CURVE) and trainer.log.lines():
        trainer._draw()


def repair_best(trainer: Trainer) -> None:
    """Writes model.pt where the run was killed between last.pt and model.pt: last.pt holds the same weights."""
    if trainer.best is None or trainer.best_step != trainer.step:
        return
    save_best(trainer, only_where_missing=True)


def save_best(trainer: Trainer, only_where_missing: bool = False) -> None:
    """Writes the present model, averaged where that is asked for, as the best. All processes call it."""
    with trainer.average.in_place():
        model = sharding.whole_model(trainer.model, trainer.team.leads)
        if trainer.team.leads and not (only_where_missing and trainer.task.files.is_saved(trainer.out, model)):
            trainer.task.files.save(trainer.out, model)


def _check_same_run(trainer: Trainer, saved: dict[str, Any], accept_documents: bool) -> None:
    """Raises UserError if last.pt is of another run than the trainer's."""
    out, task = trainer.out, trainer.task
    before = {**defaults(Settings), **BEFORE, **saved["settings"]}
    for name, value in dataclasses.asdict(trainer.asked).items():
        if name not in ACCEPTABLE and before[name] != value:
            raise UserError(f"{name} was {before[name]} when the run in {out} began, and is now {value}")
    config = trainer.model.config
    changed = _difference({**defaults(type(config)), **saved["config"]}, config.to_dict())
    if changed:
        raise UserError(f"the model is not that of the run in {out}: {changed}")
    if saved["tokenizer"] != task.tokenizer.digest():
        raise UserError(
            f"the vocabulary in {out / checkpoint.TOKENIZER} is not the one that the run began with; bring that file "
            "back, or start a new run with another --out"
        )
    if saved["documents"] != task.digest and not accept_documents:
        raise UserError(
            f"the documents are not those that {out} was trained on; bring them back, or add --accept documents to "
            "resume with what is there now"
        )


def _note_what_is_gone(trainer: Trainer) -> None:
    """The training goes on without files that somebody took away, as far as it can, and says what that costs."""
    here = trainer.log.lines()
    if here < trainer.saved_records:
        trainer.notes.append(
            f"{trainer.log.path.name} has {here} of the {trainer.saved_records} lines that it had: the loss curve has "
            "a gap"
        )
    gone = [name for name in trainer.task.files.best if not files.exists(trainer.out / name)]
    if gone and trainer.best is not None and trainer.best_step != trainer.step and not trainer.ended():
        trainer.best, trainer.stale = None, 0
        trainer.notes.append(f"{gone[0]}, the best model until now, is gone: looking for a new best")


def _environment(trainer: Trainer) -> dict[str, Any]:
    """What the last bit of a sum depends on, apart from the numbers."""
    return {
        "torch": str(torch.__version__),
        "device": trainer.device.type,
        "precision": trainer.precision,
        "threads": torch.get_num_threads(),
    }


def _restore_counts(trainer: Trainer, saved: dict[str, Any]) -> None:
    trainer.step, trainer.best_step, trainer.stale = saved["step"], saved["best_step"], saved["stale"]
    trainer.evaluated_step, trainer.saved_records = saved["evaluated_step"], saved["records"]
    trainer.seconds, trainer.pending = float(saved["seconds"]), [float(loss) for loss in saved["pending"]]
    if trainer.asked.micro_batch == saved["settings"].get("micro_batch", 0):  # what memory allowed then, it allows now
        trainer.micro_batch = max(1, min(saved["micro_batch"], trainer.settings.batch_size))


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What changed, as "d_model was 64, now 32"."""
    changed = [name for name in now if before.get(name) != now[name]]
    return ", ".join(f"{name} was {str(before.get(name))[:40]}, now {now[name]}" for name in changed)
