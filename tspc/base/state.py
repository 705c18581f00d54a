"""What is remembered beyond one function: every registry of the process, how long it is kept, and
how all of them are emptied.

    PLACES: dict[str, Place] = remembered(GROUP, {})

A test holds that no module has a container of its own beside these.
"""

from __future__ import annotations

import enum
import inspect
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


class Lifetime(enum.Enum):
    """How long what is in a registry is kept."""

    CODE = "filled while tspc is imported, or by `tspc.rule`"
    PROCESS = "what is installed in torch or a library, or was said once"
    GROUP = "made over the default process group, and gone with it"
    MODEL = "weak: gone with its model"
    CALL = "open during a call, a compile or an accumulation"


CODE, PROCESS, GROUP, MODEL, CALL = Lifetime


@dataclass(frozen=True)
class Registry:
    """module: where it stands. what: a container, or a `threading.local`."""

    module: str
    lifetime: Lifetime
    what: object

    def clear(self) -> None:
        clear = getattr(self.what, "clear", None) or vars(self.what).clear
        clear()


REGISTRIES: list[Registry] = []


def remembered(lifetime: Lifetime, what: T) -> T:
    """The same container, known here."""
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    REGISTRIES.append(Registry(frame.f_back.f_globals["__name__"], lifetime, what))
    return what


def reset(*lifetimes: Lifetime) -> None:
    """Empty the registries of these lifetimes; without any, all that a run fills: of groups, models
    and calls."""
    for r in REGISTRIES:
        if r.lifetime in (lifetimes or (GROUP, MODEL, CALL)):
            r.clear()
