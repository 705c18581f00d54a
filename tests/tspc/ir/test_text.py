"""Programs as text: what is printed parses back to the same program, after every pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import sympy
import torch

import tests.behaviour.test_samples as samples
import tspc
from examples.gpt2_like import GPT2Like
from tests.support.zoo import ZOO, build
from tspc.backend.brute import traced
from tspc.ir.program import INPUT, OUTPUT, SDPA, Node, Program, Ref, Type
from tspc.ir.spec import AttentionSpec, Operands
from tspc.ops.attention import ATTENTION, bound, spelled
from tspc.passes import pipeline
from tspc.passes.lower.unit import Unit
from tspc.passes.runner import Pass
from tspc.seams.sizes import sympy_functions as F


def check(program: Program) -> None:
    text = str(program)
    parsed = Program.parse(text)
    for ours, theirs in zip(program.nodes, parsed.nodes):
        assert ours == theirs
    assert parsed == program and str(parsed) == text


@pytest.fixture
def each_stage(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Check the text after each pass; -> the passes that ran."""
    ran: list[str] = []

    def after(step: Pass) -> Callable[[Unit], Unit]:
        def both(u: Unit) -> Unit:
            u = step.run(u)
            check(u.program)
            assert Program.parse(str(u)).nodes
            ran.append(step.name)
            return u

        return both

    steps = tuple(Pass(p.name, after(p)) for p in pipeline.PIPELINE)
    monkeypatch.setattr(pipeline, "PIPELINE", steps)
    return ran


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ZOO)
def test_of_a_model(name: str, each_stage: list[str]) -> None:
    model, kwargs = build(name, 24)
    tspc.plan(model, (), kwargs, ranks=3)
    assert each_stage[-1] == "localize"


@pytest.mark.parametrize("outputs", ["full", "sharded"])
def test_of_outputs(outputs: str, each_stage: list[str]) -> None:
    tokens = torch.zeros(2, 16, dtype=torch.long)
    tspc.plan(GPT2Like(layers=1), (tokens,), ranks=2, options={"outputs": outputs})
    assert each_stage


@pytest.mark.parametrize("group", samples.GROUPS)
def test_of_samples(group: str) -> None:
    for fn, args in samples.GROUPS[group]():
        check(traced(fn, *args)[0].program)


S, B = (sympy.Symbol(n, positive=True, integer=True) for n in ("s27", "s52"))
ODD = sympy.Symbol("u0", integer=True, positive=False)
VALUES = [
    (True, None, -1, 2**63 - 1, 1e-06, -0.5, math.inf, -math.inf, math.nan, 1 + 2j),
    ("a 'quote', \"two\", % and # and // and \n", ()),
    [[1, [2, ()]], {"a": (3,), "b c": [False]}],
    (torch.float32, torch.float8_e4m3fn, torch.strided, torch.device("cuda", 1)),
    (torch.channels_last, Ref("x"), Ref("x.1", 3), Ref("a b[0]"), Ref("it's")),
    (S, S + 1, 2 * S * B, (S + B) * 3, sympy.Mul(2, S + 1, evaluate=False), S**2 * (B - 1)),
    (F.FloorDiv(S + 3, 2) * 2, F.Mod(S, 4), F.Max(S, B, 2), F.FloorDiv(S * B, S + 1) - B**3),
    (sympy.Rational(1, 3), sympy.Float(0.1) * S, -S, S / B, sympy.Max(S, 2), sympy.Eq(S, B), ODD),
]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_of_values(value: Any) -> None:
    types = (Type((S, B, 3), torch.bool), None, Type((), torch.float8_e5m2, True))
    constant = Node("a b's", "constant", kwargs={"value": value}, types=types, source="x y.py:3")
    call = Node("y", torch.ops.aten.add.Tensor, (value, 1), {"alpha": value}, recompute=2)
    check(Program("odd 'name'", (constant, call), {B: 2, S: 16}))


@pytest.mark.parametrize(
    "line,text",
    [
        (2, "program 'p'\n%x = aten.add.Tensor(1 2)"),
        (3, "program 'p'\nsymbol s integer = 2\n%x: f32[s, t] = input()"),
        (2, "program 'p'\nx = input()"),
        (2, "program 'p'\n%x: 3 = input()"),
        (1, "%x = input()"),
    ],
)
def test_what_is_no_program_is_told_with_its_line(line: int, text: str) -> None:
    with pytest.raises(ValueError, match=f"line {line}: "):
        Program.parse(text)


def test_an_attention_of_all_fields() -> None:
    """The ops have the fields of the spec, in its order; a node that is read gives it again."""
    names = [f.name for f in (*fields(Operands), *fields(AttentionSpec))]
    on_ranks = torch.ops.tspc.attention.default._schema.arguments
    assert [a.name for a in ATTENTION._schema.arguments] == names
    assert [a.name for a in on_ranks[: len(names) - 1]] == [n for n in names if n != "sinks"]
    x = Operands(*map(Ref, ("q", "k", "v", "mask", "states", "data", "sinks")))
    size = sympy.Symbol("s0", positive=True, integer=True)
    a = AttentionSpec(True, 0.5, 0.1, "(k + s0 >= q)", -math.inf, "aten.tanh(s)", True, (size,))
    assert len(a.kwargs) == len(a.all)
    t = Type((2, 4, size, 8), torch.float32)
    inputs = [Node(r.name, INPUT, types=(t,)) for r in x.all if r is not None]
    node = spelled(Node("y", SDPA, types=(t,)), x, a)
    program = Program("attention", (*inputs, node, Node("output", OUTPUT, (Ref("y"),))))
    check(program)
    assert bound(Program.parse(str(program)).node("y")) == (x, a)


def test_comments_are_left_out() -> None:
    text = "// one\nprogram 'p' // two\n%x: f32[2] = input()  # a.py:1\n// three\n%y = output(%x)"
    assert [n.source for n in Program.parse(text).nodes] == ["a.py:1", ""]
