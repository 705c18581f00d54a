"""Sums, norms and extremes of stored tensors are those of the whole, in every form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tests.support.group import alone, cut
from tspc.runtime.params import reductions
from tspc.runtime.params.values import store_on

aten = torch.ops.aten
Tensor = torch.Tensor
X = torch.randn(5, 4, dtype=torch.float64)


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    with alone() as m:
        store_on(m)
        yield m


# op -> its arguments after the tensor, keywords
FORMS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.sum.default, (), {}),
    (aten.sum.dim_IntList, ([0],), {}),
    (aten.sum.dim_IntList, ([0, 1], True), {"dtype": torch.float32}),
    (aten.nansum.default, (), {}),
    (aten.mean.dim, ([0], True), {}),
    (aten.prod.default, (), {}),
    (aten.amax.default, ([0],), {}),
    (aten.min.default, (), {}),
    (aten.any.dim, (0,), {}),
    (aten.count_nonzero.dim_IntList, ([0],), {}),
    (aten.logsumexp.default, ([0],), {}),
    (aten.linalg_vector_norm.default, (3,), {}),
    (aten.linalg_vector_norm.default, (0, [0]), {}),
    (aten.norm.Scalar, (2,), {}),
    (aten.var.correction, ([0],), {"correction": 1}),
    (aten.std.correction, (None,), {"correction": 0, "keepdim": True}),
    (aten.var_mean.correction, ([0],), {"correction": 1}),
]


@pytest.mark.parametrize("op,args,kwargs", FORMS, ids=lambda v: str(v))
def test_over_a_dim_that_is_cut(mesh: DeviceMesh, op: Any, args: tuple, kwargs: dict) -> None:
    got = reductions.reduce(op, (cut(X, mesh), *args), kwargs)
    assert not isinstance(got, DTensor) and got is not None
    torch.testing.assert_close(got, op(X, *args, **kwargs))


@pytest.mark.parametrize("keep", [False, True])
def test_over_another_dim_the_result_is_cut(mesh: DeviceMesh, keep: bool) -> None:
    got = reductions.reduce(aten.sum.dim_IntList, (cut(X, mesh, 1), [0], keep), {})
    assert isinstance(got, DTensor) and got.placements[0].dim == (1 if keep else 0)
    torch.testing.assert_close(got.to_local(), X.sum(0, keepdim=keep))
    both = reductions.reduce(aten.var_mean.correction, (cut(X, mesh, 1), [0]), {"correction": 1})
    assert isinstance(both, tuple) and all(isinstance(x, DTensor) for x in both)


def test_half_precision_adds_up_in_fp32(mesh: DeviceMesh) -> None:
    x = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    got = reductions.reduce(aten.sum.default, (cut(x, mesh),), {})
    assert isinstance(got, Tensor) and got.dtype == torch.bfloat16 and got.item() == 4096


def test_a_rank_without_rows_adds_nothing(mesh: DeviceMesh) -> None:
    empty = torch.ones(0, 4)
    part = reductions._part("sum", empty, [0], False)
    assert part.shape == (4,)
    assert reductions._part("prod", torch.full((2, 3), 2.0), [0, 1], False).item() == 64
    assert reductions.reduce(aten.sum.default, (cut(empty, mesh),), {}) is None


def test_norms_of_many_tensors_in_one_exchange(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    plain: Callable[..., Tensor] = reductions.parts

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(x.numel())
        return plain(x, *args, **kwargs)

    monkeypatch.setattr(reductions, "parts", counted)
    y = torch.randn(3)
    tensors = [cut(X, mesh), cut(y.double(), mesh), X]
    for order in (2.0, float("inf"), 0.0):
        got = reductions.norms(aten._foreach_norm.Scalar, (tensors, order), {})
        wanted = [torch.linalg.vector_norm(t, order) for t in (X, y.double(), X)]
        torch.testing.assert_close(got, wanted)
    assert calls == [2, 2, 2]


def test_dims_from_either_end() -> None:
    assert reductions._dims(-1, 3) == [2] and reductions._dims((0, -1), 3) == [0, 2]
    assert reductions._dims(None, 2) == [0, 1] and reductions._dims([], 2) == [0, 1]
