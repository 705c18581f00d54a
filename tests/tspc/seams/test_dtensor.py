"""DTensor's private ways: who is asked of its ops, what reads its memory, and whether it is
traced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tests.support.group import alone, cut
from tspc.seams import dtensor
from tspc.seams.tensors import FakeTensorMode

aten = torch.ops.aten
DISPATCHER: Any = DTensor._op_dispatcher
HANDLERS = "_custom_op_handlers"
SLOW = "_propagate_op_sharding_dispatch_slow_path"


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceMesh]:
    """DTensor as it was, afterwards."""
    monkeypatch.setattr(DISPATCHER, HANDLERS, dict(getattr(DISPATCHER, HANDLERS)))
    monkeypatch.setattr(DISPATCHER, SLOW, getattr(DISPATCHER, SLOW))
    for name in ("numpy", "tolist", "__format__"):
        monkeypatch.setattr(DTensor, name, getattr(DTensor, name))
    with alone() as m:
        yield m
    torch._C._clear_DTensor_sharding_propagator_cache()


@torch.library.custom_op("seams::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


doubled.register_fake(torch.empty_like)


def test_a_handler_is_asked_of_each_op_and_may_let_torch_do_it(mesh: DeviceMesh) -> None:
    asked: list[object] = []

    def handle(instead: Any, op: Any, args: Any, kwargs: Any) -> object:
        asked.append(op)
        return instead(op, args, kwargs)

    dtensor.dispatch_dtensors(handle)
    x = torch.arange(6.0).view(3, 2)
    d = cut(x, mesh)
    asked.clear()
    assert torch.equal((d + 1).to_local(), x + 1)
    assert torch.equal(d.view(6).to_local(), x.view(6))
    d.add_(1)
    assert torch.equal(d.to_local(), x + 1) and torch.equal(d, d)
    for op in (aten.add.Tensor, aten.view.default, aten.add_.Tensor, aten.equal.default):
        assert op in asked
    with pytest.raises(NotImplementedError, match="doubled"):
        doubled(d)
    assert torch.ops.seams.doubled.default in asked


def test_what_a_handler_gives_is_the_result(mesh: DeviceMesh) -> None:
    def handle(instead: Any, op: Any, args: Any, kwargs: Any) -> object:
        if op is aten.sin.default:
            return torch.full((2,), 7.0)
        return instead(op, args, kwargs)

    dtensor.dispatch_dtensors(handle)
    assert cut(torch.ones(2), mesh).sin().tolist() == [7, 7]
    assert aten.sin.out not in getattr(DISPATCHER, HANDLERS)


def test_a_traced_one(mesh: DeviceMesh) -> None:
    d = cut(torch.ones(2, 2), mesh)
    assert not dtensor.is_traced(d)
    assert dtensor.is_traced(cut(torch.ones(2, device="meta"), mesh))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = DTensor.from_local(torch.ones(2), mesh, d.placements, run_check=False)
        assert dtensor.is_traced(fake)


def test_reads_of_memory_read_the_whole_of_those_that_are_chosen(mesh: DeviceMesh) -> None:
    chosen, other = (cut(torch.full((2,), v), mesh) for v in (1.0, 3.0))
    scalar = DTensor.from_local(torch.tensor(1.5), mesh, None, run_check=False)
    dtensor.read_dtensors(
        lambda x: x is not other, lambda x: torch.full((4,), 7.0) if x.dim() else x.to_local()
    )
    assert chosen.tolist() == [7, 7, 7, 7] and chosen.numpy().sum() == 28
    assert f"{scalar:.2f}" == "1.50" and "DTensor" in f"{chosen}"
