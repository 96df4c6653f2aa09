"""The house: imports run downwards only, nothing goes in a circle, and `--help` stays free of torch."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mamba2_min

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mamba2_min"

# From the top floor to the ground. A module may import from its own floor and from those below.
FLOORS = ["finetune", "training", "evaluation", "inference", "models", "datagen", "checkpoints", "ssd", "data", "ops"]


def modules():
    """{dotted name: path} of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path, name):
    """Every module of the package that `path` imports, at its top or inside a function; not what is for types only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test).endswith("TYPE_CHECKING")
        for statement in test.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "mamba2_min")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import; all are absolute here"
            if node.module and node.module.split(".")[0] == "mamba2_min":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in MODULES else node.module


GRAPH = {name: sorted(set(imports(path, name)) - {name}) for name, path in MODULES.items()}


def floor(name):
    parts = name.split(".")
    if len(parts) == 1:
        return -1  # the package itself, which offers everything
    if parts[1] in FLOORS:
        return FLOORS.index(parts[1])
    path = MODULES[name]
    has_command = '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    return -1 if has_command else len(FLOORS)  # `python -m mamba2_min.NAME` on top, what all share on the ground


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downwards(name):
    upwards = [other for other in GRAPH[name] if floor(other) < floor(name)]
    assert not upwards, f"{name} is below what it imports: {upwards}"


def test_no_circle():
    """Module by module: a circle inside one folder counts too. A package's `__init__` is one of its modules."""
    state = {}

    def visit(name, trail):
        if state.get(name) == "done":
            return
        assert state.get(name) != "open", f"a circle: {' -> '.join([*trail[trail.index(name) :], name])}"
        state[name] = "open"
        for other in GRAPH[name]:
            if other != "mamba2_min":
                visit(other, [*trail, name])
        state[name] = "done"

    for name in GRAPH:
        visit(name, [])


def test_every_folder_has_a_floor():
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert folders <= set(FLOORS), f"no floor is given for {folders - set(FLOORS)}"


def test_files_and_classes_are_of_a_size_that_one_reads():
    for path in [*MODULES.values(), *ROOT.glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 420, f"{path.name} has more than 420 lines"
        for node in ast.walk(ast.parse(text)):
            lines = node.end_lineno - node.lineno + 1 if isinstance(node, ast.ClassDef) else 0
            assert lines <= 200, f"{node.name} in {path.name} has {lines} lines, more than 200"
    for command in ("run.py", "train.py"):
        assert (ROOT / command).read_text(encoding="utf-8").count("\n") < 170, f"{command} has 170 lines or more"


def test_the_first_evening_is_short():
    """What docs call the first evening: the scan, its time scales, the config, the network, the loss's definition."""
    files = ["ssd/plain.py", "ssd/hippo.py", "config.py", "models/mamba2.py"]
    lines = sum((PACKAGE / name).read_text(encoding="utf-8").count("\n") for name in files)
    loss = ast.parse((PACKAGE / "ops" / "loss.py").read_text(encoding="utf-8"))
    (definition,) = (n for n in ast.walk(loss) if isinstance(n, ast.FunctionDef) and n.name == "cross_entropy")
    assert lines + definition.end_lineno - definition.lineno + 1 <= 750


@pytest.mark.parametrize("name", mamba2_min.__all__)
def test_every_name_of_the_interface_is_there(name):
    assert getattr(mamba2_min, name) is not None and name in dir(mamba2_min)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Mamba3LM'"):
        mamba2_min.Mamba3LM  # noqa: B018
    with pytest.raises(ImportError):
        from mamba2_min import Mamba3LM  # noqa: F401


COMMANDS = [["train.py"], ["run.py"], ["data_generator.py"]] + [
    ["-m", name] for name, path in MODULES.items() if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_is_free_of_torch(command):
    """Read from what Python says that it imports, for `--help` has to answer at once."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0 and "usage:" in run.stdout
    loaded = {line.split("|")[-1].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    assert not loaded & {"torch", "matplotlib", "ollama", "transformers"}


def test_no_import_of_ours_imports_the_compiler():
    """torch._dynamo takes over a second, and brings Triton: `run.py` would wait for it at each start."""
    program = (
        "import sys, mamba2_min.training.trainer, mamba2_min.inference.completer; print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("own", [None, "ACTIVE"])
def test_threads_sleep_while_they_wait_unless_the_user_wants_otherwise(own):
    """PyTorch's threads read the variable once, when torch is imported."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {"OMP_WAIT_POLICY": own} if own else {}
    script = "import os, sys, mamba2_min; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.stdout.split() == ["False", own or "PASSIVE"], done.stderr
