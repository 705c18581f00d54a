"""Regions from factors of weights: chosen, rejected with their cause, look-ups, and the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.support.programs import analysis_of
from tests.support.samples import ids, x
from tspc.factors.factor import Factor
from tspc.ir.program import Type
from tspc.passes.analyse.factorize import Analysis
from tspc.passes.analyse.regions import (
    Region,
    Regions,
    components,
    find_regions,
    is_view,
    numel,
    phases,
    weight_values,
)
from tspc.passes.analyse.sequence import sequences

aten, tspc = torch.ops.aten, torch.ops.tspc
Tensor = torch.Tensor
linear = aten.linear.default
TOKENS = x(2, 5, 4)


def regions_of(fn: Callable[..., Any], *tensors: Tensor, **params: Tensor) -> Regions:
    return found(analysis_of(fn, *tensors, params=params))


def found(a: Analysis) -> Regions:
    return find_regions(a, set(sequences(a)))


def mlp(t: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return linear(linear(t, up).relu(), down)


def loss(t: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return mlp(t, up, down).softmax(-1).square().mean()


def test_a_column_and_a_row_are_one_region() -> None:
    got = regions_of(loss, TOKENS, up=x(6, 4), down=x(4, 6))
    (g,) = [g for g in got.chosen if set(g.weights) == {"up", "down"}]
    assert g.weights == {"up": (0, 1, "column"), "down": (1, 1, "row")}
    assert (g.factor.size, g.elements, g.phases, g.kind, g.is_open) == (6, 48, 1, "reduce", False)
    assert g.key == (g.factor, min(g.ops)) and not got.others and len(g.ops) == 3


def test_equal_segments_of_a_weight_count() -> None:
    def gated(t: Tensor, both: Tensor, down: Tensor) -> Tensor:
        a, b = aten.chunk.default(linear(t, both), 2, 2)
        return linear(a * b, down)

    got = regions_of(gated, TOKENS, both=x(12, 4), down=x(4, 6))
    (g,) = [g for g in got.chosen if "down" in g.weights]
    assert g.weights == {"both": (0, 2, "column"), "down": (1, 1, "row")}


def test_a_factor_that_is_needed_whole_is_rejected() -> None:
    got = regions_of(
        lambda t, up, down: linear(linear(t, up).softmax(-1), down).softmax(-1).mean(),
        TOKENS,
        up=x(6, 4),
        down=x(4, 6),
    )
    (g,) = [g for g, _ in got.rejected if "up" in g.weights and g.leaks]
    assert [(str(op), why) for _, op, why in g.leaks] == [("aten.softmax.int", "whole")]
    assert set(got.others) == {"up", "down"}


def test_what_is_refused_is_not_chosen() -> None:
    a = analysis_of(loss, TOKENS, params={"up": x(6, 4), "down": x(4, 6)})
    (g,) = found(a).chosen
    again = find_regions(a, set(sequences(a)), {g.key})
    assert not again.chosen and set(again.others) == {"up", "down"}


def test_looked_up_rows_and_what_no_region_covers() -> None:
    def fn(i: Tensor, table: Tensor, scale: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return mlp(aten.embedding.default(table, i) * scale, up, down)

    got = regions_of(fn, ids(11, 2, 5), table=x(11, 4), scale=x(4), up=x(6, 4), down=x(4, 6))
    ((f, record),) = got.lookups
    assert f.size == 11 and record.node.op == aten.embedding.default and got.others == ["scale"]


def test_a_value_that_leaves_opens_a_region() -> None:
    def fn(t: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        inner = linear(t, up)
        return linear(inner.relu(), down).softmax(-1).mean(), inner.exp()

    got = regions_of(fn, TOKENS, up=x(6, 4), down=x(4, 6))
    (g,) = [g for g in [*got.chosen, *(r for r, _ in got.rejected)] if len(g.weights) > 1]
    assert g.outputs or g.is_open
    closed = regions_of(loss, TOKENS, up=x(6, 4), down=x(4, 6)).chosen[0]
    assert not closed.outputs and not closed.is_open


def normed(t: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A sum over all units midway."""
    inner = linear(t, up)
    scale = aten.sum.dim_IntList(inner * inner, [2], True)
    return linear(inner * scale, down)


def test_a_sum_midway_makes_two_phases() -> None:
    a = analysis_of(normed, TOKENS, params={"up": x(6, 4), "down": x(4, 6)})
    got = found(a)
    parts = [g for g in got.chosen if g.factor.size == 6]
    assert [set(g.weights) for g in parts] == [{"up"}, {"down"}]
    assert all(g.phases == 1 for g in parts)
    exits, ops = [e for g in parts for e in g.exits], parts[0].ops | parts[1].ops
    whole = Region(parts[0].factor, exits, ops)
    first, later = phases(whole, a.records, set(sequences(a)))
    assert first.ops == parts[0].ops and later.ops == parts[1].ops


def test_components_are_joined_by_values() -> None:
    """Two layers of one width share no value."""

    def fn(t: Tensor, u: Tensor, d: Tensor, v: Tensor, e: Tensor) -> Tensor:
        return mlp(mlp(t, u, d), v, e)

    params = {"u": x(6, 4), "d": x(4, 6), "v": x(6, 4), "e": x(4, 6)}
    a = analysis_of(fn, TOKENS, params=params)
    assert sorted(sorted(g.weights) for g in found(a).chosen) == [["d", "u"], ["e", "v"]]
    f: Factor = next(iter(a.F.leaves(tuple(a.env["u", 0][0]))))
    carrying = [r for r in a.records if f in set().union(*r.carried_in, *r.carried_out)]
    assert list(components(f, carrying, [], a.makers, weight_values(a))) == []


def test_values_of_weights_through_views_and_casts() -> None:
    def fn(t: Tensor, w: Tensor) -> Tensor:
        return t @ aten.to.dtype(aten.t.default(w), torch.float64) * (w * 2).sum()

    a = analysis_of(fn, x(3, 4), params={"w": x(6, 4)})
    assert set(weight_values(a).values()) == {"w"} and len(weight_values(a)) >= 2
    assert not any("mul" in n for n in weight_values(a))
    assert is_view(aten.t.default) and not is_view(aten.mul.Tensor)


def test_elements_of_a_type() -> None:
    assert numel(Type((2, 3, 4), torch.float32)) == 24 and numel(Type((), torch.float32)) == 1
