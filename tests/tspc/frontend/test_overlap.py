"""Any tensors of the user's as a compiled program takes them, and what it writes into them."""

from __future__ import annotations

import pytest
import torch

from tests.support.group import alone, cut
from tspc.base.errors import UnsupportedError
from tspc.frontend import overlap as module
from tspc.frontend.overlap import before_writes, dense, overlap, written


def test_elements_in_order() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert dense(x) is x and dense(3) == 3
    turned = dense(x.t())
    assert isinstance(turned, torch.Tensor) and turned.is_contiguous()
    assert torch.equal(turned, x.t())
    c = torch.tensor([1 + 2j])
    for view in (c.conj(), c.conj().imag):
        got = dense(view)
        assert isinstance(got, torch.Tensor) and not got.is_conj() and not got.is_neg()
        assert torch.equal(got, view)


def test_a_copy_of_what_is_written() -> None:
    x, y = torch.ones(2), torch.ones(2)
    a, b, c = before_writes([0, 2], [x, y, 3])
    assert a is not x and isinstance(a, torch.Tensor) and torch.equal(a, x)
    assert b is y and c == 3


def test_new_values_of_inputs() -> None:
    x, y = torch.zeros(2), torch.zeros(2, requires_grad=True)
    outs = [torch.ones(1), None, torch.full((2,), 5.0), torch.full((2,), 7.0)]
    got = written([1, 0], {1: 0}, [x, y], outs)
    assert len(got) == 2 and got[0] is outs[0] and got[1] is x
    assert y.tolist() == [5, 5] and x.tolist() == [7, 7] and y.grad_fn is None
    with alone() as mesh:
        shard = cut(torch.zeros(4), mesh)
        assert written([0], {}, [shard], [torch.arange(4.0)]) == []
        assert shard.to_local().tolist() == [0, 1, 2, 3]


MEMORY = torch.zeros(4, 6)


@pytest.mark.parametrize(
    "a, b, shared",
    [
        (MEMORY, MEMORY, True),
        (MEMORY, torch.zeros(4, 6), False),
        (MEMORY[:2], MEMORY[2:], False),
        (MEMORY[:2], MEMORY[1:], True),
        (MEMORY[:, :3], MEMORY[:, 3:], False),  # they take turns
        (MEMORY[:, :4], MEMORY[:, 3:], True),
        (MEMORY[:, 3:], MEMORY[:, :3], False),
        (MEMORY, MEMORY.view(torch.int32), True),
        (MEMORY[0], MEMORY.view(-1)[6:], False),
        (MEMORY.t(), MEMORY[1], True),
    ],
)
def test_memory_of_both(a: torch.Tensor, b: torch.Tensor, shared: bool) -> None:
    assert module._overlap(a, b) == module._overlap(b, a) == shared
    error = overlap([0], [a, b], {0: "cache", 1: "x"})
    assert (error is not None) == shared
    if error is not None:
        assert isinstance(error, UnsupportedError)
        assert str(error).startswith("cache shares memory with x, and the model writes into it")


def test_who_has_no_memory_to_share() -> None:
    x = torch.zeros(2)
    assert overlap([], [x, x], {}) is None and overlap([0], [x, 3, "x"], {}) is None
    assert overlap([0], [x[:0], x], {}) is None
    assert not module._has_memory(torch.zeros(2, device="meta"))
    assert not module._has_memory(torch.zeros(2).to_sparse()) and module._has_memory(x)
    assert module._has_memory(torch.nn.Parameter(x))
    assert "input 0 shares memory with input 1" in str(overlap([0], [x, x], {}))


def test_bytes_of_a_tensor() -> None:
    assert module._span(MEMORY) == (0, 95) and module._span(MEMORY[1, 2:4]) == (32, 39)
    assert module._span(MEMORY[:, 1]) == (4, 79)
