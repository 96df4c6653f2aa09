"""docs/promises.md and docs/interop.md: every test that they name is there, and so is every file that they link to."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("promises.md", "interop.md"))


def names_of_tests():
    for path in (ROOT / "tests").glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield node.name


def test_every_test_that_is_named_is_there():
    there = set(names_of_tests())
    named = re.findall(r"`(test_\w+|Test\w+)(…?)`", TEXT)
    assert len(named) > 80
    for name, more in named:
        found = any(one.startswith(name) for one in there) if more else name in there
        assert found, f"there is no {name}"


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) > 10
    for link in links:
        assert (ROOT / "docs" / link).exists(), link
    for module in re.findall(r"(?:^|[\s;|,])(test_\w+) `", TEXT):
        assert (ROOT / "tests" / f"{module}.py").exists(), module


SOURCES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("*.py"), *(ROOT / "mamba2_min").rglob("*.py")]


def test_every_page_that_is_named_is_there():
    """By the documents, by messages and by comments: a new user goes where an error points."""
    named = {}
    for path in SOURCES:
        for page in re.findall(r"\bdocs/([\w-]+\.md)\b", path.read_text(encoding="utf-8")):
            named.setdefault(page, path.name)
    assert {"preparing_documents.md", "promises.md", "LOG.md"} <= named.keys()
    missing = {page: where for page, where in named.items() if not (ROOT / "docs" / page).is_file()}
    assert not missing


def test_every_link_of_a_page_leads_somewhere():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert "://" in link or (path.parent / link).exists(), f"{path.name}: {link}"
