"""A wheel, built and installed into an environment of its own, works from any folder and carries its data files."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from mamba2_min import Mamba2Config, Mamba2LM, WordTokenizer

ROOT = Path(__file__).parent.parent

USE = """
import sys
from pathlib import Path

import mamba2_min
from mamba2_min import Completer, Mamba2LM, Sampler

assert Path(sys.prefix) in Path(mamba2_min.__file__).parents, mamba2_min.__file__
model = Mamba2LM.from_pretrained(sys.argv[1])
assert len(list(model.generate([0], 5, temperature=0))) == 5
completer = Completer.load(sys.argv[1])
assert isinstance("".join(completer.complete("The cat", 8, Sampler(seed=1))), str)

from mamba2_min.datagen.builtin import KINDS
from mamba2_min.datagen.kinds import compose
assert compose(KINDS["stories"], 0, 0)
print("works")
"""


def run(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=240, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", minversion="70.1", reason="building a wheel needs setuptools of the extra [dev]")
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in run("git", "ls-files", "mamba2_min", "pyproject.toml", "README.md", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():  # a copy, so that building leaves nothing in the project's folder
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", folder, source)
    return next(folder.glob("*.whl"))


def test_the_wheel_has_every_file_of_the_package(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("mamba2_min/")}
    tracked = set(run("git", "ls-files", "mamba2_min", cwd=ROOT).splitlines())
    assert inside == {name for name in tracked if (ROOT / name).is_file()}


def test_it_imports_loads_a_run_and_generates_in_an_environment_of_its_own(wheel, tmp_path):
    tokenizer = WordTokenizer.train(["The cat sat on the mat. The dog sat on the cat."], vocab_size=300)
    model = Mamba2LM(Mamba2Config(len(tokenizer), d_model=16, n_layer=1, d_state=4, headdim=8), seed=0)
    model.save_pretrained(tmp_path / "run")
    tokenizer.save(tmp_path / "run" / "tokenizer.json")

    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    installed = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    install = ["install", "--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", "--target", installed]
    run(sys.executable, "-m", "pip", *install, wheel)
    # torch and the others come from this environment. A folder that a .pth file names has no .pth files of its own, so
    # an editable install of the project there is not seen.
    (installed / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    assert run(python, "-c", USE, tmp_path / "run", cwd=tmp_path, env=clean).strip() == "works"
