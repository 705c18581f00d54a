"""What is stored in parts: which part a rank has, whole again, written back, partial results."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from tests.support.group import alone, cut
from tspc.runtime.params import stored

X = torch.arange(12.0).view(4, 3)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    with alone() as m:
        stored.claim(m)
        yield m


def test_only_what_is_on_a_claimed_mesh_is_stored(mesh: DeviceMesh) -> None:
    assert stored.is_stored(cut(X, mesh)) and stored.is_ours(mesh) and not stored.is_stored(X)
    other = DeviceMesh("cpu", [0], mesh_dim_names=("other",))
    assert not stored.is_stored(cut(X, other)) and not stored.is_ours(other)


def test_cuts_of_a_tensor(mesh: DeviceMesh) -> None:
    d = cut(X, mesh, 1)
    whole = DTensor.from_local(X, mesh, [Replicate()], run_check=False)
    assert stored.is_cut(d) and not stored.is_cut(whole)
    assert stored.cuts(d._spec) == [(0, 1)] and stored.cuts(whole._spec) == []
    assert stored.dim_of(Shard(1)) == 1
    with pytest.raises(AssertionError, match="R"):
        stored.dim_of(Replicate())


@pytest.mark.parametrize("size,ranks", [(7, 3), (2, 4), (0, 2), (6, 3)])
def test_rows_of_ranks_are_torchs_chunks(size: int, ranks: int) -> None:
    at = torch.arange(size)
    parts = [at.narrow(0, *stored._rows(size, ranks, r)).tolist() for r in range(ranks)]
    assert sum(parts, []) == at.tolist()
    if size:
        wanted = [p.tolist() for p in at.chunk(ranks)]
        assert [p for p in parts if p] == wanted


def test_parts_of_what_broadcasts(mesh: DeviceMesh) -> None:
    spec = cut(X, mesh)._spec
    assert (
        torch.equal(stored.chunk(X, spec), X) and stored.chunk(X, spec).data_ptr() == X.data_ptr()
    )
    assert stored.chunk(X[0], spec).shape == (3,) and stored.chunk(X[:1], spec).shape == (1, 3)
    assert stored.holds_rows(spec, [0])
    empty = cut(torch.ones(0, 3), mesh)._spec
    assert not stored.holds_rows(empty, [0])


def test_whole_again_and_told_once(
    mesh: DeviceMesh, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "NOTED", 1)
    monkeypatch.setattr(stored, "_TOLD", set())
    d = cut(X, mesh)
    with caplog.at_level(logging.WARNING, "tspc"):
        for _ in range(2):
            assert torch.equal(stored.whole(d, "aten.sort"), X)
    assert len(caplog.messages) == 1 and "aten.sort outside of the compiled" in caplog.text
    assert stored.whole(X) is X and stored.whole("text") == "text"
    replicated = DTensor.from_local(X, mesh, [Replicate()], run_check=False)
    assert stored.whole(replicated) is replicated._local_tensor


def test_written_back(mesh: DeviceMesh) -> None:
    d = cut(X, mesh)
    stored.put(d, X + 5)
    assert torch.equal(d.to_local(), X + 5)


def test_a_part_as_a_stored_tensor(mesh: DeviceMesh) -> None:
    like = cut(X, mesh)._spec
    same = stored.wrap(X, like)
    assert same._spec is like and same.shape == (4, 3)
    other = stored.wrap(X.t().contiguous(), like, [Shard(1)], (3, 4))
    assert other.shape == (3, 4) and other.placements == (Shard(1),) and other.stride() == (4, 1)
    assert stored.wrap(X.int(), like).dtype == torch.int32
    assert stored._contiguous((2, 0, 3)) == (3, 3, 1)


def test_partial_results_of_the_ranks(mesh: DeviceMesh) -> None:
    spec = cut(X, mesh)._spec
    assert torch.equal(stored.parts(X[0], spec), X[:1])
    flag = stored.parts(torch.tensor(True), spec)
    assert flag.dtype == torch.bool and flag.tolist() == [True]
    empty = cut(torch.ones(0, 3), mesh)._spec
    assert len(stored.parts(X[0], empty)) == 0
    assert len(stored.parts(X[0], empty, everyone=True)) == 1
