"""The structure of the repository: folders import those below them, files stay short, no model is
named in the product."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# folder -> the folders that its files import; tspc: the files that stand beside the folders
FOLDERS = {
    "base": "",
    "seams": "",
    "masks": "base seams",
    "ir": "base seams",
    "factors": "base ir seams",
    "cost": "base ir",
    "ops": "base ir masks seams",
    "rules": "base factors ir masks ops",
    "passes.rewrite": "base ir masks ops rules seams",
    "passes.analyse": "base factors ir ops rules seams",
    "passes.lower": "base cost factors ir masks ops passes.analyse",
    "passes": "base cost factors ir ops passes.analyse passes.lower passes.rewrite seams",
    "runtime.comm": "base ir seams",
    "runtime.attention": "base ir masks ops runtime.comm seams",
    "runtime.lowering": "base ir ops seams",
    "runtime.fold": "cost ir ops runtime.attention runtime.comm runtime.lowering seams",
    "runtime.call": "base ir ops runtime.comm seams",
    "runtime.params": "base ir runtime.call runtime.comm seams",
    "runtime": "base ir ops runtime.attention runtime.comm runtime.fold seams",
    "frontend": "base ir masks ops passes passes.analyse passes.lower seams",
    "explain": "base cost ir masks ops passes passes.analyse passes.lower runtime.attention",
    "backend": "base explain factors frontend ir ops passes passes.analyse passes.lower runtime "
    "runtime.attention runtime.call runtime.comm runtime.fold runtime.lowering runtime.params "
    "seams",
    "tspc": "backend base cost explain factors frontend passes.lower runtime runtime.comm "
    "runtime.fold runtime.params seams",
}
FLOORS = 10  # folders in the longest chain of imports
LINES, ARGUMENTS = 60, 7  # of a function, at most
UNTYPED = 317  # lines with `Any`, at most: half of what there were
MODELS = re.compile(r"llama|qwen|gpt|mistral|gemma|bert|falcon|mixtral|deepseek", re.I)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module(path: Path) -> str:
    """As it is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "tspc" else ("tspc", *parts)
    return ".".join(parts).removesuffix(".__init__")


FILES = [
    p
    for folder in ("tspc", "passes", "runtime")
    for p in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in p.parts
]
MODULES = {module(p): p for p in FILES}


def folder(path: Path) -> str:
    parts = list(path.parent.relative_to(ROOT).parts)
    return ".".join(parts[1:] if parts[0] == "tspc" and len(parts) > 1 else parts)


def imported(path: Path) -> set[str]:
    """Modules of any library."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{a.name}" for a in node.names}
            out |= {m if m in MODULES else node.module for m in full}
    return out


def below(path: Path) -> set[str]:
    """The other folders of the product that a file imports."""
    return {folder(MODULES[m]) for m in imported(path) if m in MODULES} - {folder(path)}


@cache
def floor(of: str) -> int:
    return 1 + max(map(floor, FOLDERS[of].split()), default=0)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_imports_the_folders_below_its_own(path: Path) -> None:
    assert below(path) <= set(FOLDERS[folder(path)].split())


def test_folders_stand_on_few_floors_and_name_no_folder_in_vain() -> None:
    assert max(map(floor, FOLDERS)) <= FLOORS
    used = {f: set[str]() for f in FOLDERS}
    for path in FILES:
        used[folder(path)] |= below(path)
    assert used == {f: set(b.split()) for f, b in FOLDERS.items()}


@pytest.mark.parametrize("path", [p for p in FILES if "passes" in p.parts], ids=name)
def test_passes_know_no_process_group(path: Path) -> None:
    assert not {m for m in imported(path) if m.startswith("torch.distributed")}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_are_short_and_name_no_model(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert not MODELS.search(text), MODELS.search(text)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


@pytest.mark.parametrize("path", FILES, ids=name)
def test_functions_are_short_and_take_few_arguments(path: Path) -> None:
    for f in functions(path):
        assert f.end_lineno and f.end_lineno - f.lineno < LINES, f.name
        names = [a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)]
        assert len([n for n in names if n not in ("self", "cls")]) <= ARGUMENTS, f.name


def test_few_lines_leave_open_what_a_value_is() -> None:
    lines = [line for path in FILES for line in path.read_text().splitlines()]
    assert sum(bool(re.search(r"\bAny\b", line)) for line in lines) <= UNTYPED
