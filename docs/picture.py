"""The pictures of docs/architecture.md, stages and folders: `python -m docs.picture`.

Stages are those of `PIPELINE`, each with its module; arrows between folders are the imports that
there are.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from tests.house.test_imports import FOLDERS
from tspc.passes.pipeline import PIPELINE
from tspc.passes.runner import Pass

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEFORE = (("capture", "tspc/frontend/capture.py"),)
ROOTS = ("passes", "runtime")  # the folders that stand beside tspc/
AFTER = (("lower", "runtime/lowering/inductor.py"),)


def stages() -> list[tuple[str, str]]:
    """(name, file), in order; a pass that is run again is named once."""
    passes = {p.name: file_of(p) for p in PIPELINE}
    return [*BEFORE, *passes.items(), *AFTER]


def file_of(step: Pass) -> str:
    """The module of its name, else that of the first function of another file that it calls."""
    for file in (*ROOT.glob(f"passes/*/{step.name}.py"), *ROOT.glob(f"tspc/*/{step.name}.py")):
        return str(file.relative_to(ROOT))
    called = filter(inspect.isfunction, inspect.getclosurevars(step.run).globals.values())
    files = [Path(inspect.getfile(fn)).resolve() for fn in called]
    return next(str(f.relative_to(ROOT)) for f in files if f.is_relative_to(ROOT))


def purpose(file: str) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse((ROOT / file).read_text())) or ""
    sentence = re.split(r"\.(?:\s|$)", " ".join(text.split("\n\n")[0].split()))[0]
    return re.sub(r" \(docs/design\.md[^)]*\)", "", sentence).replace("|", "\\|")


def arrows() -> list[str]:
    """Between folders, as the table of `tests/house/test_imports.py` has them, but for those that
    others imply."""
    below = {f: set(names.split()) for f, names in FOLDERS.items()}
    further: dict[str, set[str]] = {}
    for f in below:  # those below come first
        further[f] = set().union(*(below[g] | further[g] for g in below[f]))
    return [f"  {f} --> {g}" for f in below for g in sorted(below[f] - further[f])]


def folders() -> list[str]:
    """What belongs where, as the folders themselves say it."""
    paths = {
        f: ROOT / (f.replace(".", "/") if f.startswith(ROOTS) else f"tspc/{f}") for f in FOLDERS
    }
    files = [(p.relative_to(ROOT), p / "__init__.py") for f, p in paths.items() if f != "tspc"]
    return [f"| `{p}/` | {ast.get_docstring(ast.parse(file.read_text()))} |" for p, file in files]


def text() -> str:
    """What stands between the markers of the page."""
    rows = stages()
    steps = " --> ".join(name for name, _ in rows)
    table = [f"| {name} | `{file}` | {purpose(file)} |" for name, file in rows]
    lines = ["```mermaid", "flowchart LR", f"  {steps}", "```", ""]
    lines += ["| stage | file | what it does |", "| --- | --- | --- |", *table, ""]
    lines += ["| folder | what belongs there |", "| --- | --- |", *folders(), ""]
    lines += ["```mermaid", "flowchart BT", *arrows(), "```"]
    return "\n".join(lines)


def page(before: str) -> str:
    """The page with the pictures as they are now."""
    begin, end = "<!-- made by python -m docs.picture -->\n", "<!-- end -->"
    head, tail = before.split(begin)
    return f"{head}{begin}{text()}\n{end}{tail.split(end, 1)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
