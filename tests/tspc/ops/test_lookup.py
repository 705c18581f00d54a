"""Rows of a table: which of them have no gradient, and what divides the others'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import tspc
from tests.support.goldens import cases, check
from tspc.backend.simulated import simulated_backend
from tspc.ops.lookup import Elements

WORDS, H = 11, 8
FLAGS = [
    {"padding_idx": 0},
    {"padding_idx": -1},
    {"scale_grad_by_freq": True},
    {"padding_idx": 4, "scale_grad_by_freq": True},
]


class Table(nn.Module):
    """kind: the table as it is; tied to the head too; changed before it is read."""

    def __init__(self, kind: str, flags: dict[str, Any]):
        super().__init__()
        self.kind, self.flags = kind, flags
        self.table = nn.Parameter(torch.randn(WORDS, H))
        self.up, self.down = nn.Linear(H, 12), nn.Linear(12, H)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        table = self.table * 2 if self.kind == "changed" else self.table
        x = F.embedding(ids, table, **self.flags)
        x = x + self.down(torch.tanh(self.up(x)))
        if self.kind == "tied":
            return F.cross_entropy((x @ self.table.T).flatten(0, 1), ids.flatten())
        return x.square().mean()


def ids(length: int = 13) -> torch.Tensor:
    """Every row, some often."""
    return (torch.arange(3 * length).square() // 3).remainder(WORDS).view(3, length)


@pytest.mark.parametrize("kind", ["plain", "tied", "changed"])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_equals_one_device(kind: str, flags: dict[str, Any]) -> None:
    torch.manual_seed(0)
    assert {0, 4, WORDS - 1} <= set(ids().flatten().tolist())
    found = tspc.verify(Table(kind, flags).double(), (ids(),), {}, 3, {}, 1e-9)
    (graph,) = found.graphs
    if kind != "changed":
        assert not graph.rewritten.typed.fallbacks


def test_a_sparse_gradient_comes_dense() -> None:
    torch.manual_seed(0)
    mine, one = (Table("plain", {"sparse": s}).double() for s in (True, False))
    one.load_state_dict(mine.state_dict())
    torch._dynamo.reset()
    torch.compile(mine, backend=simulated_backend(2))(ids()).backward()
    one(ids()).backward()
    torch.testing.assert_close(mine.table.grad, one.table.grad, rtol=1e-9, atol=1e-12)


class Looked(nn.Module):
    def __init__(self, fn: Callable[..., torch.Tensor]):
        super().__init__()
        self.fn, self.table = fn, nn.Parameter(torch.randn(WORDS, H))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.fn(ids, self.table).square().sum()


def filled(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(ids[:, :1] > 4, 3)


@pytest.mark.parametrize(
    "fn,constants",
    [
        (lambda i, t: F.embedding(i, t), set()),
        (lambda i, t: F.embedding(i.T[1:].flatten(), t), set()),
        (lambda i, t: F.embedding(F.pad(i, (0, 2), value=7), t), {7}),
        (lambda i, t: F.embedding(F.pad(i, (0, 2)), t), {0}),
        (lambda i, t: F.embedding(i.masked_fill(i == 9, 3), t), {3}),
        (
            lambda i, t: F.embedding(F.pad(i, (1, 0), value=-9).masked_fill(i[:, :1] < 4, 3), t),
            {-9, 3},
        ),
        (lambda i, t: t[i.flip(0)], None),  # what it gives is not looked into
        (lambda i, t: F.embedding(i + 1, t), None),
        (lambda i, t: F.embedding(i.view(torch.int32), t), None),
    ],
)
def test_what_an_index_is_made_of(fn: Any, constants: set[int] | None) -> None:
    (found,) = tspc.plan(Looked(fn), (ids(),), ranks=2).rewritten.lookups.listed
    wanted = None if constants is None else Elements("ids", frozenset(constants))
    assert found.elements == wanted


@cases("watched")
def test_watched_from_text_to_text(path: Path, request: pytest.FixtureRequest) -> None:
    check(path, request)
