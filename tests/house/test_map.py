"""The tests are a map of the product: the test of a module stands at the module's path below
`tests/`, and imports it; no file stands at a path where no module is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.house.test_imports import FILES, ROOT, imported, module, name

TESTS = ROOT / "tests"


def only_gathers(path: Path) -> bool:
    """An `__init__` of imports and the names that they bring, or of nothing."""
    if path.name != "__init__.py":
        return False
    body = ast.parse(path.read_text()).body
    kinds = (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)
    return all(isinstance(n, kinds) for n in body)


MODULES = [p for p in FILES if not only_gathers(p)]


def mirrored(path: Path) -> Path:
    """Where the test of a module stands."""
    there = path.relative_to(ROOT)
    return TESTS / there.parent / f"test_{there.name}"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_module_has_a_test_at_its_path_that_imports_it(path: Path) -> None:
    assert mirrored(path).exists(), f"{name(mirrored(path))} is missing"
    assert module(path) in imported(mirrored(path))
    functions = ast.walk(ast.parse(mirrored(path).read_text()))
    assert any(getattr(n, "name", "").startswith("test_") for n in functions)


def test_no_test_stands_where_no_module_is() -> None:
    there = {mirrored(p) for p in MODULES}
    folders = [TESTS / n for n in ("tspc", "passes", "runtime")]
    assert {p for f in folders for p in f.rglob("test_*.py")} == there


def test_folders_are_packages() -> None:
    """Names of files may repeat, and processes import helpers by name."""
    for path in TESTS.rglob("*.py"):
        assert (path.parent / "__init__.py").exists(), name(path)
