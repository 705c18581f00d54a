"""The pictures of docs/architecture.md, stages and folders: `python -m docs.picture`.

Stages are what the pipeline says while a small model is planned, each with the module of its name,
else the one that it enters; arrows between folders are the imports that there are.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
import sys
from collections.abc import Iterator
from itertools import starmap
from pathlib import Path
from types import FrameType
from unittest import mock

import torch

import tspc
from tests.test_imports import TOGETHER

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEFORE = (("capture", "tspc/capture.py"),)
AFTER = (("localize", "passes/localize.py"), ("lower", "runtime/inductor.py"))
FOLDERS = ("front", "passes", "runtime", "core")


class Small(torch.nn.Module):
    """Tokens, a region and a loss: it passes through every stage."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(8, 4)
        self.up, self.down = torch.nn.Linear(4, 16), torch.nn.Linear(16, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.words(tokens)).relu()).square().mean()


def stages() -> list[tuple[str, str]]:
    """(name, file that it enters), in order."""
    pipeline = importlib.import_module("tspc.passes.pipeline")
    during, out = pipeline._during, dict(BEFORE)

    @contextlib.contextmanager
    def recorded(name: str) -> Iterator[None]:
        def enter(frame: FrameType, event: str, arg: object) -> None:
            path = Path(frame.f_code.co_filename).resolve()
            if event == "call" and path.is_relative_to(ROOT) and path.name != "pipeline.py":
                sys.setprofile(None)
                out.setdefault(name, str(path.relative_to(ROOT)))

        with during(name):
            sys.setprofile(enter)
            try:
                yield
            finally:
                sys.setprofile(None)

    with mock.patch.object(pipeline, "_during", recorded):
        tspc.plan(Small(), (torch.zeros(2, 8, dtype=torch.long),), ranks=2)
    own = {name: f"passes/{name}.py" for name in out}
    named = [(n, own[n] if (ROOT / own[n]).exists() else file) for n, file in out.items()]
    return [*named, *AFTER]


def purpose(file: str) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse((ROOT / file).read_text())) or ""
    sentence = re.split(r"\.(?:\s|$)", " ".join(text.split("\n\n")[0].split()))[0]
    return re.sub(r" \(docs/design\.md[^)]*\)", "", sentence).replace("|", "\\|")


def folder(path: Path) -> str:
    """Of a module of the product: the front puts core, passes and runtime together."""
    name = path.relative_to(ROOT).parts[0]
    return name if name != "tspc" else "front" if path.name in TOGETHER else "core"


def arrows() -> dict[tuple[str, str], set[str]]:
    """(folder, folder that it imports) -> the modules that are imported."""
    files = [*(ROOT / "tspc").glob("*.py"), *(ROOT / "tspc/rules").glob("*.py")]
    files += [*(ROOT / "passes").glob("*.py"), *(ROOT / "runtime").glob("*.py")]
    out: dict[tuple[str, str], set[str]] = {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{a.name}" for a in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] != "tspc" or len(parts) < 2:
                    continue
                to = parts[1] if parts[1] in FOLDERS else folder(ROOT / "tspc" / f"{parts[1]}.py")
                if to != folder(path):
                    out.setdefault((folder(path), to), set()).add(parts[1])
    return out


def arrow(ends: tuple[str, str], modules: set[str]) -> str:
    """Labelled where it is for one module alone."""
    label = f"|{min(modules)}|" if len(modules) == 1 and ends[1] not in modules else ""
    return f"  {ends[0]} -->{label} {ends[1]}"


def text() -> str:
    """What stands between the markers of the page."""
    rows = stages()
    steps = " --> ".join(name for name, _ in rows)
    table = [f"| {name} | `{file}` | {purpose(file)} |" for name, file in rows]
    lines = ["```mermaid", "flowchart LR", f"  {steps}", "```", ""]
    lines += ["| stage | file | what it does |", "| --- | --- | --- |", *table, ""]
    lines += ["```mermaid", "flowchart TD", *starmap(arrow, sorted(arrows().items())), "```"]
    return "\n".join(lines)


def page(before: str) -> str:
    """The page with the pictures as they are now."""
    begin, end = "<!-- made by python -m docs.picture -->\n", "<!-- end -->"
    head, tail = before.split(begin)
    return f"{head}{begin}{text()}\n{end}{tail.split(end, 1)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
