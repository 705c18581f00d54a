"""The log: lines begin with `tspc:`, go to stderr where the program has set up none, and those of
once come once."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tspc.base import journal


@contextmanager
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process without any logging, with a journal of its own; pytest logs during a test."""
    with monkeypatch.context() as m:
        m.setattr(logging.getLogger(), "handlers", [])
        m.setattr(journal.log, "handlers", [])
        m.setattr(journal.log, "level", logging.NOTSET)
        m.setattr(journal, "_SAID", set())
        yield


def test_a_line_goes_to_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with alone(monkeypatch):
        journal.note("begun")
        journal.note("tspc: ended")
    assert capsys.readouterr().err == "tspc: begun\ntspc: ended\n"


def test_a_line_of_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with alone(monkeypatch):
        for text in ("a", "b", "a"):
            journal.note_once(text)
    assert capsys.readouterr().err == "tspc: a\ntspc: b\n"


def test_stderr_is_silent_once_the_program_logs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: records.append(record.getMessage()))
    with alone(monkeypatch):
        journal.note("before")
        logging.getLogger().handlers.append(handler)
        journal.note("after")
    assert capsys.readouterr().err == "tspc: before\n" and records == ["tspc: after"]


def test_setting_the_stream_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`logging.StreamHandler` sets it; it is `sys.stderr` all the same."""
    handler = journal._Stderr(sys.stdout)
    assert handler.stream is sys.stderr
