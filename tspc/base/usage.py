"""What the public functions are called with: `OptionError` says what was given, where, and what to
give."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh

from tspc.base.errors import OptionError, PlanError

MOST = 4096  # ranks of an axis
MODEL = "a torch.nn.Module, or what torch.compile made of one"
MESH = 'a DeviceMesh, as init_device_mesh("cpu", (2,), mesh_dim_names=("tsp",)) makes one'


def said(value: object) -> str:
    """A value for a message: short, with its type."""
    if isinstance(value, (torch.Tensor, nn.Module)):
        return f"a {type(value).__name__}"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def check_module(where: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise OptionError(f"{where} takes {MODEL}; it was given {said(model)}")


def check_called(
    where: str, model: object, args: object, kwargs: object, module: bool = False
) -> None:
    """A model and what it is to be called with."""
    if module or not callable(model) or isinstance(model, type):
        check_module(where, model)
    if not isinstance(args, Sequence) or isinstance(args, str):
        hint = f"({where.removesuffix('(...)')}(model, (x,)) for one input)"
        raise OptionError(f"{where}: args is a tuple of the inputs, not {said(args)} {hint}")
    if kwargs is not None and (
        not isinstance(kwargs, Mapping) or any(not isinstance(k, str) for k in kwargs)
    ):
        raise OptionError(f"{where}: kwargs is a dict by name, not {said(kwargs)}")


def check_ranks(where: str, ranks: object) -> None:
    if not isinstance(ranks, int) or isinstance(ranks, bool) or not 1 <= ranks <= MOST:
        raise OptionError(
            f"{where}: ranks is how many ranks the axis has, an int from 1 to {MOST}, not "
            f"{said(ranks)}"
        )


def check_device(where: str, device: object) -> None:
    try:
        kind = torch.device(device).type if isinstance(device, str) else "meta"
    except RuntimeError:
        kind = "meta"
    if kind == "meta":
        raise OptionError(f"{where}: device is a kind like 'cuda' or 'cpu', not {said(device)}")


def check_mesh(where: str, mesh: object) -> None:
    if mesh is not None and not isinstance(mesh, DeviceMesh):
        raise OptionError(f"{where}: mesh is {MESH}, not {said(mesh)}")


def check_name(where: str, name: object) -> None:
    if not isinstance(name, str):
        raise OptionError(
            f"{where}: name is that of a region, parameter or value in the printed program, a "
            f"str, not {said(name)}"
        )


def check_function(where: str, name: str, fn: object) -> None:
    if fn is not None and not callable(fn):
        raise OptionError(f"{where}: {name} is a function, not {said(fn)}")


def check_tolerance(where: str, tolerance: object) -> None:
    if (
        not isinstance(tolerance, (int, float))
        or isinstance(tolerance, bool)
        or not math.isfinite(tolerance)
        or tolerance < 0
    ):
        raise OptionError(f"{where}: tolerance is a relative error >= 0, not {said(tolerance)}")


def check_parameters(where: str, model: nn.Module) -> None:
    if next(model.parameters(), None) is None:
        raise PlanError(f"{where}: {type(model).__name__} has no parameters: nothing is to shard")
