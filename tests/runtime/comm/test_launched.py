"""The process group of a launcher's environment: made where there is none, and what is wrong with
the environment."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tspc.base import journal
from tspc.base.errors import PlanError
from tspc.runtime.comm import launched

CPU = torch.device("cpu")
NAMES = (*launched.NEEDED, "LOCAL_RANK", "GROUP_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(journal, "_SAID", set())
    yield lambda **given: [monkeypatch.setenv(n, v) for n, v in given.items()]


def test_no_launcher_is_one_rank(environment: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert not launched.join(CPU)
    environment(WORLD_SIZE="1")
    assert not launched.join(CPU)


@pytest.mark.parametrize(
    "names,text",
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "but MASTER_ADDR, MASTER_PORT is not"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE in the environment is 'two', no number"),
    ],
)
def test_half_an_environment(environment: Any, names: dict[str, str], text: str) -> None:
    environment(**names)
    with pytest.raises(PlanError, match=text):
        launched.join(CPU)


def test_a_group_is_made_and_left(
    environment: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of this process alone; what it would be called with for two ranks."""
    environment(WORLD_SIZE="2", RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1")
    monkeypatch.setattr(launched, "_store", lambda rank, ranks: dist.HashStore())
    monkeypatch.setattr(launched.atexit, "register", lambda fn: fn)
    called: list[dict[str, Any]] = []

    def init(backend: str, **kwargs: Any) -> None:
        called.append({"backend": backend, **kwargs})

    monkeypatch.setattr(dist, "init_process_group", init)
    with caplog.at_level("INFO", "tspc"):
        assert launched.join(CPU)
    (one,) = called
    assert (one["backend"], one["rank"], one["world_size"]) == ("gloo", 0, 2)
    assert "made one of 2 ranks (gloo)" in caplog.text
    launched._leave()
    assert not dist.is_initialized()


def test_restarts_have_a_store_each(environment: Any) -> None:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    environment(MASTER_ADDR="localhost", MASTER_PORT=port, TORCHELASTIC_RESTART_COUNT="3")
    store = launched._store(0, 1)
    store.set("k", "v")
    assert store.underlying_store.get("start 3/k") == b"v"  # type: ignore[attr-defined]


def test_where_a_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched.runs_on(CPU) == "cpu"
    there = torch.device("cuda", 1)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: there)
    assert launched.runs_on(torch.device("meta")) == "cuda"


def test_each_process_has_its_device(environment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    environment(LOCAL_RANK="1", RANK="1")
    assert launched._own_device("cuda", torch.device("cuda")) == torch.device("cuda", 1)
    assert chosen == [1]
    with pytest.raises(PlanError, match="the model is on cuda:0, the device of LOCAL_RANK 1"):
        launched._own_device("cuda", torch.device("cuda", 0))


def test_leaving_destroys_the_group() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    launched._leave()
    assert not dist.is_initialized()
