"""What a long compile tells."""

from __future__ import annotations

import io
import logging
import re
import sys
import time

import pytest

from tspc.backend import progress


@pytest.mark.parametrize("quiet,seconds,count", [(False, 0.3, 2), (False, 0.0, 0), (True, 0.3, 0)])
def test_a_long_compile_is_told(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    quiet: bool,
    seconds: float,
    count: int,
) -> None:
    monkeypatch.setattr(progress, "AFTER", 0.05 if seconds else 60.0)
    with caplog.at_level(logging.INFO, "tspc"), progress.Compiling("a graph of 3 ops", quiet):
        progress.stage("decides")
        time.sleep(seconds)
    assert len(caplog.messages) == count
    if count:
        first, last = caplog.messages
        assert first == "tspc: compiles a graph of 3 ops"
        pattern = r"tspc: compiled a graph of 3 ops in \d+\.\d s, 0 of its parts from the cache"
        assert re.fullmatch(pattern, last)


def test_one_that_fails_is_not_told_as_done(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "AFTER", 0.01)
    with (
        caplog.at_level(logging.INFO, "tspc"),
        pytest.raises(ValueError, match="no"),
        progress.Compiling("a graph", False),
    ):
        time.sleep(0.2)
        raise ValueError("no")
    assert caplog.messages == ["tspc: compiles a graph"]
    assert not progress._OPEN


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_its_stage_is_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(progress, "AFTER", 0.05)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with progress.Compiling("a graph of 3 ops", False):
        progress.stage("decides")
        time.sleep(0.4)
        progress.stage("compiles its folds")
        time.sleep(0.4)
    for stage in ("decides", "compiles its folds"):
        assert f"tspc: compiles a graph of 3 ops: {stage}" in terminal.getvalue()
