"""What the synthetic tasks of the papers share: a training loop, a test, and the command around them.

A task draws its batches on the device, fresh ones at every step, so that nothing can be learnt by heart; the test is
drawn from another seed. Only the hidden states at the questions go through the head: of 4,096 tokens of selective
copying 16 are asked. On a GPU the forward and the backward pass are one CUDA graph (training/step_graph.py): models of
this size take longer to launch than to compute.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import harness
from mamba2_min import devices, files
from mamba2_min.config import Mamba2Config
from mamba2_min.errors import UserError
from mamba2_min.evaluation.recall import Batch
from mamba2_min.models.base import LanguageModel, decay_groups
from mamba2_min.models.evaluating import evaluating
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.models.transformer import TransformerConfig, TransformerLM
from mamba2_min.ops.loss import IGNORE
from mamba2_min.training.step_graph import StepGraph

TEST_SEED = 10**9  # added to a seed: the test set's. A CPU's generator reads 32 bits of a seed
_STILL = 1e-9  # a dt that is as good as none for a million tokens
_CHECK = 50  # steps between two looks at the accuracy: each waits for the GPU


@dataclass(frozen=True)
class Stage:
    """One difficulty of a task: `draw(generator)` gives a batch in which every row has `questions` targets.

    still: what `StepSizes.cost` counts for, in nats: time is to stand still where nothing has to be written.
    Nothing in short rows asks for that, once all answers are right; very long ones need it.
    """

    name: str
    draw: Callable[[torch.Generator], Batch]
    questions: int
    still: float = 0.0


@dataclass(frozen=True)
class Plan:
    """How to train: AdamW, a linear warm-up, then a cosine to a hundredth of `lr` over `steps` or `minutes`,
    whichever comes first.

    The stages are passed one by one, each left once `advance` of the answers are right; the last one is the task. There
    training ends early once `enough` of the answers are right (above 1: never).
    """

    steps: int
    minutes: float
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.0
    advance: float = 0.95
    enough: float = 2.0
    eps: float = 1e-8  # AdamW's: where a task is solved, gradients below it no longer move the weights about


@dataclass(frozen=True)
class Row:
    """A line of a results table: a model's shape, and what it is trained on and with."""

    name: str
    shape: dict[str, Any]
    stages: Sequence[Stage]
    plan: Plan
    transformer: bool = False
    about: dict[str, Any] = field(default_factory=dict)  # facts for the JSON


def build(row: Row, seed: int) -> LanguageModel:
    """The model of a row. A Transformer has the layers, the width and, nearly, the parameters of the Mamba-2."""
    config = Mamba2Config(**row.shape)
    if row.transformer:
        return TransformerLM(TransformerConfig.matching(config, config.n_layer), seed)
    return Mamba2LM(config, seed)


