"""What is folded, and how everything is stored: names, schedules, shard maps, and why a region is
refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.programs import mlp, mlp_program, program_of, unit_of
from tests.support.tiny import Attention, proved
from tspc.base.errors import OptionError
from tspc.base.options import parse
from tspc.ir.body import Extent
from tspc.passes.analyse.refused import Refused
from tspc.passes.analyse.regions import Region
from tspc.passes.lower import choose
from tspc.passes.lower.choose import Choice, Storage, fold_map

Tensor = torch.Tensor
WEIGHTS = {"m.up": torch.zeros(6, 5), "m.down": torch.zeros(5, 6)}


def chosen(
    fn: Callable[..., Any], *tensors: Tensor, ranks: int = 2, params: Any = None, **fields: Any
) -> Choice:
    return unit_of(
        program_of(fn, *tensors, params=params or WEIGHTS), "choose", ranks, **fields
    ).choice


def regions(c: Choice) -> dict[str, set[str]]:
    return {name: set(g.weights) for name, g, _ in c.regions}


def x(length: int = 7) -> Tensor:
    return torch.zeros(2, length, 6)


def test_a_region_and_its_storage() -> None:
    unit = unit_of(mlp_program(), "choose")
    c = unit.choice
    assert regions(c) == {"m": {"m.up", "m.down"}} and not c.refused
    assert [s for _, _, s in c.regions] == ["auto"]
    assert c.leaf is not None and c.leaf.size == 7 and [*c.leaves.values()] == ["contiguous"]
    assert c.extents == (Extent(7, "contiguous"),)
    up, down = (c.storages[n] for n in ("m.up", "m.down"))
    assert up.kind == down.kind == "fold" and up.map and down.map
    assert (up.map.dim, up.map.rows) == (1, ((0, 1, 2), (3, 4, 4)))  # a pad repeats the last unit
    assert (down.map.dim, down.map.rows) == (0, ((0, 1, 2), (3, 4, -1)))  # or is zero
    assert up.map.real == down.map.real == ((True,) * 3, (True, True, False))


def test_units_of_several_rows() -> None:
    """A gate and an up projection in one weight: each shard has units of both halves."""

    def gated(x: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
        a, b = (x @ up).chunk(2, -1)
        return [(torch.tanh(a) * b) @ down]

    params = {"m.up": torch.zeros(6, 10), "m.down": torch.zeros(5, 6)}
    unit = unit_of(program_of(gated, x(), params=params), "choose")
    ((_, g, _),) = unit.choice.regions
    shard = unit.choice.storages["m.up"].map
    assert shard is not None and shard.rows == ((0, 1, 2, 5, 6, 7), (3, 4, 4, 8, 9, 9))
    assert shard.real[1] == (True, True, False, True, True, False)
    dim, _, _ = g.weights["m.up"]
    assert fold_map(unit.analysis, "m.up", dim, g.factor, 5, True).rows[4] == (4, 9)


def test_what_is_in_no_region() -> None:
    def fn(ids: Tensor, table: Tensor, scale: Tensor, big: Tensor, *w: Tensor) -> list[Tensor]:
        return mlp(F.embedding(ids, table) * scale + big[:6], *w)

    params = {"table": torch.zeros(10, 6), "scale": torch.zeros(6), "big": torch.zeros(1 << 15)}
    params |= WEIGHTS
    c = chosen(fn, torch.zeros(2, 7, dtype=torch.int64), params=params)
    kinds = {n: s.kind for n, s in c.storages.items() if n not in WEIGHTS}
    assert kinds == {"table": "gather", "scale": "replicate", "big": "gather"}
    assert c.storages["scale"] == Storage("replicate")
    assert len(c.lookups) == 1


def test_no_sequence() -> None:
    c = chosen(lambda a, b: [a @ b])
    assert c.leaf is None and c.extents == (Extent(1, "contiguous"),) and not c.regions
    assert {why for _, why in c.refused} <= {"the program has no sequence"}


def used_elsewhere(x: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
    return [torch.tanh(x @ up) @ down + down.sum()]


def escapes(x: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
    inner = torch.tanh(x @ up)
    return [inner @ down + inner.softmax(-1).amax(-1, keepdim=True)]


def over_tokens(x: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
    return [(x @ up).softmax(1) @ down]


@pytest.mark.parametrize(
    "fn, why",
    [
        (used_elsewhere, "m.down is also used by sum_1"),
        (over_tokens, "softmax meets the sequence"),
    ],
    ids=lambda a: getattr(a, "__name__", ""),
)
def test_why_not(fn: Callable[..., Any], why: str) -> None:
    c = chosen(fn, x())
    assert any(why in text for _, text in c.refused), c.refused


def test_a_value_that_leaves_in_no_pieces() -> None:
    """The hidden units are read outside: the columns of the second weight alone are cut."""
    assert regions(chosen(escapes, x())) == {"m": {"m.down"}}


def test_what_is_left_alone() -> None:
    c = chosen(
        lambda *a: [torch.tanh(a[0] @ a[1]) @ a[2]],
        x(),
        refused=Refused(regions={frozenset({"m.up", "m.down"}): "it fails"}),
    )
    assert [why for _, why in c.refused] == ["it fails"]
    assert regions(c) == {"m": {"m.down"}}  # by its columns, as the next best


def test_names_are_the_common_path() -> None:
    def of(*names: str) -> Region:
        return type("R", (), {"weights": dict.fromkeys(names)})()

    got = choose._names(
        [of("a.b.q.w", "a.b.k.w"), of("a.b.up.w", "a.b.down.w"), of("w", "a.v"), of("c.w")]
    )
    assert got == ["a.b", "a.b#2", "model", "c"]


def test_schedules_by_name() -> None:
    names = ["layers.0.mlp", "layers.1.mlp", "head"]
    assert choose._schedules(names, "ring", False) == ["ring"] * 3
    by_name = {"layers.*": "gather", "head": "stationary"}
    assert choose._schedules(names, by_name, False) == ["gather", "gather", "stationary"]
    assert choose._schedules(names, {"tail": "ring"}, True) == ["auto"] * 3
    with pytest.raises(OptionError, match="schedule: 'tail' matches no region; the regions are l"):
        choose._schedules(names, {"tail": "ring"}, False)


def test_the_layout_is_even_under_a_causal_mask() -> None:
    def attend(x: Tensor, q: Tensor, causal: bool) -> list[Tensor]:
        h = (x @ q).unflatten(-1, (3, 2)).transpose(1, 2)
        return [F.scaled_dot_product_attention(h, h, h, is_causal=causal)]

    params = {"q": torch.zeros(6, 6)}
    orders = {
        causal: [*chosen(lambda x, q: attend(x, q, causal), x(), params=params).leaves.values()]  # noqa: B023
        for causal in (True, False)
    }
    assert orders == {True: ["zigzag"], False: ["contiguous"]}
    c = chosen(
        lambda x, q: attend(x, q, True), x(), params=params, options=parse({"layout": "contiguous"})
    )
    assert [*c.leaves.values()] == ["contiguous"]


def test_fewer_heads_of_keys_than_ranks_fold_by_queries() -> None:
    (graph,) = proved(Attention(heads=4, kv=2), 4)
    ((_, g, _),) = graph.rewritten.choice.regions
    assert int(g.factor.size) == 2 or "q.weight" in g.weights
