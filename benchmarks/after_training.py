"""What fine-tuning reaches and costs: answers learnt by heart, instructions, conversations, school problems, speed.

    python -m benchmarks.after_training --data DIR --model RUN                 from a run trained on llama-stories
    python -m benchmarks.after_training --only large --device cuda             full and LoRA at 130 million parameters
    python -m benchmarks.after_training --data DIR --model RUN --quick         does it run here?

DIR holds instruction-data.json, ultrachat_small.jsonl and gsm8k/, as published. A row that is in the results already is
left out, so that a benchmark that was stopped goes on.

heart         32 instructions, to below 0.05 nats: how many answers come back word for word, and end by themselves
instructions  1,100 instructions: loss on the held-out answers before and after, and how many of them end
ultrachat     1,000 conversations: loss on the held-out answers before and after
              (lora-seen: with the rows of the records' tokens, --lora-tokens seen)
gsm8k         7,473 school problems: exact answers of the test part, whatever they are
speed         tokens per second of fine-tuning and of pretraining, in equal steps, by turns
large         the same at 130 million parameters, and peak memory; on a GPU as one CUDA graph too (lora+graph)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from mamba2_min import devices, files
from mamba2_min.config import Mamba2Config
from mamba2_min.data.corpus import Corpus
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.finetune import adapter, run
from mamba2_min.finetune.chat import load_chat
from mamba2_min.finetune.conversations import TEMPLATES, Conversation, Example, prompt_ids, template_for
from mamba2_min.finetune.load import load_completer
from mamba2_min.finetune.lora import LoRAConfig, add_lora, trainable
from mamba2_min.finetune.spec import plan
from mamba2_min.finetune.tasks import Answers
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.settings import PRESETS, Settings
from mamba2_min.training.trainer import Trainer

METHODS = ("full", "lora")
ROWS = (
    *(f"{task}/{method}" for task in ("heart", "instructions", "ultrachat", "gsm8k") for method in METHODS),
    *(f"{task}/lora-seen" for task in ("heart", "instructions", "ultrachat")),
    "speed/small",
    "large/130M",
)
# Steps, and what differs from fine-tuning's defaults.
HOW: dict[str, dict[str, Any]] = {
    "heart": {"max_steps": 400, "eval_every": 50, "val_fraction": 0.0, "weight_decay": 0.0, "lora_dropout": 0.0},
    "instructions": {"max_steps": 600, "eval_every": 50},
    "ultrachat": {"max_steps": 600, "eval_every": 50},
    "gsm8k": {"max_steps": 800, "eval_every": 200},
}
SMALL = Mamba2Config(8192, **PRESETS["small"])
LARGE = Mamba2Config(50_288, **PRESETS["base"])


@dataclasses.dataclass(frozen=True)
class Options:
    data: Path
    model: Path
    work: Path
    device: str
    precision: str
    compile: bool
    quick: bool


def records_of(task: str, o: Options) -> tuple[Path, Path | None, list[dict[str, Any]]]:
    """The file to learn from, that to validate with where there is one, and the records of the test."""
    folder = files.make_folder(o.work / "data")
    if task == "ultrachat":
        talks = _lines(o.data / "ultrachat_small.jsonl")
        return _write(folder / "ultrachat.jsonl", talks[: 20 if o.quick else None]), None, []
    if task == "gsm8k":
        problems = [_lines(o.data / "gsm8k" / f"{part}.jsonl") for part in ("train", "test")]
        few = 40 if o.quick else 10**6
        return (
            _write(folder / "gsm8k-train.jsonl", problems[0][300 : 300 + few]),
            _write(folder / "gsm8k-validation.jsonl", problems[0][: min(few, 300)]),
            problems[1][: 20 if o.quick else 10**6],
        )
    entries = files.load_json(o.data / "instruction-data.json")
    if task == "heart":
        short = [e for e in entries if len(e["output"]) <= 200][:32]
        return _write(folder / "heart.jsonl", short), None, short
    return _write(folder / "instructions.jsonl", entries[: 60 if o.quick else None]), None, []


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in files.read_text(path, 1 << 30, "utf-8").splitlines() if line.strip()]


def _write(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    files.write_atomically(path, lambda file: file.write(content))
    return path


@torch.inference_mode()
def write_answers(
    model: Mamba2LM, tokenizer: WordTokenizer, prompts: Sequence[Sequence[int]], most: int, batch: int = 256
) -> list[tuple[str, bool]]:
    """The likeliest answer to each prompt and whether it ended by itself, many at a time.

    Prompts are padded on the left; the state begins again where a prompt does.
    """
    device, eos, out = model.ids_device, tokenizer.eos_id, []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in part], device=device)
        seq_idx = torch.tensor([[-1] * (width - len(p)) + [0] * len(p) for p in part], device=device)
        logits, state = model(ids, seq_idx=seq_idx)
        token, written = logits[:, -1].argmax(-1), []
        ended = torch.zeros(len(part), dtype=torch.bool, device=device)
        for _ in range(most):
            written.append(token.cpu())
            ended |= token == eos
            if ended.all():
                break
            step, state = model.step(token, state)
            token = step.argmax(-1)
        rows = torch.stack(written, 1).tolist()
        for row in rows:
            stop = row.index(eos) if eos in row else len(row)
            out.append((tokenizer.decode(row[:stop]), eos in row))
    return out


def prompt_of(talk: Conversation, tokenizer: WordTokenizer) -> list[int]:
    request = next(m.content for m in talk.messages if m.role == "user")
    return [tokenizer.eos_id, *prompt_ids(tokenizer, TEMPLATES[template_for(tokenizer)], request)]


def learn(task: str, method: str, o: Options) -> dict[str, Any]:
    """Fine-tunes with the package's own command, reads back what it left, and asks it."""
    data, validation, test = records_of(task, o)
    out = o.work / f"{task}-{method}"
    how = {**HOW[task], "context": 512, "patience": 0, "precision": o.precision, "compile": o.compile}
    how["graph"] = o.device == "cuda"
    if o.quick:
        how |= {"max_steps": 4, "eval_every": 2}
    if validation is not None:
        how["val_data"] = str(validation)
    method, _, tokens = method.partition("-")
    asked = {"model": str(o.model), "data": str(data), "method": method, "lora_tokens": tokens or "none", **how}
    device = torch.device(o.device)
    spec = plan(out, asked, overwrite=True)
    ready = run.prepare(spec, out)
    before = ready.task.evaluate(
        ready.model.to(device), devices.autocast(device, devices.pick_precision(o.precision, device))
    )
    trained, everything = trainable(ready.model)
    result = run.finetune(spec, out, device, again="", quiet=True)
    if result.best is None or result.signal:
        raise KeyboardInterrupt
    base, folder = (out, None) if method == "full" else (o.model, out)
    completer = load_completer(base, folder, device)
    tokenizer = completer.tokenizer
    talks = load_chat(data, tokenizer, validation, how.get("val_fraction", 0.1)).validation_talks
    about: dict[str, Any] = {
        "row": f"{task}/{method}{tokens and '-' + tokens}",
        "loss_before": before.loss,
        "loss": result.best.loss,
        "best_step": result.best_step,
        "steps": result.step,
        "trained_parameters": trained,
        "parameters": everything,
    }
    if method == "lora":
        about["adapter_bytes"] = (out / adapter.WEIGHTS).stat().st_size
    if task == "gsm8k":
        prompts = [prompt_of(Conversation(messages=(_user(p["question"]),)), tokenizer) for p in test]
        said = write_answers(completer.model, tokenizer, prompts, 8 if o.quick else 300)
        pairs = list(zip(said, test, strict=True))
        right = sum(number(text) is not None and number(text) == number(p["answer"]) for (text, _), p in pairs)
        about |= {"problems": len(test), "exact": right, "with_a_number": sum(number(t) is not None for t, _ in said)}
    else:
        said = write_answers(
            completer.model, tokenizer, [prompt_of(talk, tokenizer) for talk in talks], 8 if o.quick else 400
        )
        if task == "heart":
            same = [
                _said(text, tokenizer) == talk.messages[1].content for (text, _), talk in zip(said, talks, strict=True)
            ]
            about |= {"word_for_word": sum(same)}
    return about | {"answers": len(said), "ended": sum(ended for _, ended in said)}


