"""K and V of the whole sequence for a rank's queries, and their gradients back; of a window only
the rows that are seen."""

from __future__ import annotations

import pytest
import torch

from tspc.ir.layout import Layout, Span
from tspc.ir.spec import AttentionSpec
from tspc.masks.predicate import mask
from tspc.runtime.attention.blocks import Meeting
from tspc.runtime.attention.keys import gather, needed, scatter
from tspc.runtime.comm.drivers import lockstep, record

Tensor = torch.Tensor
RANKS, LENGTH = 4, 30
LAYOUTS = [Layout(RANKS, order) for order in ("contiguous", "zigzag")]


def meeting(layout: Layout, **spec: object) -> Meeting:
    span = Span(layout, int(layout.chunk_rows(LENGTH)), LENGTH)
    return Meeting(AttentionSpec(**spec), span, span)  # type: ignore[arg-type]


def rows(m: Meeting, x: Tensor, rank: int) -> Tensor:
    at = m.keys.layout.positions(rank, m.keys.rows, LENGTH)
    return x[:, :, at]


WINDOW = {"causal": True, "predicate": "(k + 3 >= q)"}
SPECS = {"all": {"causal": True}, "window": WINDOW, "fill": {**WINDOW, "fill": -1e30}}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_keys_that_are_seen_and_their_gradients(name: str, layout: Layout) -> None:
    m = meeting(layout, **SPECS[name])
    k, v = torch.randn(2, 3, LENGTH, 4), torch.randn(2, 3, LENGTH, 5)
    with record() as sent:
        got = lockstep([gather(r, m, rows(m, k, r), rows(m, v, r)) for r in range(RANKS)])
    kind = "Exchange" if name == "window" and layout.order == "contiguous" else "AllGather"
    assert sent[0].kind == kind or layout.order == "zigzag"
    seen = []
    for r, (keys, values) in enumerate(got):
        at = layout.positions(r, m.queries.rows, LENGTH)
        keep = torch.stack([mask(t, at, torch.arange(LENGTH), (), None) for t in m.spec.texts])
        needs = keep.all(0)[0, 0].any(0)
        assert torch.equal(keys[:, :, needs], k[:, :, needs])
        assert torch.equal(values[:, :, needs], v[:, :, needs])
        seen.append(keys.abs().sum((0, 1, 3)) > 0)
    gs = [(torch.randn_like(k) * s[:, None], torch.randn_like(v) * s[:, None]) for s in seen]
    back = lockstep([scatter(r, m, dk, dv) for r, (dk, dv) in enumerate(gs)])
    totals = sum(dk for dk, _ in gs), sum(dv for _, dv in gs)
    for r, grads in enumerate(back):
        real = layout.valid(r, m.keys.rows, LENGTH)
        for d, total in zip(grads, totals):
            torch.testing.assert_close(d[:, :, real], rows(m, total, r)[:, :, real])


def test_rows_that_ranks_need_of_each_other() -> None:
    needs = needed(meeting(LAYOUTS[0], **WINDOW))
    assert needs is not None
    assert needs[0] == (((0, 8, 0),), (), (), ())
    assert needs[2][1] == ((5, 8, 13),) and needs[2][0] == () and needs[3][3] == ((0, 6, 24),)


def test_all_go_to_all_where_a_gather_is_as_good() -> None:
    assert needed(meeting(LAYOUTS[0], predicate="(k + 25 >= q)")) is None
    assert needed(meeting(LAYOUTS[0], causal=True)) is None
    assert needed(meeting(LAYOUTS[0], **SPECS["fill"])) is None


def test_keys_of_another_sequence_all_go() -> None:
    m = meeting(LAYOUTS[0], **WINDOW)
    other = Span(Layout(RANKS), 2, 7)
    m = Meeting(m.spec, m.queries, other)
    k = torch.randn(1, 1, 7, 2)
    at = [other.layout.positions(r, 2, 7) for r in range(RANKS)]
    got = lockstep([gather(r, m, k[:, :, i], k[:, :, i]) for r, i in enumerate(at)])
    assert all(torch.equal(keys, k) and torch.equal(values, k) for keys, values in got)
