"""The checks between passes find what is wrong, and pass what is right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tspc
from examples.llama_like import LlamaLike
from tspc.base.errors import CaptureError
from tspc.ir.kinds import ALL_REDUCE, VARY
from tspc.ir.program import Program, Ref
from tspc.passes.analyse.typed import Typed
from tspc.passes.pipeline import PIPELINE
from tspc.passes.verify import check_program, check_typed

TOKENS = torch.zeros(2, 16, dtype=torch.long)


def typed() -> Typed:
    return tspc.plan(LlamaLike(layers=1), (TOKENS, TOKENS), ranks=2).rewritten.typed


def without(t: Typed, kind: str) -> Program:
    """The program with the nodes of a conversion cut out."""
    gone = {n.name: n.args[0] for n in t.program.nodes if n.op == kind}
    assert gone
    nodes = [n for n in t.program.nodes if n.name not in gone]
    moved = [n.map_refs(lambda r: gone.get(r.name, r)) for n in nodes]
    return replace(t.program, nodes=tuple(moved))


def test_a_right_program_passes() -> None:
    check_typed(typed())


def test_a_forgotten_cotangent() -> None:
    t = typed()
    with pytest.raises(CaptureError, match="equal on all ranks, its cotangent is not"):
        check_typed(replace(t, program=without(t, VARY)))


def test_a_forgotten_sum() -> None:
    t = typed()
    with pytest.raises(CaptureError, match="reads a partial sum"):
        check_typed(replace(t, program=without(t, ALL_REDUCE)))


def test_an_operand_after_its_user() -> None:
    p = typed().program
    nodes = list(p.nodes)
    nodes[-2], nodes[-3] = nodes[-3], nodes[-2]
    with pytest.raises(CaptureError, match="after fold: .* is used before it is made"):
        check_program(replace(p, nodes=tuple(nodes)), "fold")


def test_an_item_that_does_not_exist() -> None:
    p = typed().program
    bad = replace(p.output, args=(Ref(p.nodes[0].name, 7),))
    with pytest.raises(CaptureError, match="does not exist"):
        check_program(replace(p, nodes=(*p.nodes[:-1], bad)), "fold")


def test_programs_are_dumped(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSPC_DUMP", str(tmp_path))
    typed()
    names = sorted(f.name for f in tmp_path.iterdir())
    assert names == [f"{i:02}_{p.name}.txt" for i, p in enumerate(PIPELINE)]
    (fold,) = tmp_path.glob("*_fold.txt")
    assert "llama_like.py:" in fold.read_text()
