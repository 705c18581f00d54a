"""What is remembered beyond a call stands in one list, with how long."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import tspc
from tspc.base.state import (
    CALL,
    CODE,
    GROUP,
    MODEL,
    PROCESS,
    REGISTRIES,
    Registry,
    remembered,
    reset,
)

ROOT = Path(__file__).parents[3]
FILES = [p for folder in ("tspc", "passes", "runtime") for p in (ROOT / folder).rglob("*.py")]
CONTAINERS = ("dict", "list", "set", "defaultdict", "deque", "local", "OrderedDict")
WRITES = ("append", "add", "update", "clear", "pop", "setdefault", "extend", "remove", "insert")


def containers(tree: ast.Module) -> dict[str, ast.expr]:
    """Names of a module that hold a container which can change."""
    out: dict[str, ast.expr] = {}
    for n in tree.body:
        targets = n.targets if isinstance(n, ast.Assign) else [getattr(n, "target", None)]
        value = getattr(n, "value", None)
        called = getattr(value, "func", None)
        name = getattr(called, "id", getattr(called, "attr", ""))
        literal = isinstance(value, (ast.Dict, ast.List, ast.Set))
        if literal or name in CONTAINERS or name.startswith("Weak"):
            out |= {t.id: value for t in targets if isinstance(t, ast.Name) and value is not None}
    return out


def changed(tree: ast.Module) -> set[str]:
    """Names that something is written into."""
    out = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in WRITES:
            out.add(getattr(n.func.value, "id", ""))
        targets = n.targets if isinstance(n, (ast.Assign, ast.Delete)) else []
        targets += [n.target] if isinstance(n, ast.AugAssign) else []
        out |= {getattr(t.value, "id", "") for t in targets if isinstance(t, ast.Subscript)}
    return out


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_has_a_container_of_its_own(path: Path) -> None:
    if path.name == "state.py":
        return
    tree = ast.parse(path.read_text())
    assert not containers(tree).keys() & changed(tree)


def test_the_search_finds_one() -> None:
    text = "A = {}\nB = [1]\nC = WeakSet()\nD = []\ndef f():\n  A[1] = 2\n  D.append(1)\n"
    tree = ast.parse(text)
    assert containers(tree).keys() & changed(tree) == {"A", "D"}


def test_each_is_known_with_its_module() -> None:
    for m in pkgutil.walk_packages(tspc.__path__, "tspc."):
        importlib.import_module(m.name)
    places = [(r.module, id(r.what)) for r in REGISTRIES]
    assert len(set(places)) == len(places) > 30
    for r in REGISTRIES:
        module = importlib.import_module(r.module)
        assert any(x is r.what for x in vars(module).values()), r.module
    assert {r.lifetime for r in REGISTRIES} == {CODE, PROCESS, GROUP, MODEL, CALL}


def test_reset_empties_what_a_run_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    of_code, of_group, of_call = {1: 2}, [3], {4}
    kinds = (CODE, of_code), (GROUP, of_group), (CALL, of_call)
    monkeypatch.setattr("tspc.base.state.REGISTRIES", [Registry("here", k, x) for k, x in kinds])
    reset(GROUP)
    assert (of_code, of_group, of_call) == ({1: 2}, [], {4})
    reset()
    assert (of_code, of_group, of_call) == ({1: 2}, [], set())


def test_what_is_remembered_is_the_same_and_known_by_its_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known_here: list[Registry] = []
    monkeypatch.setattr("tspc.base.state.REGISTRIES", known_here)
    held: list[int] = []
    assert remembered(CALL, held) is held
    assert known_here == [Registry(__name__, CALL, held)]
