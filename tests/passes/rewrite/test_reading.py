"""Reading a program backwards: what makes a value of one use, what a view keeps."""

from __future__ import annotations

import torch

from tspc.ir.program import Node, Program, Ref, Type
from tspc.passes.rewrite.reading import Reading

PROGRAM = Program.parse("""program 'p'
%x: f32[2, 3, 4] = input()
%once: f32[2, 3, 4] = aten.sin.default(%x)
%twice: f32[2, 3, 4] = aten.cos.default(%once)
%apart: f32[2, 3, 4] = aten.exp.default(%x) recompute 1
%view: f32[1, 2, 3, 4] = aten.view.default(%twice, (1, 2, 3, 4))
%turned: f32[2, 4, 3] = aten.transpose.int(%twice, 1, 2)
%less: f32[2, 3, 3] = aten.slice.Tensor(%x, -1, 0, 3)
%most: f32[2, 3, 3] = aten.slice.Tensor(%x, 2, None, -1)
%later: f32[2, 3, 3] = aten.slice.Tensor(%x, 2, 1, 4)
%rows: f32[2, 2, 4] = aten.slice.Tensor(%x, 1, 0, 2)
%two: f32[2, 3, 4], i64[2, 3, 4] = aten.sort.default(%x)
%output = output(%view, %turned, %apart, %less, %most, %later, %rows, %two[0])""")


def test_what_makes_a_value_of_one_use_in_the_same_part() -> None:
    r = Reading(PROGRAM)
    r.start(PROGRAM.node("view"))
    once = r._inner(Ref("once"))
    assert once is not None and once.name == "once"
    for other in (Ref("twice"), Ref("x"), Ref("apart"), Ref("two", 0), 3.0):
        assert r._inner(other) is None
    r.start(PROGRAM.node("apart"))
    assert r._inner(Ref("once")) is None and r._inner(Ref("apart")) is PROGRAM.node("apart")


def test_types_of_new_nodes_come_first() -> None:
    r = Reading(PROGRAM)
    assert r._type(Ref("turned")) == Type((2, 4, 3), torch.float32)
    r.b.add(Node("turned", "new", types=(Type((1,), torch.int64),)))
    assert r._type(Ref("turned")) == Type((1,), torch.int64)


def test_what_keeps_the_last_two_dims() -> None:
    r = Reading(PROGRAM)
    assert r._keeps_rows(PROGRAM.node("view")) and not r._keeps_rows(PROGRAM.node("turned"))


def test_a_slice_that_drops_the_last_column() -> None:
    r = Reading(PROGRAM)
    names = ("less", "most", "later", "rows")
    assert [r._drops_a_column(PROGRAM.node(n)) for n in names] == [True, True, False, False]
