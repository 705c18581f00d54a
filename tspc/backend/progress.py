"""What a long compile tells on one rank: a line when it takes over two seconds, its stage on a
terminal, and a line when it is done, with seconds and what came from torch's caches."""

from __future__ import annotations

import gc
import importlib.util
import sys
import threading
import time

from tspc.base.journal import note
from tspc.base.state import CALL, remembered
from tspc.seams.lowering import counters

AFTER = 2.0  # seconds
RARELY = (50_000, 20, 20)  # gc's thresholds
_HITS = (("aot_autograd", "autograd_cache_hit"), ("inductor", "fxgraph_cache_hit"))
_OPEN: list[Compiling] = remembered(CALL, [])


class Compiling:
    """A compile of a graph. quiet: on the other ranks.

    Most of the objects that it makes stay until its end: Python looks for garbage less often.
    """

    def __init__(self, what: str, quiet: bool):
        self.what, self.quiet, self.status = what, quiet, None
        self.now, self.told, self.lock = "", False, threading.Lock()

    def __enter__(self) -> Compiling:
        self.start, self.before = time.monotonic(), _hits()
        self.thresholds = gc.get_threshold()
        if all(self.thresholds):  # 0: never
            gc.set_threshold(*map(max, self.thresholds, RARELY))
        self.timer = threading.Timer(AFTER, self._slow)
        self.timer.daemon = True
        if not self.quiet:
            self.timer.start()
        _OPEN.append(self)
        return self

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        _OPEN.remove(self)
        gc.set_threshold(*self.thresholds)
        self.timer.cancel()
        with self.lock:
            if self.status is not None:
                self.status.stop()
            if not self.told or kind is not None:
                self.told = True  # a timer that is late stays silent
                return
        hits, seconds = _hits() - self.before, time.monotonic() - self.start
        note(f"compiled {self.what} in {seconds:.1f} s, {hits} of its parts from the cache")

    def _slow(self) -> None:
        with self.lock:
            if self.told:
                return
            self.told = True
            note(f"compiles {self.what}")
            if sys.stderr.isatty() and importlib.util.find_spec("rich"):
                from rich.console import Console

                self.status = Console(stderr=True).status(self._line())
                self.status.start()

    def _line(self) -> str:
        return f"tspc: compiles {self.what}: {self.now}"


def stage(name: str) -> None:
    """What the compile that goes on does now."""
    for c in _OPEN:
        c.now = name
        if c.status is not None:
            c.status.update(c._line())


def _hits() -> int:
    return sum(counters[group][name] for group, name in _HITS)
