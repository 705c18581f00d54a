"""docs/optimizers.md lists the optimizers that the habits try, in their order."""

from __future__ import annotations

from pathlib import Path

from tests.parity.habits.optimizers import OPTIMIZERS


def test_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert rows[2:] == list(OPTIMIZERS)
