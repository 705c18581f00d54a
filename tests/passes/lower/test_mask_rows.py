"""A mask on this rank's rows only: its operands are cut, not its result."""

from __future__ import annotations

import pytest
import torch

from tests.support.programs import analysis_of
from tspc.factors.factor import Dims
from tspc.ir.program import Node, Ref
from tspc.passes.analyse.factorize import Analysis, Record
from tspc.passes.lower.mask_rows import Cutter

Tensor = torch.Tensor
LENGTH = 5


def cut(
    fn: object, dim: int, *tensors: Tensor
) -> tuple[list[str], list[tuple[str, int]], Analysis]:
    """(the nodes that are made, (value, dim) of what is converted) of the last value's rows."""
    a = analysis_of(lambda *x: [fn(*x)], *tensors)  # type: ignore[operator]
    nodes = {n.name: n for n in a.program.nodes}
    last = a.program.output.refs()[0]
    (leaf,) = a.F.expand(tuple(a.env[last.name, 0][dim]))
    made: list[str] = []
    converted: list[tuple[str, int]] = []

    def convert(ref: Ref, dims: Dims) -> Ref:
        converted.append((ref.name, [k for k, d in enumerate(dims) if leaf in d][0]))
        return Ref(f"{ref.name}.local")

    def emit(node: Node, record: Record) -> Ref:
        made.append(node.name)
        assert [*node.refs()] == record.refs and len(record.ins) == len(record.refs)
        assert record.outs[0][dim] == (leaf,) or "unsqueeze" in node.name or "rows" in node.name
        return Ref(node.name)

    cutter = Cutter(a.F, leaf, nodes, convert, emit)
    first = cutter.cut(last, dim)
    assert cutter.cut(last, dim) == first  # one result per value and dim
    return made, converted, a


def test_operands_of_an_outer_comparison() -> None:
    q, k = torch.arange(LENGTH), torch.arange(LENGTH + 1)
    made, converted, _ = cut(lambda q, k: (q.unsqueeze(1) >= k) & (k > 0), 0, q, k)
    assert made == ["unsqueeze.rows0", "ge.rows0", "and_1.rows0"]
    assert converted == [("x0", 0)]


def test_a_transposed_and_an_expanded_one() -> None:
    x = torch.zeros(LENGTH, LENGTH + 1)
    made, converted, _ = cut(lambda x: x.transpose(0, 1).tanh(), 1, x)
    assert made == ["transpose.rows1", "tanh.rows1"] and converted == [("x0", 0)]
    made, converted, _ = cut(lambda x: x.unsqueeze(0).expand(2, LENGTH, LENGTH + 1) + 1, 1, x)
    assert converted == [("x0", 0)] and made[-1] == "add.rows1"


def test_what_is_not_element_by_element_is_cut_where_it_is() -> None:
    x = torch.zeros(LENGTH, LENGTH + 1)
    made, converted, _ = cut(lambda x: x.cumsum(0) * 2, 0, x)
    assert made == ["mul.rows0"] and converted == [("cumsum", 0)]


@pytest.mark.parametrize("dim", [0, 1])
def test_a_dim_that_is_new_here(dim: int) -> None:
    x = torch.zeros(LENGTH, 3)
    made, converted, _ = cut(lambda x: x.unsqueeze(2) * 2, dim, x)
    assert made == [f"unsqueeze.rows{dim}", f"mul.rows{dim}"] and converted == [("x0", dim)]
