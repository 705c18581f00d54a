"""Masks of attention become predicates."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.goldens import cases, check


@cases("masks")
def test_from_text_to_text(path: Path, request: pytest.FixtureRequest) -> None:
    check(path, request)
