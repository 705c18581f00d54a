"""What the cost model knows of a device: a table by name, never measured implicitly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from tspc.base.errors import OptionError


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


def hardware(choice: object, device: str) -> Hardware:
    """A table by name or as a dict; given None: of the device ("cpu" or an accelerator's name).

    Raises `OptionError` for an unknown name or field.
    """
    if isinstance(choice, Hardware):
        return choice
    if isinstance(choice, Mapping):
        names = {f.name for f in fields(Hardware)}
        if set(choice) != names:
            raise OptionError(f"hardware={dict(choice)}: a table has {', '.join(sorted(names))}")
        try:
            return Hardware(**{k: float(v) for k, v in choice.items()})
        except (TypeError, ValueError):
            raise OptionError(f"hardware={dict(choice)}: its values are numbers") from None
    if choice is None:
        matching = [n for n in HARDWARE if n in device.lower()]
        return HARDWARE[matching[0] if matching else "h100"]
    if not isinstance(choice, str) or choice not in HARDWARE:
        raise OptionError(f"hardware={choice!r}; valid: {', '.join(HARDWARE)}, or a table")
    return HARDWARE[choice]


def device_name(device: torch.device) -> str:
    """ "cpu", or the accelerator's product name ("h100" where there is none to ask)."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return "cpu" if device.type == "cpu" else "h100"
