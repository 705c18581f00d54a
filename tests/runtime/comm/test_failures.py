"""When another rank does not come: who waits where, who is missing, in one message."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from tests.support.group import alone
from tspc.base.errors import RankFailureError
from tspc.runtime.comm import failures
from tspc.runtime.comm.failures import KEY, Lost, failure, lost
from tspc.runtime.comm.requests import Shift

GONE = RuntimeError("[gloo] Connection closed by peer\nand more")


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.ProcessGroup | None]:
    monkeypatch.setattr(failures, "GRACE", 0.2)
    with alone():
        yield dist.group.WORLD


def test_errors_of_communication_are_losses() -> None:
    got = lost(GONE, Shift, "weights", 2)
    assert isinstance(got, Lost) and (got.collective, got.peer) == ("Shift of weights", 2)
    assert got.cause is GONE and got.places == []
    for text in ("NCCL error", "Timed out waiting", "Broken pipe"):
        assert isinstance(lost(RuntimeError(text), Shift, "x"), Lost)
    other = RuntimeError("shapes differ")
    assert lost(other, Shift, "weights") is other


def test_a_failure_says_where_this_rank_waited(group: dist.ProcessGroup) -> None:
    loss = Lost(GONE, "Shift of weights")
    loss.places.append("region 'mlp' (ring)")
    text = str(failure(loss, "tspc::fold", group))
    assert text.startswith(
        "rank 0 waited in tspc::fold, region 'mlp' (ring) for Shift of weights, which failed "
        "([gloo] Connection closed by peer)"
    )
    assert "Do this: read the log of a missing rank" in text


def test_who_is_missing_and_where_others_wait(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda g: [0, 1, 2])
    failures.default_store().set(f"{KEY}1", "waits in the check for Shift with rank 2")
    text = str(failure(Lost(GONE, "Shift of weights", 2), "here", group))
    assert "missing: rank 2; rank 1 waits in the check for Shift with rank 2" in text
    told = failures.default_store().get(f"{KEY}0").decode()
    assert told == "waits in here for Shift of weights with rank 2"


def test_collectives_of_torchs_are_named(group: dist.ProcessGroup) -> None:
    with (
        pytest.raises(RankFailureError, match="waited in a load for a collective of torch's"),
        failures.naming("a load", group),
    ):
        raise GONE
    with pytest.raises(RuntimeError, match="^shapes$"), failures.naming("a load", group):
        raise RuntimeError("shapes")
    with pytest.raises(RankFailureError, match="in a check for AllReduce of checks"):
        failures.fail(GONE, "a check", group, "AllReduce of checks")
