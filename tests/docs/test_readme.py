"""The README's code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.test_example_scripts import finished, start

TEXT = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_runs(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), space)
    if "found" in space:
        assert space["found"].worst < 1e-5  # type: ignore[attr-defined]
        assert "{blocks.1.mlp}" in capsys.readouterr().out


STRIDED = """
import torch
from tests.support.models import strided
for name in ("randn", "randint"):
    def draw(*args, real=getattr(torch, name), **kwargs):
        return strided(real(*args, **kwargs))
    setattr(torch, name, draw)
"""


@pytest.mark.dist
@pytest.mark.integrations
@pytest.mark.parametrize("before", ["", STRIDED], ids=["as-written", "strided"])
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_runs_on_ranks(number: int, before: str, tmp_path: Path) -> None:
    (tmp_path / "block.py").write_text(before + BLOCKS[number])
    _, errors, code = finished(
        start(2, tmp_path / "block.py", folder=tmp_path, compiler="inductor")
    )
    assert code == 0, errors


def test_there_are_blocks() -> None:
    assert len(BLOCKS) == 5