def _user(content: str) -> Any:
    from mamba2_min.finetune.conversations import Message

    return Message("user", content)


def _said(text: str, tokenizer: WordTokenizer) -> str:
    return text.removeprefix(TEMPLATES[template_for(tokenizer)].before_answer)


def number(text: str) -> str | None:
    """The answer to a school problem: the number after the last ####, without commas."""
    found = re.findall(r"####\s*(-?[\d,]*\.?\d+)", text)
    return found[-1].replace(",", "").rstrip(".") if found else None


def trainers(config: Mamba2Config, rows: int, context: int, o: Options) -> dict[str, Trainer]:
    """Trainers of equal steps: pretraining on windows, and fine-tuning on full rows of packed answers."""
    words = WordTokenizer([f"word{k}" for k in range(config.vocab_size - 257)])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, config.vocab_size, (rows * context * 4,), dtype=torch.int32, generator=generator)
    corpus = Corpus(words, tokens, tokens[:1000], len(tokens), 1000, 1, 1, 1, 1)
    size = context // 4  # four conversations a row, half of each an answer
    learnt = torch.arange(size) >= size // 2
    examples = [
        Example(torch.randint(1, config.vocab_size, (size + 1,), generator=generator), learnt, size)
        for _ in range(rows * 8)
    ]
    settings = Settings(
        context=context, batch_size=rows, precision=o.precision, compile=o.compile, max_steps=10**6, spike=0.0
    )

    def trainer(name: str) -> Trainer:
        files.make_folder(o.work / name)  # steps are logged there
        model, (method, _, graph) = Mamba2LM(config, seed=0), name.partition("+")
        if method == "lora":
            add_lora(model, LoRAConfig(16, 32.0, 0.1))
        about = corpus if method == "train.py" else Answers(examples, examples[:2], words, run.ModelFiles())
        if method == "lora":
            about = Answers(examples, examples[:2], words, run.AdapterFiles("base", LoRAConfig(), "0"))
        return Trainer(model, about, dataclasses.replace(settings, graph=bool(graph)), o.work / name, o.device)

    graphs = [f"{method}+graph" for method in METHODS if o.device == "cuda" and not o.compile]
    return {name: trainer(name) for name in ("train.py", *METHODS, *graphs)}


