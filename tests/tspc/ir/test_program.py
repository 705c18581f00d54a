"""Programs as data: uses, types, what is replicated, what is dead, and their text."""

from __future__ import annotations

import pytest
import sympy
import torch

from tspc.ir.program import (
    Node,
    Program,
    Ref,
    Type,
    casts_of_parameters,
    map_refs,
    named,
    refs_in,
)

aten = torch.ops.aten
S = sympy.Symbol("s0", positive=True, integer=True)
TEXT = """program 'p'
symbol s0 positive integer = 8
%w: f32[4, 4] grad = param()
%table: f32[8] = buffer()
%x: f32[s0, 4] = input()
%ids: i64[s0] = input()
%half: bf16[4, 4] grad = aten.to.dtype(%w, bf16)
%zeros: f32[s0, 4] = aten.new_zeros.default(%x, (s0, 4))
%rows: f32[s0] = aten.index_select.default(%table, 0, %ids)
%two: f32[2, 4], f32[2, 4] = aten.chunk.default(%x, 2) recompute 3  # model.py:1
%y: f32[s0, 4] grad = aten.linear.default(%x, %w)
%unused: f32[s0, 4] = aten.mul.Tensor(%y, %two[1])
%out = output(%y, %rows)"""
PROGRAM = Program.parse(TEXT)


def test_the_text_is_read_back() -> None:
    assert str(PROGRAM) == TEXT
    assert PROGRAM.hints == {S: 8} and PROGRAM.symbols == [S]
    two = PROGRAM.node("two")
    assert (two.recompute, two.source, two.op) == (3, "model.py:1", aten.chunk.default)


def test_symbols_of_nodes_come_after_those_with_a_hint() -> None:
    t = sympy.Symbol("t", positive=True, integer=True)
    nodes = (Node("x", "input", types=(Type((t + S, 2), torch.int64),)), Node("o", "output"))
    assert Program("p", nodes, {S: 2}).symbols == [S, t]
    kept = Node("c", "constant", kwargs={"value": [{"a": (t,)}]})
    assert Program("p", (kept,)).symbols == [t]


def test_names_that_are_no_words_are_quoted() -> None:
    assert named("a.b_1") == "%a.b_1" and named("a b") == "%'a b'"
    assert repr(Ref("a b", 2)) == "%'a b'[2]" and repr(Ref("x")) == "%x"


def test_types_tell_floats_and_write_themselves() -> None:
    assert Type((2,), torch.bfloat16).is_float and Type((), torch.complex64).is_float
    assert not Type((2,), torch.int64).is_float
    assert Type((S, 3), torch.float64, True).text() == "f64[s0, 3] grad"


def test_a_node_tells_its_type_arguments_and_kind() -> None:
    y = PROGRAM.node("y")
    assert y.type == Type((S, 4), torch.float32, True) and y.is_call
    assert not PROGRAM.node("x").is_call
    assert y.argument(1) == Ref("w") and y.argument(2, "none") == "none"
    assert y.line() == "%y: f32[s0, 4] grad = aten.linear.default(%x, %w)"


def test_uses_in_nested_values_are_found_and_replaced_in_order() -> None:
    value = (Ref("a"), [Ref("b", 1), {"k": Ref("c")}], 3)
    assert list(refs_in(value)) == [Ref("a"), Ref("b", 1), Ref("c")]
    replaced = map_refs(value, lambda r: Ref(r.name.upper(), r.item))
    assert replaced == (Ref("A"), (Ref("B", 1), {"k": Ref("C")}), 3)
    node = Node("y", aten.add.Tensor, (Ref("a"), 1), {"alpha": Ref("b")})
    assert node.refs() == [Ref("a"), Ref("b")]
    moved = node.map_refs(lambda r: Ref("z") if r.name == "a" else r)
    assert (moved.args, moved.kwargs) == ((Ref("z"), 1), {"alpha": Ref("b")})


def test_casts_of_parameters() -> None:
    assert casts_of_parameters(PROGRAM.nodes) == {"half": "w"}


def test_what_hangs_on_no_parameter_and_no_float_input_is_replicated() -> None:
    assert PROGRAM.replicated == {"table", "ids", "zeros", "rows"}


def test_nodes_output_and_types_by_name() -> None:
    assert PROGRAM.output.args == (Ref("y"), Ref("rows"))
    assert PROGRAM.type_of(Ref("two", 1)) == Type((2, 4), torch.float32)
    with pytest.raises(StopIteration):
        PROGRAM.node("none")


def test_calls_that_nothing_reads_go_placeholders_stay() -> None:
    names = [n.name for n in PROGRAM.without_dead_nodes().nodes]
    assert names == ["w", "table", "x", "ids", "rows", "y", "out"]


def test_blocks_of_nodes_are_read_back() -> None:
    inner = (Node("z", aten.relu.default, (Ref("x"),), types=(Type((2,), torch.float32),)),)
    outer = Program("p", (Node("f", "fold", kwargs={"body": inner}), Node("o", "output")))
    assert Program.parse(str(outer)) == outer


@pytest.mark.parametrize(
    "text,wanted",
    [
        ("program 3", "a name"),
        ("program 'p'\nsymbol s = 'x'", "a number"),
        ("program 'p'\n%x: f32[1.5] = input()", "a size"),
        ("program 'p'\n%x f32 = input()", "'='"),
        ("program 'p'\n%x: 3 = input()", "a type"),
        ("program 'p'\n%x = input() extra", "a node"),
    ],
)
def test_what_cannot_be_read_is_told(text: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"line {text.count(chr(10)) + 1}: .* where {wanted} is"):
        Program.parse(text)
