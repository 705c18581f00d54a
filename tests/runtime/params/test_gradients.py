"""Gradients between plain code and what is stored: cut like the parameter, plain for plain."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from tests.support.group import alone, cut
from tspc.runtime.params.gradients import ToShard, _to_plain, arrives_cut, stays_plain
from tspc.runtime.params.values import store_on

X = torch.randn(4, 3, dtype=torch.float64)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    with alone() as m:
        store_on(m)
        yield m


def test_a_plain_gradient_arrives_cut(mesh: DeviceMesh) -> None:
    p = nn.Parameter(cut(X, mesh))
    arrives_cut(p)
    arrives_cut(p)  # once
    assert len(p._backward_hooks or {}) == 1 and p.requires_grad
    (p.full_tensor() * X).sum().backward()
    assert isinstance(p.grad, DTensor) and p.grad.placements == p.placements
    torch.testing.assert_close(p.grad.to_local(), X)


def test_what_takes_no_gradient_is_left(mesh: DeviceMesh) -> None:
    frozen = nn.Parameter(cut(X, mesh), requires_grad=False)
    arrives_cut(frozen)
    assert not frozen.requires_grad and len(frozen._backward_hooks or {}) == 1
    whole = nn.Parameter(cut(X.int(), mesh), requires_grad=False)
    arrives_cut(whole)
    assert not whole._backward_hooks


def test_a_hook_changes_only_what_is_cut_otherwise(mesh: DeviceMesh) -> None:
    p = nn.Parameter(cut(X, mesh))
    hook = ToShard(p)
    assert hook(cut(X, mesh)) is None and hook(None) is None
    replicated = DTensor.from_local(X, mesh, [Replicate()], run_check=False)
    for g in (X, replicated):
        got = hook(g)
        assert isinstance(got, DTensor) and got.placements == p.placements
        assert torch.equal(got.to_local(), X)
    del p, got
    gc.collect()
    assert hook(X) is None


def test_second_derivatives_go_through(mesh: DeviceMesh) -> None:
    p = nn.Parameter(cut(X, mesh))
    arrives_cut(p)
    (g,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
    (h,) = torch.autograd.grad((g * g).sum(), p)
    torch.testing.assert_close(h.full_tensor(), 36 * X**3)


def test_a_plain_tensors_gradient_stays_plain(mesh: DeviceMesh) -> None:
    x = X.clone().requires_grad_()
    stays_plain(x)
    stays_plain(x)  # once
    (x * cut(X, mesh)).sum().backward()
    assert x.grad is not None and not isinstance(x.grad, DTensor)
    torch.testing.assert_close(x.grad, X)
    assert _to_plain(X) is None
    assert torch.equal(_to_plain(cut(X, mesh)), X)  # type: ignore[arg-type]
    assert sum(h is _to_plain for h in (x._backward_hooks or {}).values()) == 1
