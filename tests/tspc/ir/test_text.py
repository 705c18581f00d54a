"""Values as text: what is shown is read back as the same, what cannot be read is told."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import sympy
import torch

from tspc.ir.program import INPUT, OUTPUT, SDPA, Node, Program, Ref, Type
from tspc.ir.spec import AttentionSpec, Operands
from tspc.ir.text import DTYPES, SHORT, Reader, indented, show
from tspc.ops.attention import ATTENTION, bound, spelled
from tspc.seams.sizes import sympy_functions as F


def check(program: Program) -> None:
    text = str(program)
    parsed = Program.parse(text)
    for ours, theirs in zip(program.nodes, parsed.nodes):
        assert ours == theirs
    assert parsed == program and str(parsed) == text


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


def test_values_as_they_are_shown() -> None:
    assert show([torch.bool, {"a": (1,)}, None]) == "[b8, {'a': (1,)}, None]"
    assert show(AttentionSpec(causal=True)) == "AttentionSpec(causal=True)"
    assert show(F.FloorDiv(S + 3, 2) * 2) == "2*FloorDiv(3 + s27, 2)"
    assert indented("a\nb") == "  a\n  b" and {DTYPES[s] for s in SHORT.values()} == set(SHORT)


def test_a_reader_goes_token_by_token() -> None:
    r = Reader("a, 2 // more\n]")
    assert (r.kind, r.peek(), r.peek(1)) == ("name", "a", ",")
    assert r.next() == "a" and r.take(",") and not r.take("2")
    assert r.of(int, "a number") == 2
    with pytest.raises(ValueError, match=r"line 2: ']' where '\)' is expected"):
        r.expect(")")
    r.expect("]")
    assert (r.kind, r.peek(5)) == ("end", "")
    listed = Reader("1, 2)")
    assert listed.many(")", listed.value) == [1, 2]