def train(
    model: LanguageModel, stages: Sequence[Stage], plan: Plan, seed: int, precision: str, minutes: float = math.inf
) -> dict[str, Any]:
    """Trains a model where it is, for at most so many minutes, and returns how that went.

    In the result: `ended`, one of "enough", "steps", "minutes"; `stage`, the last one reached; `history`, the step, the
    stage, the loss in nats and the accuracy of each fiftieth step's last fifty batches.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    groups = decay_groups(model, plan.weight_decay)
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.98), eps=plan.eps, fused=fused)
    limit, begun = 60 * min(plan.minutes, minutes), time.perf_counter()
    at, step, ended, history = 0, 0, "", []
    graph: StepGraph | None = None
    graphed = device.type == "cuda"
    seen: list[Tensor] = []
    model.train()
    with devices.matmul_precision(device, precision):
        while not ended:
            stage = stages[at]

            def backward(input_ids: Tensor, places: Tensor, wanted: Tensor, stage: Stage = stage) -> Tensor:
                with StepSizes(model) if stage.still else contextlib.nullcontext() as sizes:
                    with devices.autocast(device, precision):
                        loss, right = answered(model, input_ids, places, wanted)
                    (loss + stage.still * sizes.cost() if sizes else loss).backward()
                return torch.stack([loss.detach().float(), right.float().mean()])

            progress = max(step / plan.steps, (time.perf_counter() - begun) / limit)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(plan, step, progress)
            batch = questions(stage, generator)
            if graph is None and graphed:
                graph, graphed = record(model, backward, batch)
            seen.append(graph(batch) if graph else backward(*batch))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            over = time.perf_counter() - begun > limit
            if step % _CHECK and step < plan.steps and not over:
                continue
            loss, accuracy = torch.stack(seen).mean(0).tolist()
            seen = []
            history.append([step, stage.name, round(loss, 4), round(accuracy, 5)])
            last = at == len(stages) - 1
            if last and accuracy >= plan.enough:
                ended = "enough"
            elif step >= plan.steps:
                ended = "steps"
            elif over:
                ended = "minutes"
            elif not last and accuracy >= plan.advance:
                at, graph = at + 1, None
    model.eval()
    seconds = time.perf_counter() - begun
    return {"ended": ended, "stage": stages[at].name, "steps": step, "seconds": round(seconds, 1), "history": history}


class StepSizes:
    """Within a `with` block: the dt of every token and head, of all layers of a Mamba-2, in the latest forward pass.

    Nothing of a pass outlives the block. If a pass that a CUDA graph recorded were kept, the next recording would add
    its gradients up in the stream of the earlier one, and PyTorch would warn.
    """

    def __init__(self, model: LanguageModel):
        self._mixers = [block.mixer for block in model.backbone.blocks] if isinstance(model, Mamba2LM) else []
        self._seen: dict[int, Tensor] = {}

    def __enter__(self) -> StepSizes:
        self._hooks = [
            mixer.in_proj.register_forward_hook(lambda module, inputs, output, k=k: self._seen.update({k: output}))
            for k, mixer in enumerate(self._mixers)
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._seen = {}

    def cost(self) -> Tensor:
        """0 if every head writes with a dt of 1 or more somewhere in each row, and elsewhere stands still.

        The mean of log(dt / 1e-9), where that is above 0, and of -log of a row's largest dt. Without the second part
        all dt shrink together, while B and x grow: then what is written drowns in what a million tokens leave behind.
        """
        dts = torch.stack(
            [
                F.softplus(self._seen[k][..., -mixer.config.nheads :].float() + mixer.dt_bias)
                for k, mixer in enumerate(self._mixers)
            ]
        )
        return (dts / _STILL).clamp_min(1).log().mean() - dts.amax(2).clamp_max(1).log().mean()


def learning_rate(plan: Plan, step: int, progress: float) -> float:
    cosine = (1 + math.cos(math.pi * min(progress, 1))) / 2
    return plan.lr * min(1, (step + 1) / plan.warmup) * (0.01 + 0.99 * cosine)


def questions(stage: Stage, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A batch as input_ids (b, l), the places of its questions and their answers (b, questions)."""
    input_ids, targets = stage.draw(generator)
    places = (targets != IGNORE).int().topk(stage.questions, dim=1).indices
    return input_ids, places, targets.gather(1, places)


