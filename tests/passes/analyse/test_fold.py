"""Regions become the bodies of fold nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.goldens import cases, check


@cases("fold")
def test_from_text_to_text(path: Path, request: pytest.FixtureRequest) -> None:
    check(path, request)
