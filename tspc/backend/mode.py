"""`torch.compile(mode=...)`, which is of Inductor on one rank."""

from __future__ import annotations

from typing import Any

from tspc.base.errors import OptionError
from tspc.base.options import one_of
from tspc.seams.lowering import list_mode_options


def mode_options(mode: str | None) -> dict[str, Any]:
    """What Inductor makes of it. Raises `OptionError` for an unknown one."""
    modes = list_mode_options()
    if mode is not None and not one_of(mode, tuple(modes)):
        raise OptionError(f"mode={mode!r}; valid: {', '.join(map(repr, modes))}")
    return dict(modes[mode]) if mode is not None else {}
