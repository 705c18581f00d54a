"""Over the replicas: parts are gathered to chunks, gradients averaged, of chunks or of parts."""

from __future__ import annotations

import pytest
import torch

from tspc.runtime.comm import replicas as over
from tspc.runtime.comm.drivers import lockstep, record
from tspc.runtime.comm.replicas import gather, mean, scatter_mean
from tspc.runtime.comm.requests import Axis


def axes(count: int) -> list[Axis]:
    return [Axis("replicas", count, r) for r in range(count)]


def chunks(x: torch.Tensor, dim: int, ranks: int) -> list[torch.Tensor]:
    """As torch cuts, empty ones at the end."""
    parts = list(x.chunk(ranks, dim))
    return [*parts, *[x.narrow(dim, 0, 0)] * (ranks - len(parts))]


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_parts_of_any_length(replicas: int) -> None:
    """Empty parts, other dims, two dtypes: gathered whole, and the mean of the gradients."""
    shapes = [((1, 4), 0, torch.float64), ((0, 3), 0, torch.float64), ((5, 7), 1, torch.float64)]
    shapes += [((7, 2), 0, torch.float32), ((2, 3, 4), 1, torch.float32)]
    torch.manual_seed(0)
    wholes = [torch.randn(s, dtype=t) for s, _, t in shapes]
    dims = [d for _, d, _ in shapes]
    sizes = [x.shape[d] for x, d in zip(wholes, dims)]
    parts = [[chunks(x, d, replicas)[r] for x, d in zip(wholes, dims)] for r in range(replicas)]
    with record() as sent:
        found = lockstep([gather(a, p, dims, sizes) for a, p in zip(axes(replicas), parts)])
    assert len(sent) == (2 if replicas > 1 else 0)
    for mine in found:
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(mine, wholes))
    grads = [[torch.randn_like(x) for x in wholes] for _ in range(replicas)]
    found = lockstep([scatter_mean(a, g, dims) for a, g in zip(axes(replicas), grads)])
    for r, mine in enumerate(found):
        for i, (g, d) in enumerate(zip(mine, dims)):
            wanted = torch.stack([x[i] for x in grads]).mean(0)
            torch.testing.assert_close(g, chunks(wanted, d, replicas)[r])


def test_means_by_type_and_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(over, "BUCKET", 40)
    grads = [
        [torch.full((4,), 2.0 * r), torch.full((8,), 1.0 * r), torch.ones(2).double() * r]
        for r in range(3)
    ]
    with record() as sent:
        found = lockstep([mean(a, g) for a, g in zip(axes(3), grads)])
    assert [s.shape for s in sent] == [(4,), (8,), (2,)] and {s.link for s in sent} == {"replicas"}
    for got in found:
        assert [x[0].item() for x in got] == [2, 1, 1] and got[2].dtype == torch.float64


def test_means_in_a_chosen_type() -> None:
    grads = [[torch.tensor([2048.0, 1.0], dtype=torch.float16)] for _ in range(2)]
    for reduce, link in ((None, torch.float32), (torch.float64, torch.float64)):
        with record() as sent:
            lockstep([mean(a, g, reduce) for a, g in zip(axes(2), grads)])
            lockstep([scatter_mean(a, g, [0], reduce) for a, g in zip(axes(2), grads)])
        assert {s.dtype for s in sent} == {link}
