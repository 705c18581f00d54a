"""A rewritten program as text: one line a node, its placement in the shape."""

from __future__ import annotations

import sympy
import torch

from tests.support.programs import mlp_program, program_of, unit_of
from tests.support.tiny import Attention, Mlp, proved
from tspc.explain import show as module
from tspc.explain.show import show
from tspc.ir.program import Ref, Type


def test_a_region_and_its_parameters() -> None:
    text = show(unit_of(mlp_program(), "localize"), "t", notes=["a note"]).split("\n")
    assert text == [
        "sequence: 7, layout contiguous",
        "a note",
        "%x0        f32[2, 7, 6]    input",
        "%m.up      f32[6, 5]       param cut along dim 1",
        "%m.down    f32[5, 6]       param cut along dim 0",
        "%x0.local  f32[2, 7@t, 6]  local(%x0)",
        "%fold_0    f32[2, 7@t, 6]  fold[ring](%x0.local; up down) {m}",
        "return                     %fold_0[0]",
    ]


def test_schedules() -> None:
    unit = unit_of(mlp_program(), "localize")
    assert "fold[gather](" in show(unit, schedules={"m": "gather"})
    (graph,) = proved(Attention(), 2)
    assert "fold[broadcast](" in show(graph.rewritten)
    (graph,) = proved(Mlp(), 2, schedule="stationary")
    assert "fold[stationary](" in show(graph.rewritten)


def test_placements_and_sources() -> None:
    (graph,) = proved(Mlp(), 2)
    lines = {l.split()[0]: l for l in show(graph.rewritten).split("\n")[1:]}
    assert " +tsp " in lines["%mean.partial"] and " ~tsp " in lines["%up.bias.vary"]
    assert "7@tsp" in lines["%softmax"] and lines["%softmax"].split()[-1].startswith("tiny.py:")


def test_no_sequence() -> None:
    unit = unit_of(program_of(lambda a: [a.tanh()], torch.zeros(2)), "localize")
    assert show(unit).startswith("no sequence\n%x0 ")


def test_names_of_symbols() -> None:
    s = sympy.Symbol("s0", positive=True, integer=True)
    unit = unit_of(mlp_program(), "localize")
    names = {s: sympy.Symbol("S")}
    assert module._symbol_names(unit) == {}
    assert module._size(2 * s + 1, names) == "2*S + 1" and module._size(3, names) == "3"
    t = Type((2, s), torch.float32)
    assert module._type(t, "S", 1, names, "t") == "f32[2, S@t]"
    assert module._type(t, "P", None, names, "t") == "f32[2, S] +t"
    assert module._type(None, "R", None, names, "t") == "-"
    assert module._value((Ref("a"), (s, 2)), names) == "[%a, [S, 2]]"
