"""Passes from text to text: a file of `tests/golden/passes/` has a program, an arrow, and the
program after the pass of its folder; `--update-golden` writes what stands after the arrow anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from tspc.ir.program import Program
from tspc.passes.lower.unit import Unit
from tspc.passes.pipeline import PIPELINE
from tspc.passes.runner import run

FOLDER = Path(__file__).parents[1] / "golden" / "passes"
FILES = sorted(FOLDER.glob("*/*.txt"))
ARROW = "\n=>\n"
# what must have been decided of the program first; other passes read the program alone
BEFORE = {
    "outputs": ("factorize",),
    "windows": ("factorize",),
    "fold": ("factorize", "choose"),
    "propagate": ("factorize", "choose", "fold"),
}
BY_NAME = {p.name: p for p in PIPELINE}


def cases(*names: str) -> pytest.MarkDecorator:
    """A test with an argument `path`, of each file of these passes, or of all."""
    paths = [p for p in FILES if not names or p.parent.name in names]
    return pytest.mark.parametrize("path", paths, ids=lambda p: f"{p.parent.name}-{p.stem}")


def rewritten(name: str, text: str) -> str:
    program = Program.parse(text)
    steps = [BY_NAME[n] for n in (*BEFORE.get(name, ()), name)]
    return str(run(steps, Unit(program, tuple(program.symbols), ranks=2)).program)


def check(path: Path, request: pytest.FixtureRequest) -> None:
    """The pass makes of the program before the arrow the one after it."""
    before, _, after = path.read_text().rstrip("\n").partition(ARROW)
    text = rewritten(path.parent.name, before)
    if request.config.getoption("--update-golden"):
        path.write_text(f"{before}{ARROW}{text}\n")
        after = text
    assert text == after
    assert text != before, "the pass has nothing to do here"
    assert str(Program.parse(before)) == before and str(Program.parse(after)) == after
    assert before.count("\n%") < 20
