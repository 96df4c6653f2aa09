"""Runs tasks of the lm-evaluation-harness on a model, offline.

    python -m mamba2_min.evaluation.harness --model runs/mine                        # the bundled tasks
    python -m mamba2_min.evaluation.harness --model runs/mine --data my_documents    # tasks made from your documents
    python -m mamba2_min.evaluation.harness --model runs/mine --tasks lambada_openai hellaswag arc_easy
    python -m mamba2_min.evaluation.harness --model runs/mine --include my_tasks --tasks my_task

The bundled tasks: stories_cloze (the last word of a passage), stories_choice (which of four sentences comes next; 25%
by chance) and stories_perplexity. They are made from the documents that `train.py` keeps for validation, so that a
model trained on the bundled documents has not seen them. Nothing is downloaded: a task of the harness's own, such as
LAMBADA, runs where its data is in the cache of the package `datasets` on this machine; --include names a folder with
YAML files of tasks, whose `data_files` may be local.

Needs the extra: pip install "mamba2-min[eval]".
"""

from __future__ import annotations

import argparse
import difflib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba2_min import files
from mamba2_min.errors import UserError, run_script
from mamba2_min.flags import HelpFormatter, check_integers
from mamba2_min.printable import one_line

if TYPE_CHECKING:
    from mamba2_min.data.documents import Document

TASKS = Path(__file__).parent / "tasks"
KINDS = ("cloze", "choice", "perplexity")
BUNDLED = [f"stories_{kind}" for kind in KINDS]


def task_config(kind: str, name: str, data: Path) -> dict[str, Any]:
    """The harness's description of one of KINDS, read from its YAML file, for the items in `data`."""
    import yaml

    config = yaml.safe_load(files.read_text(TASKS / f"{kind}.yaml", 1 << 20))
    return {**config, "task": f"{name}_{kind}", "dataset_kwargs": {"data_files": {"test": str(data.resolve())}}}


def make_items(documents: Sequence[Document], source: str | Path, folder: Path, limit: int) -> dict[str, Path]:
    """Writes the items of each of KINDS, made from the held-out `documents` of `source`, and returns their files."""
    from mamba2_min.evaluation import task_files

    made = {
        "cloze": task_files.cloze(documents, limit),
        "choice": task_files.multiple_choice(documents, limit),
        "perplexity": [{"text": d.text} for d in documents][:limit],
    }
    for kind, items in made.items():
        if not items:
            raise UserError(f"{source} has too little text for the task {kind}: its validation part gives no item")
        task_files.write_items(folder / f"{kind}.jsonl", items)
    return {kind: folder / f"{kind}.jsonl" for kind in made}


def evaluate_tasks(
    model: Any, tasks: list[Any], include: str | None = None, limit: int | None = None
) -> dict[str, Any]:
    """The harness's results for a `Mamba2Eval`: {task: {metric: value}}. Nothing is downloaded.

    tasks: descriptions (`task_config`), or names: the harness's own, or those of the folder `include`.
    Raises UserError for a name that is none, and where a task's data is not on this machine.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    names = [task for task in tasks if isinstance(task, str)]
    manager = TaskManager(include_path=include, include_defaults=False)
    if set(names) - set(manager.all_tasks):
        manager = TaskManager(include_path=include)  # reads 14,000 files
    if unknown := [name for name in names if name not in manager.all_tasks]:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        raise UserError(f"there is no task {unknown[0]}" + (f"; near to it: {', '.join(near)}" if near else ""))
    try:
        found = lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=1000)
    except OSError as error:
        raise UserError(f"the data of {', '.join(names)} is not on this machine: {one_line(error)}") from error
    return found["results"]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mamba2_min.evaluation.harness", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a run's folder")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks of the harness or of --include (the bundled)")
    parser.add_argument("--data", metavar="DIR", help="make the tasks from the validation part of these documents")
    parser.add_argument("--encoding", metavar="NAME", help="how files that are not UTF-8 are encoded: cp1252, ...")
    parser.add_argument("--include", metavar="DIR", help="a folder with YAML files of tasks")
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many items per task")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="continuations at a time (%(default)s)")
    parser.add_argument("--out", metavar="FILE", help="write the results as JSON too")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps (%(default)s)")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    check_integers(args, limit=1, batch_size=1)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(offline)
        if not standard_tasks(args):  # those find their data in the user's own cache
            os.environ["HF_DATASETS_CACHE"] = cache
        try:
            import lm_eval  # noqa: F401
        except ImportError as error:
            raise UserError('the harness needs the package lm_eval: pip install "mamba2-min[eval]"') from error
        results = run(args, Path(cache))
    print(table(results))
    if args.out:
        files.save_json(args.out, results)
    return 0


def standard_tasks(args: argparse.Namespace) -> list[str]:
    """The tasks asked for that are not the bundled ones."""
    return [name for name in args.tasks or () if name not in BUNDLED]


def run(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    from mamba2_min import devices
    from mamba2_min.checkpoints import checkpoint
    from mamba2_min.data.tokenizer import WordTokenizer
    from mamba2_min.evaluation.held_out import held_out
    from mamba2_min.evaluation.lm_eval_model import Mamba2Eval
    from mamba2_min.models.mamba2 import Mamba2LM

    model = Mamba2LM.from_pretrained(args.model).to(devices.pick_device(args.device))
    tokenizer = WordTokenizer.load(Path(args.model) / checkpoint.TOKENIZER)
    if args.include is not None and not files.is_folder(args.include):
        raise UserError(f"--include: {args.include} is not a folder")
    if args.data is not None:
        documents = held_out([args.model], args.data, args.encoding)
        made = make_items(documents, args.data, scratch / "items", args.limit or 200)
        tasks: list[Any] = [task_config(kind, "documents", path) for kind, path in made.items()]
    elif args.include:
        tasks = args.tasks or []
        if not tasks:
            raise UserError("--include needs --tasks: the names of the tasks to run")
    else:
        chosen = args.tasks or BUNDLED
        tasks = [task_config(kind, "stories", TASKS / f"{kind}.jsonl") for kind in KINDS if f"stories_{kind}" in chosen]
        tasks += standard_tasks(args)
    return evaluate_tasks(Mamba2Eval(model, tokenizer, args.batch_size), tasks, args.include, args.limit)


def table(results: dict[str, Any]) -> str:
    """A line per task and metric, with its standard error where there is one."""
    lines = []
    for task, metrics in sorted(results.items()):
        for key, value in metrics.items():
            name, _, rest = key.partition(",")
            if not isinstance(value, (int, float)) or name.endswith("_stderr") or name in ("alias", "sample_len"):
                continue
            error = metrics.get(f"{name}_stderr,{rest}")
            shown = f" ± {error:.4f}" if isinstance(error, (int, float)) else ""
            lines.append(f"{task:<24} {name:<18} {value:>12.4f}{shown}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
