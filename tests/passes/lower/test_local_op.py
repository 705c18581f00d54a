"""One ordinary op on the tensors of one rank: what it says of sizes becomes local."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.programs import analysis_of
from tspc.ir.builder import Builder
from tspc.ir.program import OUTPUT, Node, Ref
from tspc.ops.run import Run
from tspc.passes.analyse.factorize import Record
from tspc.passes.analyse.sizes import Sizes
from tspc.passes.lower import local_op
from tspc.passes.lower.local_op import lower

aten, Tensor = torch.ops.aten, torch.Tensor
X = torch.arange(2 * 6 * 4, dtype=torch.float64).view(2, 6, 4)
OPS: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda x: x.view(2, 6, 2, 2),
    "reshape": lambda x: x.reshape(2, 24),
    "expand": lambda x: x.unsqueeze(0).expand(3, 2, 6, 4),
    "unflatten": lambda x: x.unflatten(2, (2, 2)),
    "flatten": lambda x: x.flatten(1),
    "squeeze": lambda x: x.unsqueeze(0).squeeze(),
    "slice": lambda x: x[:, :, 1:3],
    "sum": lambda x: x.sum(2),
    "mean of others": lambda x: x.mean(2),
    "tanh": torch.tanh,
    "split": lambda x: x.split(2, 2)[1],
}


def called(r: Record, sizes: Sizes, values: dict[str, Tensor]) -> list[Any]:
    """The results of an op as it is lowered; values: what it reads, and all of it afterwards."""
    b = Builder()
    b.at(r.node, ())
    lower(b, r.node, r.ins, r.outs, sizes)
    Run(values, {}, torch.device("cpu")).nodes(b.nodes)
    return [values[Ref(r.node.name, i).value] for i in range(len(r.node.types))]


def half(fn: Callable[[Tensor], Any], part: int) -> Any:
    """The last op of a function where the middle dim has but 3 of 6 rows, and its result."""
    a = analysis_of(lambda x: [fn(x)], X)
    (leaf,) = a.F.expand(tuple(a.env["x0", 0][1]))
    values = {"x0": X[:, 3 * part : 3 * part + 3].contiguous()}
    results: list[Any] = []
    for r in a.records:
        if r.node.op != OUTPUT:
            results = called(r, Sizes(a.F, {leaf: 3}), values)
    return results[1] if len(results) > 1 else results[0]


@pytest.mark.parametrize("name", OPS)
def test_rows_of_one_rank(name: str) -> None:
    for part in range(2):
        x = X[:, 3 * part : 3 * part + 3]
        wanted = {
            "view": lambda x: x.reshape(2, 3, 2, 2),
            "reshape": lambda x: x.reshape(2, 12),
            "expand": lambda x: x.unsqueeze(0).expand(3, 2, 3, 4),
        }.get(name, OPS[name])(x)
        torch.testing.assert_close(half(OPS[name], part), wanted)


def test_the_local_part_of_a_mean_adds_up() -> None:
    for fn in (lambda x: x.mean(1), lambda x: x.mean(), lambda x: x.mean((0, 1), keepdim=True)):
        torch.testing.assert_close(half(fn, 0) + half(fn, 1), fn(X))


def test_a_slice_between_segments() -> None:
    """x and x twice, of which the second is read: it begins after the local rows of the first."""
    parts = [half(lambda x: torch.cat([x, x + 100], 1)[:, 6:], k) for k in range(2)]
    assert torch.equal(torch.cat(parts, 1), X + 100)
    parts = [half(lambda x: torch.cat([x, x + 100], 1)[:, -6:], k) for k in range(2)]
    assert torch.equal(torch.cat(parts, 1), X + 100)
    parts = [half(lambda x: torch.cat([x, x + 100], 1).split(6, 1)[1], k) for k in range(2)]
    assert torch.equal(torch.cat(parts, 1), X + 100)


def test_a_write_between_segments() -> None:
    def fn(x: Tensor) -> Tensor:
        both = torch.cat([x, x], 1)
        return torch.slice_scatter(both, x + 100, 1, 6, 12)

    got = half(fn, 0)
    assert torch.equal(got[:, :3], X[:, :3]) and torch.equal(got[:, 3:], X[:, :3] + 100)


def test_sizes_and_lists_of_refs() -> None:
    a = analysis_of(lambda x: [torch.stack([x, x + 1])], X)
    (r,) = [r for r in a.records if r.node.op == aten.stack.default]
    (got,) = called(r, Sizes(a.F, {}), {ref.value: X for ref in r.node.refs()})
    assert isinstance(got, Tensor) and got.shape == (2, 2, 6, 4)


def test_which_dims_a_mean_is_of() -> None:
    def of(*args: Any) -> list[int]:
        return local_op._reduced(Node("m", aten.mean.dim, (Ref("x"), *args)), 3)

    assert of() == of(None) == of(()) == [0, 1, 2] and of((-1, 0)) == [2, 0] and of(1) == [1]
