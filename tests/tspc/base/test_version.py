"""The version: three numbers, the same from the package and in its metadata's source."""

from __future__ import annotations

import re

import tspc
from tests.house.test_imports import ROOT
from tspc.base.version import __version__


def test_three_numbers_that_the_package_has_too() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    assert tspc.__version__ == __version__
    assert '{ attr = "tspc.base.version.__version__" }' in (ROOT / "pyproject.toml").read_text()
