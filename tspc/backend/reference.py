"""One device's run of a program with random ops, for `tspc.verify`: the same draws as on ranks,
everything else as torch has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.types import IntLikeType

from tspc.base.errors import TspcError
from tspc.frontend.capture import Captured, capture
from tspc.ir.program import PLACEHOLDERS, SEED, Program
from tspc.ops.run import Run
from tspc.passes.pipeline import prepare
from tspc.runtime.comm.seed import draw
from tspc.seams.compiler import plainly

Value = torch.Tensor | IntLikeType


@plainly(TspcError)
def reference_backend(gm: torch.fx.GraphModule, example_inputs: Sequence[object]) -> object:
    """A Dynamo backend: graphs without random ops run as they are."""
    captured = capture(gm, example_inputs)
    program = prepare(captured.program)
    if all(n.name != SEED for n in program.nodes):
        return gm.forward
    return _runner(captured, program)


def _runner(captured: Captured, program: Program) -> Callable[..., list[Value]]:
    placeholders = [n for n in program.nodes if n.op in PLACEHOLDERS]

    def run(*args: object) -> list[Value]:
        inputs = captured.given(placeholders, args, draw())
        values = {n.name: x for n, x in zip(placeholders, inputs)}
        return Run(values, captured.sizes(args), inputs[0].device).nodes(program.nodes)

    return run
