"""Started by a launcher: the process group is made where the script made none."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tspc
from tspc.base import journal
from tspc.runtime.comm import launched

ROOT = Path(__file__).parents[2]
README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
REPORT = """
shapes = [list(getattr(p, "_local_tensor", p).shape) for p in model.parameters()]
import json, os, pathlib
pathlib.Path(os.environ["OUT"], os.environ["RANK"]).write_text(json.dumps([loss.item(), shapes]))
"""


@pytest.mark.dist
def test_readmes_first_example_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import torch\ntorch.manual_seed(0)\n" + README[0] + REPORT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(script)],
        env={**os.environ, "OUT": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = done.stderr.count("tspc: no process group: made one of 2 ranks (gloo)")
    assert told == 1, done.stderr
    torch.manual_seed(0)
    linear = torch.nn.Linear
    model = torch.nn.Sequential(linear(16, 64), torch.nn.GELU(), linear(64, 16))
    wanted = model(torch.randn(2, 8, 16)).square().mean().item()
    for rank in range(2):
        loss, shapes = json.loads((tmp_path / str(rank)).read_text())
        assert loss == pytest.approx(wanted, rel=1e-6)
        assert shapes == [[32, 16], [64], [16, 32], [16]]


@pytest.mark.parametrize(
    "given,text",
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2 but MASTER_ADDR, MASTER_PORT is not"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE in the environment is 'two', no number"),
    ],
)
def test_half_an_environment(monkeypatch: Any, given: dict[str, str], text: str) -> None:
    for name in launched.NEEDED:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(tspc.PlanError, match=text):
        launched.join(torch.device("cpu"))


def test_alone_is_told_once(monkeypatch: Any, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(journal, "_SAID", set())
    with caplog.at_level(logging.INFO, "tspc"):
        assert not launched.join(torch.device("cpu")) and not launched.join(torch.device("cpu"))
    (line,) = caplog.messages
    assert line.startswith("tspc: no process group") and "runs on one rank" in line
