"""Trace one rank's program on local fakes: own symbols for sizes and rows, equal on every rank.

Out: fake inputs for AOTAutograd, or the joint graph partitioned in forward and backward for the
lockstep driver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.types import IntLikeType
from torch.utils.checkpoint import CheckpointPolicy

from tspc.ir.body import evaluate
from tspc.ir.program import Type
from tspc.ops.counter import mix
from tspc.seams.lowering import (
    ConstantSource,
    TracingContext,
    aot_export_joint_simple,
    default_partition,
    must_recompute,
    tracing,
)
from tspc.seams.tensors import FakeTensorMode

Program = Callable[..., Sequence[object]]  # of one rank: sizes, rows, placeholders -> outputs
Cut = Callable[..., tuple[torch.fx.GraphModule, torch.fx.GraphModule]]  # of a joint graph


@dataclass(frozen=True)
class Fakes:
    """Local fakes in the order of a local program: symbols, rows, placeholders."""

    mode: FakeTensorMode
    env: ShapeEnv
    symbols: Mapping[sympy.Symbol, IntLikeType]
    rows: list[IntLikeType]
    tensors: list[torch.Tensor]

    @property
    def inputs(self) -> list[torch.Tensor | IntLikeType]:
        return [*self.symbols.values(), *self.rows, *self.tensors]


def local_fakes(
    symbols: Sequence[sympy.Symbol],
    hints: Mapping[sympy.Symbol, int],
    rows: Sequence[int],
    types: Sequence[tuple[Type, torch.device]],
) -> Fakes:
    """Fake inputs of one rank's program, with symbolic sizes.

    rows: c of each sequence. types: of each placeholder as this program is given it (parameters:
    their local shape).
    """
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    mode.cache_enabled = False  # of symbolic sizes it is made at a greater cost than it saves

    def size(name: str, hint: int) -> IntLikeType:
        source = ConstantSource(name)
        symbol = env.create_symbol(
            hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
        )
        return env.create_symintnode(symbol, hint=hint, source=source)

    values = {s: size(f"tspc_{i}", hints[s]) for i, s in enumerate(symbols)}
    local_rows = [size(f"tspc_rows_{i}", c) for i, c in enumerate(rows)]
    tensors = []
    with mode:
        for t, device in types:
            shape = [evaluate(s, values) for s in t.shape]
            x = torch.empty(shape, dtype=t.dtype, device=device)
            tensors.append(x.requires_grad_(t.requires_grad))
    return Fakes(mode, env, values, local_rows, tensors)


@dataclass(frozen=True)
class Partitioned:
    """What AOTAutograd makes of one rank's program.

    forward: inputs -> outputs, saved. backward: saved, tangents -> gradients of the inputs.
    """

    forward: torch.fx.GraphModule
    backward: torch.fx.GraphModule | None
    outputs: int
    tangents: tuple[int, ...]  # outputs that take a cotangent


def tag(joint: torch.fx.GraphModule) -> None:
    """Gathered weights are never saved; what else communicates runs again only in a part that the
    model checkpoints."""
    for n in joint.graph.nodes:
        if n.target is mix:  # cheap, and as large as what is dropped
            n.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
        if getattr(n.target, "namespace", "") != "tspc":
            continue
        name = n.target._schema.name.split("::")[1]
        if name in ("gather_weight", "local", "clear_pads"):
            n.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        elif not must_recompute(n):
            n.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _own(x: object) -> object:
    """An output that is no view: the graphs are run as they are, without what AOTAutograd does for
    aliases."""
    return x.clone() if isinstance(x, torch.Tensor) and x._is_view() else x


class _NoTangents(Exception):
    """No output wants a gradient."""


def partition(fn: Program, fakes: Fakes, cut: Cut | None = None) -> Partitioned:
    """The joint graph of a local program, cut in two; by default all that was computed is saved."""
    wants = any(x.requires_grad for x in fakes.tensors) and torch.is_grad_enabled()
    try:
        return _partition(fn, fakes, wants, cut)
    except _NoTangents:
        return _partition(fn, fakes, False, cut)


def _partition(fn: Program, fakes: Fakes, joined: bool, cut: Cut | None) -> Partitioned:
    tangents: list[int] = []
    count = 0

    def flat(*args: object) -> tuple[object, ...]:
        nonlocal count
        outs = fn(*args)
        count = len(outs)
        tangents[:] = [
            i for i, o in enumerate(outs) if isinstance(o, torch.Tensor) and o.requires_grad
        ]
        if joined and not tangents:
            raise _NoTangents
        return tuple(map(_own, outs))

    with tracing(TracingContext(fakes.mode)), fakes.mode:
        traced: Any = aot_export_joint_simple(flat, tuple(fakes.inputs), trace_joint=joined)
        if not joined:
            return Partitioned(traced, None, count, ())
        checks = torch.ops.aten._assert_tensor_metadata.default  # a cast's; no part of a result
        for n in traced.graph.find_nodes(op="call_function", target=checks):
            traced.graph.erase_node(n)
        if cut is not None or any("ac_graph_id" in n.meta for n in traced.graph.nodes):
            tag(traced)
        cut = cut or default_partition
        forward, backward = cut(traced, fakes.inputs, num_fwd_outputs=count)
    return Partitioned(forward, backward, count, tuple(tangents))
