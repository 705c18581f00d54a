"""Passes one after the other: what each made is checked, timed, written down, and named in
errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import FunctionType

import pytest
import torch

from tests.support.programs import program_of
from tspc.ir.program import Node, Program, Ref
from tspc.passes.lower.unit import Unit
from tspc.passes.runner import Pass, run


def unit() -> Unit:
    return Unit(program_of(lambda x: [x.tanh()], torch.zeros(2)))


def named(u: Unit) -> Unit:
    return replace(u, program=replace(u.program, name="other"))


def fails(u: Unit) -> Unit:
    for node in u.program.nodes:
        if node.is_call:
            raise ValueError("no")
    return u


OURS = FunctionType(fails.__code__, {**globals(), "__name__": "tspc.sample"})


def test_the_unit_after_all_of_them() -> None:
    assert run([], unit()).program.name == "sample"
    assert run([Pass("a", named), Pass("b", lambda u: u)], unit()).program.name == "other"


def test_an_error_tells_the_pass_and_the_node() -> None:
    with pytest.raises(ValueError, match="^no\n") as e:
        run([Pass("a", named), Pass("b", OURS)], unit())
    assert e.value.__notes__ == ["in pass b of tspc, at %tanh = aten.tanh.default, "], (
        e.value.__notes__
    )


def test_what_a_pass_made_is_checked() -> None:
    def wrong(u: Unit) -> Unit:
        output = Node("output", "output", (Ref("nothing"),))
        return replace(u, program=Program("p", (*u.program.nodes[:-1], output)))

    with pytest.raises(Exception, match="nothing") as e:
        run([Pass("breaks", wrong)], unit())
    assert any(n.startswith("in pass breaks of tspc") for n in e.value.__notes__)


@pytest.mark.parametrize("level", ["", "1", "2"])
def test_debug(
    level: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TSPC_DEBUG", level)
    run([Pass("a", named)], unit())
    err = capsys.readouterr().err
    assert err.startswith("tspc: a: 3 nodes, 0.0") == bool(level)
    assert ("program 'other'" in err) == (level == "2")


def test_dump(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TSPC_DUMP", str(tmp_path / "texts"))
    after = run([Pass("a", lambda u: u), Pass("b", named)], unit())
    files = {p.name: p.read_text() for p in (tmp_path / "texts").iterdir()}
    assert [*sorted(files)] == ["00_a.txt", "01_b.txt"] and files["01_b.txt"] == f"{after}\n"
