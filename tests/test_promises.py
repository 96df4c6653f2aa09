"""docs/promises.md: every test that it names is there, and so is every file that it links to."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")


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
