"""Ranges of a sequence are computed on all of it, and stay cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.goldens import cases, check


@cases("windows")
def test_from_text_to_text(path: Path, request: pytest.FixtureRequest) -> None:
    check(path, request)
