"""Habits of scripts: equal to one device on 2 real ranks, or an error that says why not."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest

from tests.parity import habits

pytestmark = pytest.mark.dist
MODULES = [m.name for m in pkgutil.iter_modules(habits.__path__)]


@pytest.mark.parametrize("module", MODULES)
def test_holds(world: Any, module: str) -> None:
    path = f"tests.parity.habits.{module}"
    importlib.import_module(path)
    names = [n for n in habits.HABITS if n.startswith(f"{module}.")]
    assert names
    for rank, wrong in enumerate(world(2).run(habits.run, names=names, module=path)):
        listed = "\n".join(f"{n} on rank {rank}: {why}" for n, why in wrong.items())
        assert not wrong, f"{len(wrong)} of {len(names)} do not hold\n{listed}"
