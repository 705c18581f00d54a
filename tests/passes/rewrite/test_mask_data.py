"""The data of a predicate as rows: one value of all that it refers to, made once."""

from __future__ import annotations

import sympy
import torch

from tests.support.programs import results
from tspc.ir.program import Node, Program, Ref, Type
from tspc.masks.index import At
from tspc.masks.predicate import B, H, K, Q
from tspc.passes.rewrite.mask_data import Rows

BATCH, LENGTH = 2, 3
VALUES = {
    "ids": torch.arange(6).view(BATCH, LENGTH),
    "turned": torch.arange(6).view(LENGTH, BATCH),
    "flags": torch.tensor([True, False, True]),
    "count": torch.tensor([4, 5]),
    "heads": torch.arange(12).view(BATCH, 2, LENGTH),
    "longer": torch.arange(10).view(BATCH, 5),
}
HOLDERS = {n: Node(n, "input", types=(Type(tuple(v.shape), v.dtype),)) for n, v in VALUES.items()}


def element(name: str, *at: object) -> sympy.Expr:
    return At(sympy.Symbol(name), *at)


def made(*elements: sympy.Expr) -> torch.Tensor:
    rows = Rows()
    assert [rows.place(e, HOLDERS, LENGTH) for e in elements] == list(range(len(elements)))
    nodes, value = rows.made(Node("y", "attend"), HOLDERS, BATCH, LENGTH)
    assert value is not None and all(n.type.dtype == torch.int64 for n in nodes)
    program = Program("p", (*HOLDERS.values(), *nodes, Node("output", "output", (value,))))
    (out,) = results(program, **VALUES)
    assert out.shape == nodes[-1].type.shape
    return out


def test_rows_of_values_per_batch_and_position() -> None:
    got = made(element("ids", B, K), element("turned", Q, B), element("count", B))
    assert torch.equal(got[:, 0], VALUES["ids"])
    assert torch.equal(got[:, 1], VALUES["turned"].T)
    assert torch.equal(got[:, 2], VALUES["count"][:, None].expand(BATCH, LENGTH))


def test_rows_without_a_batch_and_at_fixed_places() -> None:
    assert made(element("flags", K)).tolist() == [[[1, 0, 1]]]
    assert torch.equal(made(element("heads", B, 1, K))[:, 0], VALUES["heads"][:, 1])
    assert torch.equal(made(element("longer", B, K))[:, 0], VALUES["longer"][:, :LENGTH])


def test_elements_of_one_value_share_a_row() -> None:
    rows = Rows()
    assert rows.place(element("ids", B, K), HOLDERS, LENGTH) == 0
    assert rows.place(element("ids", B, Q // 2), HOLDERS, LENGTH) == 0
    assert rows.place(element("ids", B, 0), HOLDERS, LENGTH) == 1
    rows.start()
    assert rows.place(element("ids", B, 0), HOLDERS, LENGTH) == 0


def test_equal_rows_are_made_once() -> None:
    rows, node = Rows(), Node("y", "attend")
    rows.place(element("ids", B, K), HOLDERS, LENGTH)
    first, value = rows.made(node, HOLDERS, BATCH, LENGTH)
    again, same = rows.made(Node("z", "attend"), HOLDERS, BATCH, LENGTH)
    assert first and not again and same == value == Ref(first[-1].name)
    rows.start()
    assert rows.made(node, HOLDERS, BATCH, LENGTH) == ([], None)


def test_what_is_no_value_per_position() -> None:
    rows = Rows()
    for e in (
        element("ids", B, Q - K),
        element("ids", H, K),
        element("heads", B, Q, K),
        element("longer", B, K + 1),
    ):
        assert rows.place(e, HOLDERS, LENGTH) is None


def test_where_in_its_row_an_element_is() -> None:
    rows = Rows()
    assert rows.position(element("ids", B, Q + 1)) == Q + 1
    assert rows.position(element("count", B)) == 0
