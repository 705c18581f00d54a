"""The README's code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_runs(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    space: dict[str, object] = {}
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), space)
    if "found" in space:
        assert space["found"].worst < 1e-5  # type: ignore[attr-defined]
        assert "{blocks.1.mlp}" in capsys.readouterr().out


def test_there_are_blocks() -> None:
    assert len(BLOCKS) == 3
