"""The options of `torch.compile(model, backend="tsp", options={...})`, checked by name and
value."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from tspc.base.errors import OptionError
from tspc.base.hardware import Hardware, hardware
from tspc.base.usage import check_mesh, said

SCHEDULES = ("auto", "ring", "broadcast", "gather", "stationary")
Budget = str | float | int
MAX_SPEED, MIN = "max-speed", "min"
VALID = (
    f"{MAX_SPEED!r}, {MIN!r}, a share of what {MAX_SPEED!r} keeps from 0.0 to 1.0, or bytes per "
    "rank as an int or as text such as '2GiB'"
)
_UNITS = {
    "B": 1,
    **{f"{u}B": 1000**k for k, u in enumerate("KMGT", 1)},
    **{f"{u}IB": 1024**k for k, u in enumerate("KMGT", 1)},
}
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_CHOICES: dict[str, tuple[object, ...]] = {
    "layout": ("auto", "contiguous", "zigzag"),
    "outputs": ("auto", "full", "sharded"),
    "check_inputs": ("auto", True, False),
    "strict": (True, False),
    "compiler": ("inductor", "eager"),
    "replicas": ("replicate", "shard"),
    "check_nan": (True, False),
}


@dataclass(frozen=True)
class Options:
    """What `options={...}` may hold.

    mesh: a `DeviceMesh` of one or two axes; default the world as one axis.
    axis: the name of the mesh dim to fold on; the other one is data-parallel. Needed on a mesh of
        two axes of which none is called "tsp".
    replicas: what the data-parallel axis does with parameters, gradients and optimizer state:
        "replicate" them, or "shard" the chunks of the first axis once more (ZeRO, Rajbhandari et
        al. 2020).
    plan: what `tspc.plan` returned, with its own options and mesh.
    schedule: "auto", one of ring, broadcast, gather, stationary, or a dict from region name or glob
        to one.
    layout: of the sequence over the ranks: "zigzag" gives each rank an early and a late chunk, so
        that causal attention is even work; "contiguous" one chunk; "auto" the first where there is
        causal attention.
    outputs: "auto" defers the non-scalar outputs of a program with a loss; "full" returns all
        whole; "sharded" as DTensors.
    check_inputs: at every call the contents of all inputs, the optimizer steps taken and the
        gradients held are compared over the axis ("auto" and True), or nothing is (False).
    check_nan: after each forward and backward of the compiled model, what is not finite is an error
        that names it, alike on all ranks.
    memory_budget: "max-speed" keeps a region's matrix products for its backward, each rank its
        share; "min" recomputes them; a share from 0.0 to 1.0 of what "max-speed" keeps, or bytes
        per rank (an int or text such as "2GiB"), lets some regions keep theirs, as many as fit at
        the sizes of the compile.
    param_dtype: what the float parameters are cast to before they travel and are computed with;
        stored as they are.
    reduce_dtype: what gradients add up in over the ranks; default fp32, or theirs where it is
        wider.
    hardware: the cost model's table for schedule "auto": a name of `tspc.base.hardware` or a dict
        of its fields; default the device's.
    strict: an op that would run replicated is an error.
    compiler: "inductor", or "eager" to run the rewritten graphs without it.
    """

    mesh: DeviceMesh | None = None
    axis: str | None = None
    replicas: str = "replicate"
    plan: Any = None
    schedule: str | Mapping[str, str] = "auto"
    layout: str = "auto"
    outputs: str = "auto"
    check_inputs: str | bool = "auto"
    strict: bool = False
    compiler: str = "inductor"
    hardware: str | Mapping[str, float] | Hardware | None = None
    memory_budget: Budget = "max-speed"
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    check_nan: bool = False

    @property
    def cut(self) -> bool:
        """Parameters are cut over the replicas too."""
        return self.replicas == "shard"


def parse(chosen: Mapping[str, Any] | None) -> Options:
    """What is not given is the plan's, if there is one.

    Raises `OptionError` for an unknown name or a bad value, naming the valid ones.
    """
    if chosen is not None and not isinstance(chosen, Mapping):
        raise OptionError(f"options is a dict by name, not {said(chosen)}")
    chosen = dict(chosen or {})
    _check_names(chosen)
    for name, choices in _CHOICES.items():
        if name in chosen and not one_of(chosen[name], choices):
            raise OptionError(f"{name}={chosen[name]!r}; valid: {', '.join(map(repr, choices))}")
    check_mesh("options", chosen.get("mesh"))
    if not isinstance(chosen.get("axis"), (str, type(None))):
        raise OptionError(f"axis is the name of a dim of the mesh, not {said(chosen['axis'])}")
    plan = chosen.get("plan")
    if plan is not None and not isinstance(getattr(plan, "options", None), Options):
        raise OptionError(f"plan is what tspc.plan(...) returns, not {said(plan)}")
    if "memory_budget" in chosen:
        memory_limit(chosen["memory_budget"], 0)
    _check_schedule(chosen.get("schedule", "auto"))
    for name in ("param_dtype", "reduce_dtype"):
        if not one_of(chosen.get(name), (None, *FLOATS)):
            valid_types = ", ".join(map(str, FLOATS))
            raise OptionError(f"{name}={chosen[name]!r}; valid: None, {valid_types}")
    if chosen.get("hardware") is not None:
        hardware(chosen["hardware"], "")
    return replace(getattr(plan, "options", Options()), **chosen)


def _check_names(chosen: Mapping[str, object]) -> None:
    valid = [f.name for f in fields(Options)]
    for name in chosen:
        if name not in valid:
            close = difflib.get_close_matches(str(name), valid, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise OptionError(f"unknown option {name!r}{hint} (valid: {', '.join(valid)})")


def _check_schedule(schedule: object) -> None:
    values = schedule.values() if isinstance(schedule, Mapping) else [schedule]
    if isinstance(schedule, Mapping) and any(not isinstance(k, str) for k in schedule):
        raise OptionError(f"schedule by region: names or globs are strings, not {list(schedule)}")
    for v in values:
        if not one_of(v, SCHEDULES):
            raise OptionError(f"schedule={v!r}; valid: {', '.join(map(repr, SCHEDULES))}")


def memory_limit(budget: object, most: int) -> float:
    """Bytes of one rank, of the `most` that there are to keep. Raises `OptionError` naming what is
    valid."""
    if isinstance(budget, str):
        if budget in (MAX_SPEED, MIN):
            return most if budget == MAX_SPEED else 0
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Z]+)", budget.strip().upper())
        if match and match[2] in _UNITS:
            return float(match[1]) * _UNITS[match[2]]
    elif isinstance(budget, float) and 0 <= budget <= 1:
        return budget * most
    elif isinstance(budget, int) and not isinstance(budget, bool) and budget >= 0 and budget != 1:
        return budget
    hint = "; one byte is '1B', all of it 1.0" if type(budget) is int and budget == 1 else ""
    raise OptionError(f"memory_budget={budget!r}; valid: {VALID}{hint}")


def one_of(value: object, choices: tuple[object, ...]) -> bool:
    """Values that are no plain ones (tensors) are not compared."""
    plain = isinstance(value, (str, int, float))
    return any(value is c or (plain and value == c) for c in choices)
