"""Ranges of the sequence are cut from the whole after the program."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.goldens import cases, check


@cases("outputs")
def test_from_text_to_text(path: Path, request: pytest.FixtureRequest) -> None:
    check(path, request)
