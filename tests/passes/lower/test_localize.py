"""A program on one rank's tensors: local shapes, tspc's ops for conversions, how outputs leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.programs import Tensor, mlp, mlp_program, program_of, run_local, unit_of
from tests.support.ranks import AXIS
from tests.support.tiny import Attention, Cached, Head, proved
from tspc.base.options import parse
from tspc.factors.factor import Factors
from tspc.ir.body import chunk_of
from tspc.ir.program import APART, Node, Program, Ref
from tspc.ops.run import Run
from tspc.passes.analyse.sizes import Sizes
from tspc.passes.lower.localize import Target, _Local

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
    types = {n.name: n.types[0].shape for n in unit.local.nodes if n.types and n.types[0]}
    c = chunk_of(0)
    assert types["x0.local"] == types["fold_0.1"] == (2, c, 6) and types["x0"] == (2, 7, 6)
    assert types["m.up"] == (6, 3)
    assert Program.parse(str(unit.local)) == unit.local


def test_how_outputs_leave() -> None:
    def kinds(**options: object) -> list[tuple[str, tuple[object, ...], int, object]]:
        unit = unit_of(mlp_program(), "localize", options=parse(options))
        return [(r.kind, r.shape, r.dim, r.lead) for r in unit.results if r]

    assert kinds(outputs="full") == [("whole", (2, 7, 6), 0, 1)]
    assert kinds(outputs="sharded") == [("sharded", (2, 7, 6), 1, 1)]
    unit = unit_of(program_of(lambda x: [x.shape[0], x], X), "localize")
    assert unit.results[0] is None and len(unit.results) == 2


def test_an_output_where_it_lies_is_no_input() -> None:
    options = parse({"outputs": "sharded"})
    program = program_of(mlp, X, params=names("m.up", "m.down"))
    unit = unit_of(program, "localize", 2, axis=AXIS, options=options)
    wanted = mlp(X, *names("m.up", "m.down").values())[0]
    parts = [got for (got,) in run_local(unit, X, *names("m.up", "m.down").values())]
    torch.testing.assert_close(torch.cat(parts, 1)[:, :7], wanted)


def test_what_a_factor_does_not_touch_on_the_first_units() -> None:
    """A fold as a node that is run apart gives what its shard gives."""
    unit = unit_of(mlp_program(6), "propagate")
    (node,) = unit.folds
    local = _Local(unit.typed, Target({}, ("contiguous",), "axis"))
    local.node(replace(node, name="apart", op=APART))
    x, up, down = torch.randn(2, 4, 6), torch.randn(6, 3), torch.randn(3, 6)
    values = dict(zip((r.name for group in node.args for r in group), (x, up, down)))
    run = Run(values, {chunk_of(0): 4}, torch.device("cpu"))
    run.nodes(local.b.nodes)
    got = run.values[local.b.use(Ref("apart", 0)).value]
    torch.testing.assert_close(got, mlp(x, up, down)[0])


def test_as_many_units_as_a_shard_has() -> None:
    unit = unit_of(mlp_program(6), "propagate")
    F = Factors()
    h, d, other = F.new(6), F.new(2), F.new(4)
    fold: Any = type("Stand-in", (), {})()
    fold.dims, fold.factor, fold.units = {Ref("r"): [(other,), (h, d)], Ref("q"): [(d, h)]}, h, 2
    values = {"r": torch.arange(48.0).view(4, 12), "q": torch.arange(12)}
    for name, wanted in (("r", values["r"][:, :4]), ("q", torch.tensor([0, 1, 6, 7]))):
        local = _Local(unit.typed, Target({}, ("contiguous",), "axis"))
        local.b.at(Node("n", ""))
        x = local.first_units(fold, Ref(name), Ref(name), Sizes(F, {}))
        run = Run(dict(values), {}, torch.device("cpu"))
        run.nodes(local.b.nodes)
        assert torch.equal(run.values[x.value], wanted)


@pytest.mark.parametrize("model", [Attention, Head, Cached])
def test_with_gradients(model: Any) -> None:
    assert len(proved(model(), 2)) == 1
