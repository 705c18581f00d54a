"""Derivatives of gradients are refused; gradients themselves are as they are."""

from __future__ import annotations

import pytest
import torch

from tspc.base.errors import UnsupportedError
from tspc.runtime.call.twice import refused, watched

X = torch.arange(3.0)


def test_gradients_that_no_graph_records_are_as_they_are() -> None:
    with torch.no_grad():
        assert refused([X, None]) == [X, None]
    assert refused([None]) == [None]


def test_a_recorded_gradient_cannot_be_differentiated() -> None:
    g, none = refused([X, None])
    assert none is None and g is not None and torch.equal(g, X) and g.requires_grad
    with pytest.raises(UnsupportedError, match=r"differentiated again \(create_graph=True\)"):
        g.sum().backward()


def test_inputs_that_want_gradients_are_watched() -> None:
    x, y = X.clone().requires_grad_(), X.clone()
    values = watched([x, y, "s", x], [0, 1, 2])
    assert values[1] is y and values[2] == "s" and values[3] is x and values[0] is not x
    assert torch.equal(values[0], x)
    (values[0] ** 2).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, 2 * X)
    (g,) = torch.autograd.grad((watched([x], [0])[0] ** 2).sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="its backward has no derivative"):
        g.sum().backward()
    with torch.no_grad():
        assert watched([x], [0]) == [x]
