"""Fixtures: a gloo world per number of ranks, kept for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.world import World


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
    parser.addoption("--scripts", type=int, default=24, help="how many training scripts are drawn")
