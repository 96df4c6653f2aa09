"""Runs the notebooks from scratch, top to bottom, and fails when a cell, an assert or a solution fails.

    python notebooks/run_all.py                 all of them; nothing is written
    python notebooks/run_all.py 01 03           those whose names begin so
    python notebooks/run_all.py --write         and keep the new outputs, of those that passed

Each notebook gets a fresh kernel of this Python, needs no network, and sees the package of this checkout. After its
own cells, the Python in its folded solutions is run as well, in the same kernel; nothing of that is written.

What a notebook here looks like (`tests/test_notebooks.py` checks it):

- The first cell: a title, **Aim.** in two lines, **Prerequisites.**, **Run time.** on two cores, under 3 minutes,
  **Symbols.** in one paragraph.
- One idea per section: the claim in words, the formula, a cell that shows it, an `assert` that fails if it is wrong.
- No code cell above 25 lines, and a picture for every third. Drawing code is in drawings/, in the style of
  `plots.use_notebook_style()`: one message per picture, said in the sentence before or after it.
- Code is imported from `mamba2_min`, never copied; seeds are fixed; a time is compared, never asserted to the second.
- A "## Summary", then "## Exercises", three or more of "### Exercise": an empty cell (`answer = ...`), a cell that
  checks it (exercises.py), and the solution in <details>, code in ```python.
- Outputs are committed: no errors, no absolute paths, under 1 MB.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def solutions(notebook) -> list[str]:
    """The Python in the <details> of a notebook's markdown cells, in order."""
    folded = [
        block
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for block in re.findall(r"<details>(.*?)</details>", cell.source, re.DOTALL)
    ]
    return [code for block in folded for code in re.findall(r"^```python\n(.*?)^```", block, re.DOTALL | re.MULTILINE)]


def run(path: Path, timeout: int = 600, write: bool = False) -> float:
    """Executes one notebook and then its solutions; returns the seconds of its own cells.

    Raises nbclient's CellExecutionError where a cell raises, CellTimeoutError where one takes over `timeout` seconds.
    """
    import nbformat
    from nbclient import NotebookClient
    from traitlets.config import Config

    notebook = nbformat.read(path, as_version=4)
    answers = [nbformat.v4.new_code_cell(code) for code in solutions(notebook)]
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    with tempfile.TemporaryDirectory() as sockets:
        # Sockets in the file system, where there are such: two runs at once cannot take each other's ports.
        manager = {} if os.name == "nt" else {"transport": "ipc", "ip": os.path.join(sockets, "kernel")}
        client = NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name="python3",
            resources={"metadata": {"path": HERE}},
            record_timing=False,
            config=Config({"KernelManager": manager}),
        )
        client.reset_execution_trackers()
        with client.setup_kernel(env=_environment()):
            start = time.perf_counter()
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index)
            seconds = time.perf_counter() - start
            own = list(notebook.cells)
            for cell in answers:
                notebook.cells.append(cell)
                client.execute_cell(cell, len(notebook.cells) - 1)
    notebook.cells = own
    if write:
        notebook.metadata = {  # nothing of the machine that it ran on
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
        nbformat.validate(notebook)
        path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    return seconds


def _environment() -> dict[str, str]:
    """That of a kernel, whose threads sleep while they wait. The notebooks import torch before mamba2_min, which would
    see to that. Threads that spin hold each other up on a busy machine: two minutes became half an hour.
    """
    inherited = os.environ.get("PYTHONPATH")
    path = str(ROOT) + (os.pathsep + inherited if inherited else "")
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": path}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the notebooks from scratch; fail when a cell or an assert fails.")
    parser.add_argument("names", nargs="*", help="beginnings of file names, such as 01; all if none")
    parser.add_argument("--write", action="store_true", help="keep the outputs of the notebooks that passed")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that one cell may take (default: 600)")
    options = parser.parse_args(arguments)
    try:
        import ipykernel  # noqa: F401
        from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    except ImportError:
        print("the notebooks need nbclient and ipykernel: pip install 'mamba2-min[notebooks]'", file=sys.stderr)
        return 2
    paths = [p for p in sorted(HERE.glob("*.ipynb")) if not options.names or p.name.startswith(tuple(options.names))]
    if not paths:
        print(f"no notebook begins with {' or '.join(options.names) or 'anything'}", file=sys.stderr)
        return 2
    failed, total = [], 0.0
    for path in paths:
        print(f"{path.name:32}", end="", flush=True)
        start = time.perf_counter()
        try:
            seconds = run(path, options.timeout, options.write)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            failed.append(path.name)
            print(f"FAILED after {time.perf_counter() - start:.1f} s\n{_COLOUR.sub('', str(error))}\n", flush=True)
        else:
            total += seconds
            print(f"{seconds:7.1f} s", flush=True)
    print(f"{'total':32}{total:7.1f} s")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
