"""The log of tspc: the logger "tspc", whose lines all start with `tspc:`.

Where the program has set up no logging, lines from INFO on go to stderr.
"""

from __future__ import annotations

import logging
import sys

from tspc.base.state import PROCESS, remembered

log = logging.getLogger("tspc")
_SAID: set[str] = remembered(PROCESS, set())


class _Prefix(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith("tspc:"):
            record.msg = f"tspc: {record.msg}"
        return True


class _Stderr(logging.StreamHandler):
    """Writes to what `sys.stderr` is at the time; silent once the program has set up logging."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)

    @property
    def stream(self) -> object:
        return sys.stderr

    @stream.setter
    def stream(self, value: object) -> None:
        pass


def note(text: str) -> None:
    """A line of what goes on, at INFO."""
    if not log.hasHandlers():
        log.addHandler(_Stderr())
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)
    log.info(text)


def note_once(text: str) -> None:
    """The same text once a process."""
    if text not in _SAID:
        _SAID.add(text)
        note(text)


log.addFilter(_Prefix())
