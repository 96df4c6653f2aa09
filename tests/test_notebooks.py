"""The notebooks keep the form that their readers rely on; the full run, which is slow, keeps them true."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the extra [notebooks] is not installed")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

spec = importlib.util.spec_from_file_location("run_all", ROOT / "notebooks" / "run_all.py")
run_all = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_all)

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_of(notebook):
    """The Python of all code cells and solutions, one string each; IPython's % lines left out."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return [re.sub(r"^%.*$", "", code, flags=re.MULTILINE) for code in (*cells, *run_all.solutions(notebook))]


def classes(code):
    return {node.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ClassDef)}


def test_there_are_notebooks_and_the_table_lists_each_in_order():
    table = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\]\((\w+\.ipynb)\)", table)
    assert NOTEBOOKS and list(dict.fromkeys(listed)) == [path.name for path in NOTEBOOKS]


def test_pictures_of_the_table_exist_and_are_small():
    table = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    pictures = [ROOT / "notebooks" / name for name in re.findall(r"images/[\w.]+", table)]
    assert len(pictures) == len(NOTEBOOKS)
    assert all(picture.stat().st_size < 80_000 for picture in pictures)


@each
def test_is_valid_and_under_a_megabyte(path):
    nbformat.validate(read(path))
    assert path.stat().st_size < 1_000_000


@each
def test_says_first_what_it_is_for_what_it_needs_and_how_long_it_takes(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    aim = re.search(r"^\*\*Aim\.\*\*.*?(?=\n\n)", first.source, re.MULTILINE | re.DOTALL)
    assert aim and aim[0].count("\n") <= 1
    assert re.search(r"^\*\*Prerequisites\.\*\* \S", first.source, re.MULTILINE)
    assert re.search(r"^\*\*Run time\.\*\* .*(second|minute).*two CPU cores", first.source, re.MULTILINE)


@each
def test_has_three_exercises_with_folded_solutions_that_run(path):
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    exercises = re.split(r"^### Exercise ", text.partition("\n## Exercises")[2], flags=re.MULTILINE)[1:]
    assert len(exercises) >= 3
    for exercise in exercises:
        # the blank line after <summary> is what makes GitHub and Jupyter read the rest as Markdown
        fold = r"<details><summary>Solution</summary>\n\n.*^```python\n.*?assert.*</details>"
        assert re.search(fold, exercise, re.DOTALL | re.MULTILINE)


@each
def test_was_run_from_top_to_bottom_without_an_error(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


@each
def test_checks_its_claims_and_fixes_its_seeds(path):
    code = "\n".join(code_of(read(path)))
    assert code.count("assert") >= 10
    assert "seed" in code


@each
def test_copies_no_class_of_the_package(path):
    package = [file.read_text(encoding="utf-8") for file in (ROOT / "mamba2_min").rglob("*.py")]
    owned = set().union(*map(classes, package))
    assert not owned & set().union(*map(classes, code_of(read(path))))


@each
def test_tells_nothing_of_the_machine_that_it_ran_on(path):
    text = path.read_text(encoding="utf-8")
    assert str(ROOT) not in text and str(Path.home()) + "/" not in text
    assert not re.search(r"/tmp/|/home/|/Users/|site-packages", text)


def body_of(notebook):
    """The cells before the exercises."""
    texts = [cell.cell_type == "markdown" and "## Exercises" in cell.source for cell in notebook.cells]
    return notebook.cells[: texts.index(True) + 1]


@each
def test_no_cell_is_long_and_every_third_is_a_picture(path):
    cells = [cell for cell in body_of(read(path)) if cell.cell_type == "code"]
    assert max(cell.source.count("\n") + 1 for cell in cells) <= 25
    pictures = sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert 3 * pictures >= len(cells) - 3  # the imports, and two more to round up


@each
def test_every_exercise_has_an_empty_cell_a_check_and_a_solution(path):
    cells = read(path).cells
    starts = [k for k, cell in enumerate(cells) if cell.cell_type == "markdown" and "### Exercise " in cell.source]
    for start in starts:
        rest = cells[start + 1 :]
        fold = next(k for k, cell in enumerate(rest) if "<details>" in cell.source)
        code = [cell.source for cell in rest[:fold]]
        assert any(re.search(r"^\w+ = \.\.\.  # ", source, re.MULTILINE) for source in code)
        assert re.search(r"^check\(", code[-1], re.MULTILINE)


@each
def test_names_its_symbols_and_ends_with_a_summary(path):
    cells = read(path).cells
    assert re.search(r"^\*\*Symbols\.\*\* \S", cells[0].source, re.MULTILINE)
    assert any(re.search(r"^## (Summary|What you have now)", cell.source, re.MULTILINE) for cell in cells)


@each
def test_links_lead_somewhere(path):
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 3
    for link in links:
        target, _, anchor = link.partition("#")
        if not target:
            assert f'<a id="{anchor}"></a>' in text, link
        elif not target.startswith("https://"):
            assert (path.parent / target).exists(), link


def test_solutions_are_found_in_folds_only():
    fold = "<details><summary>Solution</summary>\n\nWhy.\n\n```python\nx = 1\n```\n\n```text\nno\n```\n\n</details>"
    cells = [nbformat.v4.new_markdown_cell(fold), nbformat.v4.new_markdown_cell("```python\ny = 2\n```")]
    assert run_all.solutions(nbformat.v4.new_notebook(cells=cells)) == ["x = 1\n"]


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["assert 1 == 2", "undefined"])
def test_a_cell_or_a_solution_that_fails_is_a_failure(tmp_path, broken):
    pytest.importorskip("ipykernel")
    from nbclient.exceptions import CellExecutionError

    fold = f"<details><summary>Solution</summary>\n\n```python\n{broken}\n```\n\n</details>"
    for cell in (nbformat.v4.new_code_cell(broken), nbformat.v4.new_markdown_cell(fold)):
        path = tmp_path / "broken.ipynb"
        path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=[cell])), encoding="utf-8")
        before = path.read_bytes()
        with pytest.raises(CellExecutionError):
            run_all.run(path, write=True)
        assert path.read_bytes() == before


@pytest.mark.slow
@each
def test_runs_from_scratch(path):
    pytest.importorskip("ipykernel")
    before = path.read_bytes()
    run_all.run(path)
    assert path.read_bytes() == before


def test_a_kernel_lets_threads_sleep_while_they_wait_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert run_all._environment()["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert run_all._environment()["OMP_WAIT_POLICY"] == "ACTIVE"
