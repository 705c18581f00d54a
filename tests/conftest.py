"""Fixtures: a gloo world per number of ranks, kept for all tests."""

from __future__ import annotations

import gc
import os
import zlib
from collections.abc import Callable, Iterator

import pytest

from tests.support import preload  # noqa: F401
from tests.support.world import World

# a compile makes many objects that stay: looking through them took a fifth of the time
gc.set_threshold(50_000, 20, 20)
os.environ["TSPC_STRICT_INTERNAL"] = "1"  # the ladder hides no defect; worlds inherit it


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    worlds: dict[int, World] = {}

    def get(ranks: int) -> World:
        for other in [r for r in worlds if r != ranks]:
            worlds.pop(other).close()
        if ranks not in worlds:
            worlds[ranks] = World(ranks)
        return worlds[ranks]

    yield get
    for w in worlds.values():
        w.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden texts anew")
    parser.addoption("--scripts", type=int, default=8, help="how many training scripts are drawn")
    parser.addoption("--graphs", type=int, default=6, help="how many random graphs are drawn")
    parser.addoption("--wide", action="store_true", help="also what `make test` only samples")
    parser.addoption("--integrations", action="store_true", help="also scripts around libraries")
    parser.addoption("--soak", action="store_true", help="also runs of many minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker in ("wide", "integrations", "soak"):
        if not config.getoption(f"--{marker}"):
            _leave_out(config, items, [i for i in items if i.get_closest_marker(marker)])
    if not config.getoption("--wide") and not any("::" in a for a in config.args):
        _leave_out(config, items, _beyond_a_sample(items))


def _leave_out(config: pytest.Config, items: list[pytest.Item], some: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=some)
    names = {id(i) for i in some}
    items[:] = [i for i in items if id(i) not in names]


def _beyond_a_sample(items: list[pytest.Item]) -> list[pytest.Item]:
    """Of tests that are `sampled(k)`: all cases but about one of k, the same every time, and at
    least one of each test."""
    cases: dict[str, list[pytest.Item]] = {}
    for i in items:
        if i.get_closest_marker("sampled") is not None:
            cases.setdefault(i.nodeid.partition("[")[0], []).append(i)
    out = []
    for same in cases.values():
        order = sorted(same, key=lambda i: zlib.crc32(i.nodeid.encode()))
        (share,) = same[0].get_closest_marker("sampled").args  # type: ignore[union-attr]
        out += order[-(-len(same) // share) :]
    return out
