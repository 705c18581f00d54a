"""Broken functions are noticed by the test at the path of their module: of a few modules here, of
all by `make broken`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.house.broken import at_import, functions_of, is_empty, label, nothing
from tests.house.test_imports import ROOT
from tspc.ir import layout

SAMPLE = ["tspc.factors.placement", "tspc.ops.recompute", "tspc.frontend.outside"]


def broken(*modules: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.house.broken", *modules]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_all_of_a_sample_are_noticed() -> None:
    done = broken(*SAMPLE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(":")[0] for line in done.stdout.split("\n")[:-2]] == SAMPLE


def test_a_broken_function_gives_nothing() -> None:
    kept = 3

    def plain(x: int) -> int:
        return x + 1

    def closed(x: int) -> int:
        return x + kept

    for f in (plain, closed):
        f.__code__ = nothing(f.__code__)
        assert f(1) is None


def test_functions_of_a_module() -> None:
    names = [label(f) for f in functions_of("tspc.ir.layout")]
    assert names == sorted(names, key=lambda n: int(n.rpartition(":")[2]))
    assert any(n.startswith("Layout.") for n in names) and layout.__name__ == "tspc.ir.layout"
    assert "remembered" in at_import("tspc.ir.body") and "evaluate" not in at_import("tspc.ir.body")


def test_a_body_of_nothing() -> None:
    def docstring() -> None:
        """Says what."""

    def value() -> int:
        return 3

    assert is_empty(docstring) and not is_empty(value)
