"""Attention that is written out becomes one op."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.goldens import cases, check


@cases("attend")
def test_from_text_to_text(path: Path, request: pytest.FixtureRequest) -> None:
    check(path, request)
