"""One device's run of a program with random ops: the same draws as on ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

import tspc
from tspc.backend.reference import reference_backend

Tensor = torch.Tensor
X = torch.ones(2, 7, 6, dtype=torch.float64)


def compiled(fn: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(fn, backend=reference_backend)


def test_a_graph_without_random_ops_runs_as_it_is() -> None:
    assert torch.equal(compiled(lambda x: x.tanh())(X), X.tanh())


def test_draws_are_of_the_generator() -> None:
    def fn(x: Tensor) -> Any:
        y = F.dropout(x, 0.5)
        a, b = y.split([3, 4], 1)
        return a, b.sum() + torch.tensor([2.0], dtype=x.dtype), x.shape[1], y.detach()

    run = compiled(fn)
    torch.manual_seed(3)
    first = run(X)
    torch.manual_seed(3)
    again = run(X)
    assert torch.equal(first[0], again[0]) and first[2] == 7
    assert {*first[0].unique().tolist()} == {0.0, 2.0}
    assert not torch.equal(run(X)[3], first[3])
    torch.testing.assert_close(first[1], first[3][:, 3:].sum() + torch.tensor([2.0]).double())


def test_gradients_as_on_one_device() -> None:
    def fn(x: Tensor) -> Any:
        y = F.dropout(x, 0.5)
        with torch.no_grad():
            z = y * 2
        return y * 3, z

    x = X.clone().requires_grad_()
    y, z = compiled(fn)(x)
    assert y.requires_grad and not z.requires_grad
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y.detach())


def test_verify_takes_it() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 6)).double()
    assert tspc.verify(model, (X,), ranks=2).graphs
