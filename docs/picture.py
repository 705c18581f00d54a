"""The pictures of docs/architecture.md, stages and folders: `python -m docs.picture`.

Stages are those of `PIPELINE`, each with its module; arrows between folders are the imports that
there are.
"""

from __future__ import annotations

import ast
import inspect
import re
from itertools import starmap
from pathlib import Path

from tests.test_imports import TOGETHER
from tspc.passes.pipeline import PIPELINE
from tspc.passes.runner import Pass

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEFORE = (("capture", "tspc/capture.py"),)
AFTER = (("lower", "runtime/inductor.py"),)
FOLDERS = ("front", "passes", "runtime", "core")


def stages() -> list[tuple[str, str]]:
    """(name, file), in order; a pass that is run again is named once."""
    passes = {p.name: file_of(p) for p in PIPELINE}
    return [*BEFORE, *passes.items(), *AFTER]


def file_of(step: Pass) -> str:
    """The module of its name, else that of the first function of another file that it calls."""
    for file in (f"passes/{step.name}.py", f"tspc/{step.name}.py"):
        if (ROOT / file).exists():
            return file
    called = filter(inspect.isfunction, inspect.getclosurevars(step.run).globals.values())
    files = [Path(inspect.getfile(fn)).resolve() for fn in called]
    return next(str(f.relative_to(ROOT)) for f in files if f.is_relative_to(ROOT))


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
