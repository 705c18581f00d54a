"""The arguments of a node by the names of its op's schema, and its tensor operands in order."""

from __future__ import annotations

import torch

from tspc.ir.binding import bind, schema
from tspc.ir.program import Node, Ref

aten = torch.ops.aten


def test_a_schema_has_names_defaults_and_tensors() -> None:
    spec, pointwise = schema(aten.add.Tensor)
    assert spec == [("self", None, True), ("other", None, True), ("alpha", 1, False)]
    assert pointwise and not schema(aten.mm.default)[1]


def test_arguments_by_name_and_operands_with_gaps() -> None:
    node = Node("y", aten.linear.default, (Ref("x"), Ref("w")))
    args, refs = bind(node)
    assert args == {"input": Ref("x"), "weight": Ref("w"), "bias": None}
    assert refs == [Ref("x"), Ref("w"), None]


def test_lists_of_operands_are_laid_out_and_keywords_count() -> None:
    node = Node("y", aten.cat.default, ((Ref("a"), Ref("b", 1)),), {"dim": -1})
    assert bind(node) == ({"tensors": (Ref("a"), Ref("b", 1)), "dim": -1}, [Ref("a"), Ref("b", 1)])
    index = Node("y", aten.index.Tensor, (Ref("x"), (None, Ref("i"))))
    assert bind(index)[1] == [Ref("x"), Ref("i")]


def test_numbers_are_no_operands() -> None:
    args, refs = bind(Node("y", aten.add.Tensor, (Ref("x"), 2)))
    assert args["other"] == 2 and refs == [Ref("x"), None]
