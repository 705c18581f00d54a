"""Attentions as text: the predicate, and how many blocks each rank computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.support.programs import Tensor, program_of, unit_of
from tests.support.tiny import Attention, proved
from tspc.explain import attention
from tspc.explain.attention import lines
from tspc.ir.program import Node, Ref


def plain(*masks: Tensor, layers: int = 1, causal: bool = False) -> list[str]:
    def fn(x: Tensor, *rest: Tensor) -> list[Tensor]:
        up, down = rest[-2:]
        for _ in range(layers):
            mask = rest[0] if masks else None
            x = F.scaled_dot_product_attention(x, x, x, mask, is_causal=causal)
        return [torch.tanh(x @ up) @ down]

    params = {"m.up": torch.zeros(6, 5), "m.down": torch.zeros(5, 6)}
    program = program_of(fn, torch.zeros(2, 7, 6), *masks, params=params)
    return lines(unit_of(program, "localize"), 2, {})


def test_a_causal_one() -> None:
    (one,) = plain(causal=True)
    assert one.startswith("attention: scaled_dot_product_attention")
    assert one.endswith(": (q >= k); blocks of 64 by rank: 2 1 of 2")


def test_alike_are_told_once() -> None:
    (one,) = plain(layers=3, causal=True)
    assert " and 2 more: " in one


def test_of_all_keys_nothing_is_told() -> None:
    assert plain() == []


def test_in_a_fold() -> None:
    (graph,) = proved(Attention(), 2)
    (one,) = lines(graph.rewritten, 2, {})
    assert one.startswith("attention: model: (q >= k); blocks of ")


def test_names_of_data_and_sizes() -> None:
    nodes = {
        "seg": Node("seg", "input"),
        "seg.rows": Node("seg.rows", torch.ops.aten.tanh.default, (Ref("seg"),)),
        "doc": Node("doc", "input"),
        "cat": Node("cat", attention.CAT, ((Ref("seg.rows"), Ref("doc")),)),
    }
    assert attention._sources(None, nodes) == []
    assert attention._sources(Ref("seg.rows"), nodes) == ["seg"]
    assert attention._sources(Ref("cat"), nodes) == ["seg", "doc"]