def answered(model: LanguageModel, input_ids: Tensor, places: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss in nats of the answers, and which of them are right (b, questions). Nothing waits for a GPU."""
    hidden, _ = model.hidden(input_ids)
    asked = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
    logits = model.lm_head(asked)[..., : model.config.vocab_size]
    return F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten()), logits.argmax(-1) == wanted


def record(
    model: LanguageModel, backward: Callable[..., Tensor], batch: Sequence[Tensor]
) -> tuple[StepGraph | None, bool]:
    """The graph of a step and True; or None and False, with a line that says why. Raises where memory runs out."""
    try:
        return StepGraph(list(model.parameters()), backward, batch), True
    except Exception as error:
        model.zero_grad(set_to_none=True)
        if devices.is_out_of_memory(error):
            raise
        print(f"no CUDA graph: {(str(error).splitlines() or [type(error).__name__])[0]}", flush=True)
        return None, False


@torch.no_grad()
def test(model: LanguageModel, stage: Stage, seed: int, batches: int, precision: str) -> dict[str, Any]:
    """The accuracy on so many batches that training has not seen: of answers, and of rows with every answer right."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(TEST_SEED + seed)
    found = []
    with evaluating(model), devices.matmul_precision(device, precision), devices.autocast(device, precision):
        for _ in range(batches):
            found.append(answered(model, *questions(stage, generator))[1])
    right = torch.cat(found)
    rows = right.all(1).double().mean()
    return {"accuracy": right.double().mean().item(), "rows_right": rows.item(), "answers": right.numel()}


def parser(doc: str, seeds: Sequence[int] = (0,)) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (%(default)s)")
    p.add_argument("--precision", default="auto", help="of training: auto, float32 or bf16 (%(default)s)")
    p.add_argument(
        "--minutes", type=float, default=math.inf, help="for all rows together; the rest is for another time"
    )
    p.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    p.add_argument("--only", nargs="+", metavar="TEXT", help="the rows whose name contains one of these")
    p.add_argument("--again", action="store_true", help="measure also what the results hold already")
    p.add_argument("--results", type=Path, default=harness.RESULTS, metavar="DIR", help="the JSON (%(default)s)")
    return p


def run(
    name: str,
    args: argparse.Namespace,
    rows: Sequence[Row],
    published: dict[str, Any],
    measure: Callable[[LanguageModel, Row, int, str], dict[str, Any]],
) -> None:
    """Trains each row with each seed and writes results/quality-NAME.json after each. Rows that it holds are left out.

    `measure(model, row, seed, precision)` tests a trained model. A row that `--minutes` cut short is recorded as far as
    it came, and trained again at the next call.
    """
    device = devices.pick_device(args.device)
    precision = devices.pick_precision(args.precision, device)
    path = args.results / f"quality-{name}.json"
    options = harness.Options(device=device.type, threads=torch.get_num_threads())
    done: list[dict[str, Any]] = files.load_json(path)["runs"] if files.is_file(path) else []
    deadline = time.perf_counter() + 60 * args.minutes
    chosen = [row for row in rows if not args.only or any(text in row.name for text in args.only)]
    if not chosen:
        raise UserError(f"no row's name contains {' or '.join(args.only)}; there are {', '.join(r.name for r in rows)}")
    for seed in args.seeds:
        for row in chosen:
            held = [r for r in done if (r["name"], r["seed"]) == (row.name, seed)]
            left = (deadline - time.perf_counter()) / 60
            if left <= 0 or (held and held[0]["whole"] and not args.again):
                continue
            model = build(row, seed).to(device)
            how = train(model, row.stages, row.plan, seed, precision, left)
            result = {
                "name": row.name,
                "seed": seed,
                "whole": how["ended"] != "minutes" or left > row.plan.minutes,
                "parameters": sum(p.numel() for p in model.parameters()),
                "model": model.config.to_dict(),
                "plan": dataclasses.asdict(row.plan),
                "precision": precision,
                "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
                **row.about,
                **how,
                **measure(model, row, seed, precision),
            }
            print(f"{row.name}  seed {seed}: {summary(result)}", flush=True)
            done = [r for r in done if (r["name"], r["seed"]) != (row.name, seed)] + [result]
            written = {
                "benchmark": f"quality.{name.replace('-', '_')}",
                "machine": harness.machine(options),
                "versions": harness.versions(),
                "published": published,
                "runs": done,
            }
            files.make_folder(args.results)
            path.write_text(harness.as_json(written))
    missing = [r.name for r in chosen if not any(d["name"] == r.name and d["whole"] for d in done)]
    if missing:
        print(f"not measured in the time given: {', '.join(missing)}; the same command goes on with them")


def summary(result: dict[str, Any]) -> str:
    accuracy = result.get("accuracy")
    shown = "" if accuracy is None else f"accuracy {accuracy:.4%}, "
    return f"{shown}{result['steps']:,} steps in {result['seconds']:.0f} s (ended by {result['ended']})"
