"""One ordinary op on the tensors of one rank: what it says of sizes becomes local."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.programs import analysis_of
from tspc.ir.program import CONSTANT, OUTPUT, Node, Ref, Type
from tspc.passes.analyse.sizes import Sizes
from tspc.passes.lower import run_op
from tspc.passes.lower.run_op import call, constant

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


def half(fn: Callable[[Tensor], Any], part: int) -> Any:
    """The last op of a function where the middle dim has but 3 of 6 rows, and its result."""
    a = analysis_of(lambda x: [fn(x)], X)
    (leaf,) = a.F.expand(tuple(a.env["x0", 0][1]))
    sizes = Sizes(a.F, {}, {leaf: 3})
    env: dict[Ref, Any] = {Ref("x0"): X[:, 3 * part : 3 * part + 3].contiguous()}
    got: Any = None
    for r in a.records:
        if r.node.op == OUTPUT:
            return got
        got = call(r.node, r.ins, r.outs, sizes, env.__getitem__)
        values = got if isinstance(got, (list, tuple)) else [got]
        env |= {Ref(r.node.name, i): v for i, v in enumerate(values)}
        env.setdefault(Ref(r.node.name), values[0])
        got = values[1] if len(values) > 1 else values[0]
    return got


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
    env = {ref: X for ref in r.node.refs()}
    got = call(r.node, r.ins, r.outs, Sizes(a.F, {}, {}), lambda ref: env[ref])
    assert isinstance(got, Tensor) and got.shape == (2, 2, 6, 4)


def test_which_dims_a_mean_is_of() -> None:
    def of(*args: Any) -> list[int]:
        return run_op._reduced(Node("m", aten.mean.dim, (Ref("x"), *args)), 3)

    assert of() == of(None) == of(()) == [0, 1, 2] and of((-1, 0)) == [2, 0] and of(1) == [1]


def test_a_view_of_what_is_not_viewable() -> None:
    node = Node("v", aten.view.default, (Ref("x"), (12,)))
    sizes = Sizes(analysis_of(lambda x: [x], X).F, {}, {})
    x = torch.arange(12).view(3, 4).t()
    got = call(node, [()], [()], sizes, lambda _: x)
    assert isinstance(got, Tensor) and torch.equal(got, x.reshape(12))


def test_constants() -> None:
    n = Node("c", CONSTANT, kwargs={"value": [[1, 2]]}, types=(Type((1, 2), torch.int32),))
    got = constant(n, torch.device("cpu"))
    assert got.dtype == torch.int32 and got.tolist() == [[1, 2]]
