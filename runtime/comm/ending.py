"""The end of a process that does not destroy its process group.

A collective that a thread of torch's ran (gloo's workers) is done before that thread has let go of
its tensors. If it is the last to do so while the interpreter ends, it cannot have the lock that
freeing them takes, and the process aborts.
"""

from __future__ import annotations

import atexit
import ctypes
import time
from collections import deque

import torch

from tspc.base.state import PROCESS, remembered

SMALL = 1 << 16  # bytes; larger ones are done with long before a process ends
PAUSE = 0.05  # seconds in which the threads let go

_LAST: deque[torch.Tensor] = remembered(PROCESS, deque(maxlen=64))


def hold(*tensors: object) -> None:
    """Keep the last small ones that such threads were given: no thread is the last to let go."""
    _LAST.extend(x for x in tensors if isinstance(x, torch.Tensor) and x.nbytes <= SMALL)


def _end() -> None:
    """Before the interpreter ends: the threads run once more, and what is held is never freed."""
    if _LAST:
        time.sleep(PAUSE)
    for x in _LAST:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(x))


atexit.register(_end)
