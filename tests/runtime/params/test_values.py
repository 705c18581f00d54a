"""Stored parameters met by plain code, on one rank: each op gives the plain tensor's value and
gradients, what stays cut is a DTensor, what is written goes back to where it is stored."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from tests.dist.test_stored import compare
from tests.support.group import alone, cut
from tspc.base.errors import ShardedParameterError
from tspc.runtime.params import values
from tspc.runtime.params.values import store_on, tensors

Tensor = torch.Tensor


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    with alone() as m:
        store_on(m)
        yield m


@pytest.mark.parametrize("shape", ["uneven", "columns"])
def test_each_op_gives_the_plain_value(shape: str) -> None:
    with alone():
        assert compare(1, [shape], False) == []


def test_each_op_gives_the_plain_gradients() -> None:
    with alone():
        assert compare(1, ["uneven"], True) == []


def test_results_are_cut_where_operands_are(mesh: DeviceMesh) -> None:
    x = torch.randn(4, 3)
    d = cut(x, mesh)
    for y in (d + 1, d * d, torch.exp(d), d.t(), d[:, :2], d.new_zeros(4, 3), torch.rand_like(d)):
        assert isinstance(y, DTensor)
    for z in (d.norm(), d @ d.t(), d.sum(), d.new_zeros(2, 2), d + torch.ones(5, 4, 3)):
        assert not isinstance(z, DTensor)
    assert torch.equal((d + x).to_local(), x + x)


def test_what_is_nowhere_cut_stays_stored(mesh: DeviceMesh) -> None:
    whole = DTensor.from_local(torch.randn(4), mesh, [Replicate()], run_check=False)
    assert isinstance(whole.flip(0), DTensor) and not isinstance(whole.sum(), DTensor)


def test_lists_of_tensors(mesh: DeviceMesh) -> None:
    x, y = torch.randn(4, 3), torch.randn(2)
    d = cut(x, mesh)
    out = torch._foreach_add([d, y], 1.0)
    assert isinstance(out[0], DTensor) and not isinstance(out[1], DTensor)
    torch._foreach_mul_([d], [x])
    assert torch.equal(d.to_local(), x * x)
    norms = torch._foreach_norm([d, y])
    torch.testing.assert_close(torch.stack(list(norms)), torch.stack([(x * x).norm(), y.norm()]))


def test_a_scaler_finds_what_is_infinite(mesh: DeviceMesh) -> None:
    g = cut(torch.tensor([2.0, float("inf")]), mesh)
    found = torch.zeros(1)
    torch._amp_foreach_non_finite_check_and_unscale_([g], found, torch.tensor(0.5))
    assert found.item() == 1 and g.to_local()[0] == 1


def test_strides_of_a_part(mesh: DeviceMesh) -> None:
    d = cut(torch.arange(6.0).view(2, 3), mesh)
    assert torch.equal(torch.as_strided(d, (2, 3), (3, 1)).to_local(), d.to_local())
    with pytest.raises(ShardedParameterError, match="as_strided of a sharded tensor"):
        torch.as_strided(d.t(), (2, 2), (1, 3))


def test_other_meshes_are_torchs() -> None:
    with alone() as m:
        values._INSTALLED.append(True) if not values._INSTALLED else None
        other = DeviceMesh("cpu", [0], mesh_dim_names=("other",))
        d = cut(torch.ones(2, 2), other)
        assert isinstance(d.sum(), DTensor) and m.ndim == 1


def test_tensors_in_arguments() -> None:
    x, y = torch.ones(1), torch.ones(2)
    assert tensors((x, 3, [y, None], "s")) == [x, y]
