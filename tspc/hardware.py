"""What the cost model knows of a device: a table by name, never measured implicitly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from tspc.errors import OptionError


@dataclass(frozen=True)
class Hardware:
    """One rank and its link.

    flops: of matrix products of 2-byte numbers, a second; wider ones take in proportion.
    bandwidth: bytes a second that a rank sends while it receives as much. latency: seconds of one
    communication. overlap: the share of moving that runs beside computing; on a CPU both take the
    same cores.
    """

    flops: float
    bandwidth: float
    latency: float
    overlap: float


# sustained, not peak: about half of the data sheets' dense 16-bit figures and links
HARDWARE = {
    # gloo between processes that share two cores: `bench/profiles.py`
    "cpu": Hardware(6e10, 7e8, 1e-3, 0.0),
    "a100": Hardware(1.6e14, 2e11, 2e-5, 1.0),
    "h100": Hardware(4.5e14, 3e11, 2e-5, 1.0),
    "h200": Hardware(4.5e14, 3e11, 2e-5, 1.0),
    "mi300x": Hardware(5.5e14, 2.5e11, 2e-5, 1.0),
}


def hardware(given: Any, device: str) -> Hardware:
    """A table by name or as a dict; given None: of the device ("cpu" or an accelerator's name).

    Raises `OptionError` for an unknown name or field.
    """
    if isinstance(given, Hardware):
        return given
    if isinstance(given, Mapping):
        names = {f.name for f in fields(Hardware)}
        if set(given) != names:
            raise OptionError(f"hardware={dict(given)}: a table has {', '.join(sorted(names))}")
        try:
            return Hardware(**{k: float(v) for k, v in given.items()})
        except (TypeError, ValueError):
            raise OptionError(f"hardware={dict(given)}: its values are numbers") from None
    if given is None:
        known = [n for n in HARDWARE if n in device.lower()]
        return HARDWARE[known[0] if known else "h100"]
    if not isinstance(given, str) or given not in HARDWARE:
        raise OptionError(f"hardware={given!r}; valid: {', '.join(HARDWARE)}, or a table")
    return HARDWARE[given]


def device_name(device: torch.device) -> str:
    """ "cpu", or the accelerator's product name ("h100" where there is none to ask)."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return "cpu" if device.type == "cpu" else "h100"
