"""Small functions as programs, and programs as functions: what a pass makes of one is run on one
device, and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tests.support.ranks import on_ranks
from tspc.backend.brute import values
from tspc.frontend.from_fx import convert
from tspc.ir.body import registered
from tspc.ir.program import INPUT, OUTPUT, PARAM, PLACEHOLDERS, SEED, Program, Ref
from tspc.ops.run import LocalProgram
from tspc.passes.analyse.factorize import Analysis, factorize
from tspc.passes.lower.unit import Unit
from tspc.passes.pipeline import PIPELINE
from tspc.passes.runner import run

Tensor = torch.Tensor
DRAWN = torch.tensor(0x123456789)


def program_of(
    fn: Callable[..., Any], *tensors: Tensor, params: Mapping[str, Tensor] | None = None
) -> Program:
    """The ops as they are written; arguments: the tensors, then the parameters in order. The
    tensors are inputs x0, x1, ..."""
    weights = dict(params or {})
    gm = make_fx(fn, pre_dispatch=True)(*tensors, *weights.values())
    kinds = [*((INPUT, f"x{i}") for i in range(len(tensors))), *((PARAM, n) for n in weights)]
    grads = [x.is_floating_point() for x in (*tensors, *weights.values())]
    return convert("sample", gm, kinds, grads, {})[0]


def results(program: Program, **tensors: Tensor) -> list[Any]:
    """Its outputs on one device."""
    inputs = {**tensors, SEED: DRAWN}
    holders = {n.name: inputs[n.name] for n in program.nodes if n.op in PLACEHOLDERS}
    env = values(program, holders)
    return [env[a.value] if isinstance(a, Ref) else a for a in program.output.args]


def inputs(*tensors: Tensor) -> dict[str, Tensor]:
    return {f"x{i}": x for i, x in enumerate(tensors)}


def ops(program: Program) -> list[str]:
    """Names of the calls, in order, with the overload where it is not the default one."""
    calls = (n for n in program.nodes if n.op not in PLACEHOLDERS and n.op != OUTPUT)
    return [str(n.op).removeprefix("aten.").removesuffix(".default") for n in calls]


def agree(a: Program, b: Program, tolerance: float = 1e-12, **tensors: Tensor) -> None:
    """Both give the same, to rounding."""
    for x, y in zip(results(a, **tensors), results(b, **tensors), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def unit_of(program: Program, stage: str, ranks: int = 2, **fields: Any) -> Unit:
    """After the passes up to this one."""
    names = [p.name for p in PIPELINE]
    last = len(names) - names[::-1].index(stage)
    return run(PIPELINE[:last], Unit(program, tuple(program.symbols), ranks=ranks, **fields))


def analysis_of(
    fn: Callable[..., Any], *tensors: Tensor, params: Mapping[str, Tensor] | None = None
) -> Analysis:
    return factorize(program_of(fn, *tensors, params=params))


def run_local(unit: Unit, *tensors: Tensor) -> list[list[Any]]:
    """What each rank's program of a unit after all passes gives; its axis is AXIS, its sizes are
    numbers. tensors: whole ones, in the order of its placeholders."""
    unit = replace(unit, bodies=registered(unit.bodies))
    nodes = [n for n in unit.program.nodes if n.op in PLACEHOLDERS]
    rows = [int(e.chunk_rows(unit.ranks, {})) for e in unit.choice.extents]
    maps = [s.map if (s := unit.choice.storages.get(n.name)) else None for n in nodes]
    held = [
        [m.take(x, rank) if m else x for m, x in zip(maps, tensors)] for rank in range(unit.ranks)
    ]
    local = LocalProgram(unit.local, unit.chunks)
    return on_ranks(lambda *args: local(*rows, *args), held)


def mlp(x: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
    return [torch.tanh(x @ up) @ down]


def mlp_program(units: int = 5, length: int = 7) -> Program:
    """One region, m, of m.up and m.down."""
    weights = {"m.up": torch.zeros(6, units), "m.down": torch.zeros(units, 6)}
    return program_of(mlp, torch.zeros(2, length, 6), params=weights)
