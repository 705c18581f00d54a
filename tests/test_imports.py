"""The structure of the repository: imports go one way, files stay short, no model is named in the
compiler."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = [p for p in (ROOT / "tspc").rglob("*.py")]
PASSES, RUNTIME = list((ROOT / "passes").glob("*.py")), list((ROOT / "runtime").glob("*.py"))
TOGETHER = {
    "__init__.py",
    "capture.py",
    "source.py",
    "backend.py",
    "api.py",
    "check.py",
    "reference.py",
    "attended.py",
    "show.py",
    "report.py",
    "origin.py",
    "brute.py",
    "cli.py",
    "trainer.py",
}
MODELS = re.compile(r"llama|qwen|gpt|mistral|gemma|bert|falcon|mixtral|deepseek", re.I)


def imported(path: Path) -> set[str]:
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            out.add(node.module)
    return out


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CORE, ids=name)
def test_core_imports_no_pass_and_no_runtime(path: Path) -> None:
    if path.parent == ROOT / "tspc" and path.name in TOGETHER:
        return
    wrong = {m for m in imported(path) if m.startswith(("tspc.passes", "tspc.runtime"))}
    assert not wrong


@pytest.mark.parametrize("path", PASSES, ids=name)
def test_passes_import_the_core_only(path: Path) -> None:
    banned = ("tspc.runtime", "tspc.backend", "tspc.api", "tspc.capture", "torch.distributed")
    assert not {m for m in imported(path) if m.startswith(banned)}


@pytest.mark.parametrize("path", RUNTIME, ids=name)
def test_runtime_imports_the_core_only(path: Path) -> None:
    banned = ("tspc.passes", "tspc.backend", "tspc.api", "tspc.capture")
    assert not {m for m in imported(path) if m.startswith(banned)}


@pytest.mark.parametrize("path", [*CORE, *PASSES, *RUNTIME], ids=name)
def test_files_are_short_and_name_no_model(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert not MODELS.search(text), MODELS.search(text)