def speed(row: str, o: Options) -> dict[str, Any]:
    """Tokens per second of steps by turns in one process; on a GPU the peak memory of a step of each, alone."""
    if row.startswith("large"):
        config, rows, context = (LARGE, 8, 2048) if not o.quick else (SMALL, 2, 128)
    else:
        config, rows, context = SMALL, 8, 256
    made = trainers(config, rows, context, o)
    memory: dict[str, int] = {}
    cuda = o.device == "cuda"
    for name, trainer in made.items():
        if trainer.settings.graph:  # keeps the memory of a pass for itself
            continue
        if row.startswith("large"):  # one at a time in memory
            for other in made.values():
                other.model.to("cpu" if other is not trainer else o.device)
                for state in other.optimizer.state.values():
                    for key, value in state.items():
                        state[key] = value.to("cpu" if other is not trainer else o.device)
            devices.release_memory(torch.device(o.device))
        trainer._step()
        trainer._step()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            trainer._step()
            torch.cuda.synchronize()
            memory[name] = torch.cuda.max_memory_allocated()
    for trainer in made.values():
        trainer.model.to(o.device)
        for state in trainer.optimizer.state.values():
            for key, value in state.items():
                state[key] = value.to(o.device)
    options = harness.Options(
        device=o.device, precision=o.precision, rounds=2 if o.quick else 7, threads=torch.get_num_threads()
    )
    steps = 5 if cuda else 1
    seconds = harness.take_turns(
        {name: lambda t=trainer: [t._step() for _ in range(steps)] for name, trainer in made.items()}, options
    )
    tokens = rows * context * steps
    ratios = {
        f"{name}_over_{other}": harness.spread([b / a for a, b in zip(seconds[name], seconds[other], strict=True)])[1]
        for name, other in (("full", "train.py"), ("lora", "full"), ("lora+graph", "full+graph"))
        if name in seconds
    }
    return {
        "row": row,
        "model": config.to_dict(),
        "batch": rows,
        "context": context,
        "tokens_per_second": {name: tokens / harness.spread(values)[1] for name, values in seconds.items()},
        "ratios": ratios,
        "peak_bytes": memory,
    }


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="the folder of the data sets")
    p.add_argument("--model", type=Path, default=Path("runs/stories"), metavar="RUN", help="the base")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    p.add_argument("--precision", choices=("float32", "bf16"), help="default: float32 on a CPU, bf16 on a GPU")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    p.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help=f"rows that hold one of these: {', '.join(ROWS)}"
    )
    p.add_argument("--quick", action="store_true", help="a few steps on a few records; the results go to --work")
    p.add_argument("--work", type=Path, default=Path("runs/after_training"), help="the fine-tuned runs")
    p.add_argument("--out", type=Path, help="the JSON (benchmarks/results/after_training-DEVICE.json)")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    devices.keep_freed_memory()
    precision = args.precision or harness.USUAL_PRECISION[args.device]
    usual = args.work / "quick.json" if args.quick else harness.RESULTS / f"after_training-{args.device}.json"
    o = Options(args.data, args.model, args.work, args.device, precision, args.compile, args.quick)
    out = args.out or usual
    result = files.load_json(out) if files.is_file(out) else {"rows": []}
    machine = harness.machine(harness.Options(device=args.device, threads=args.threads))
    for row in (row for row in ROWS if any(text in row for text in args.only)):
        if any(one["row"] == row for one in result["rows"]):
            print(f"{row} is there", flush=True)
            continue
        began = time.perf_counter()
        task, _, method = row.partition("/")
        one = speed(row, o) if task in ("speed", "large") else learn(task, method, o)
        one["seconds"] = time.perf_counter() - began
        result["rows"].append(one)
        files.make_folder(out.parent)
        about = {"benchmark": "after_training", "machine": machine, "versions": harness.versions()}
        files.save_json(out, {**about, "precision": precision, "compile": args.compile, "rows": result["rows"]})
        print(f"{time.strftime('%H:%M:%S')} {json.dumps(one)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
