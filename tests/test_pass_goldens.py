"""Each pass from text to text: a file has a program, an arrow, and the program after the pass;
`--update-golden` writes what stands after the arrow anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from tspc.ir.program import Program
from tspc.passes.pipeline import PIPELINE
from tspc.passes.runner import run
from tspc.passes.unit import Unit

FOLDER = Path(__file__).parent / "golden" / "passes"
FILES = sorted(FOLDER.glob("*/*.txt"))
ARROW = "\n=>\n"
# what must have been decided of the program first; other passes read the program alone
BEFORE = {
    "outputs": ("factorize",),
    "windows": ("factorize",),
    "fold": ("factorize", "choose"),
    "propagate": ("factorize", "choose", "fold"),
}
DECIDE = {"lookups", "factorize", "choose", "pieces", "budget", "localize"}  # and leave the program
BY_NAME = {p.name: p for p in PIPELINE}


def rewritten(name: str, text: str) -> str:
    program = Program.parse(text)
    steps = [BY_NAME[n] for n in (*BEFORE.get(name, ()), name)]
    return str(run(steps, Unit(program, tuple(program.symbols), ranks=2)).program)


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_pass_from_text_to_text(path: Path, request: pytest.FixtureRequest) -> None:
    before, _, after = path.read_text().rstrip("\n").partition(ARROW)
    text = rewritten(path.parent.name, before)
    if request.config.getoption("--update-golden"):
        path.write_text(f"{before}{ARROW}{text}\n")
        after = text
    assert text == after
    assert text != before, "the pass has nothing to do here"
    assert str(Program.parse(before)) == before and str(Program.parse(after)) == after
    assert before.count("\n%") < 20


def test_each_pass_that_rewrites_has_three() -> None:
    count = {name: len(list((FOLDER / name).glob("*.txt"))) for name in BY_NAME}
    assert {n for n, k in count.items() if k < 3} == DECIDE
    assert {p.parent.name for p in FILES} <= set(BY_NAME)


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_pass_that_decides_leaves_the_program(path: Path) -> None:
    program = Program.parse(path.read_text().partition(ARROW)[0])
    unit = Unit(program, tuple(program.symbols), ranks=2)
    for step in PIPELINE:
        after = run([step], unit)
        if step.name in DECIDE:
            assert after.program is unit.program
        unit = after
