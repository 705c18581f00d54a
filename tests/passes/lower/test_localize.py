"""A program on one rank's tensors: local shapes, tspc's ops for conversions, how outputs leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.programs import Tensor, mlp, mlp_program, program_of, run_local, unit_of
from tests.support.ranks import AXIS
from tests.support.tiny import Attention, Cached, Head, proved
from tspc.base.options import parse
from tspc.ir.body import ROWS
from tspc.ir.program import Node, Program, Ref, Type
from tspc.passes.lower import localize
from tspc.passes.lower.localize import LocalProgram

X = torch.randn(2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(14).view(2, 7) % 5
WEIGHTS = {
    n: torch.randn(s, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for n, s in {"m.up": (6, 5), "m.down": (5, 6), "table": (5, 6), "scale": (6,)}.items()
}


def names(*wanted: str) -> dict[str, Tensor]:
    return {n: WEIGHTS[n] for n in wanted}


def lse(x: Tensor, up: Tensor) -> list[Tensor]:
    return [torch.logsumexp(x @ up, -1)]


def stacked(x: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
    inner = torch.tanh(x @ up)
    return [inner @ down, inner]


def looked_up(ids: Tensor, table: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
    return mlp(F.embedding(ids, table), up, down)


def tied(x: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
    """down is read outside too: gathered at use."""
    return [torch.tanh(x @ up) @ down * down.sum()]


def scaled(x: Tensor, scale: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
    y = mlp(x * scale, up, down)[0] * scale.sum()
    return [y.mean(), y * torch.tensor([2.0]), x.shape[2], scale, y.sum(1), x.view(14, 6)]


def attended(x: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
    """Of the tokens as they are, in no region."""
    y = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    return mlp(y, up, down)


PROGRAMS: list[tuple[Callable[..., Any], Tensor, tuple[str, ...]]] = [
    (mlp, X, ("m.up", "m.down")),
    (lse, X, ("m.up",)),
    (stacked, X, ("m.up", "m.down")),
    (looked_up, IDS, ("table", "m.up", "m.down")),
    (tied, X, ("m.up", "m.down")),
    (scaled, X, ("scale", "m.up", "m.down")),
    (attended, X, ("m.up", "m.down")),
]


@pytest.mark.parametrize("fn, x, params", PROGRAMS, ids=lambda a: getattr(a, "__name__", ""))
def test_as_on_one_device(fn: Callable[..., Any], x: Tensor, params: tuple[str, ...]) -> None:
    program = program_of(fn, x, params=names(*params))
    unit = unit_of(program, "localize", 2, axis=AXIS, options=parse({"outputs": "full"}))
    for got in run_local(unit, x, *names(*params).values()):
        for a, b in zip(got, fn(x, *names(*params).values()), strict=True):
            torch.testing.assert_close(a, b) if isinstance(b, Tensor) else None
            assert isinstance(b, Tensor) or a == b


def test_shapes_of_one_rank() -> None:
    unit = unit_of(mlp_program(), "localize")
    local = unit.local.program()
    types = {n.name: n.types[0].shape for n in local.nodes if n.types and n.types[0]}
    assert types["x0.local"] == types["fold_0"] == (2, ROWS, 6) and types["x0"] == (2, 7, 6)


def test_how_outputs_leave() -> None:
    def kinds(**options: object) -> list[tuple[str, tuple[object, ...], int, object]]:
        unit = unit_of(mlp_program(), "localize", options=parse(options))
        return [(r.kind, r.shape, r.dim, r.lead) for r in unit.local.results() if r]

    assert kinds(outputs="full") == [("whole", (2, 7, 6), 0, 1)]
    assert kinds(outputs="sharded") == [("sharded", (2, 7, 6), 1, 1)]
    unit = unit_of(program_of(lambda x: [x.shape[0], x], X), "localize")
    assert unit.local.results()[0] is None
    assert len(unit.local.kinds) == 2 and isinstance(unit.local, LocalProgram)


def test_an_output_where_it_lies_is_no_input() -> None:
    options = parse({"outputs": "sharded"})
    program = program_of(mlp, X, params=names("m.up", "m.down"))
    unit = unit_of(program, "localize", 2, axis=AXIS, options=options)
    wanted = mlp(X, *names("m.up", "m.down").values())[0]
    parts = [got for (got,) in run_local(unit, X, *names("m.up", "m.down").values())]
    torch.testing.assert_close(torch.cat(parts, 1)[:, :7], wanted)


def test_what_a_checkpointed_part_makes_for_others() -> None:
    t = (Type((2,), torch.float32),)
    nodes = [Node("x", "input", types=t)]
    for name, of, group in (("a", "x", 1), ("b", "a", 1), ("c", "b", 0), ("d", "b", 2)):
        op = torch.ops.aten.tanh.default
        nodes.append(Node(name, op, (Ref(of),), {}, t, recompute=group))
    nodes.append(Node("output", "output", (Ref("c"), Ref("d"))))
    assert localize._leaving(Program("p", tuple(nodes))) == {"b", "d"}


@pytest.mark.parametrize("model", [Attention, Head, Cached])
def test_with_gradients(model: Any) -> None:
    assert len(proved(model(), 2)) == 1
