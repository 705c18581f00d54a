"""One device's run of a program with random ops, for `tspc.verify`: the same draws as on ranks,
everything else as torch has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.types import IntLikeType

from tspc.base.errors import TspcError
from tspc.factors.factor import Factors
from tspc.frontend.capture import Captured, capture
from tspc.ir.program import CONSTANT, OUTPUT, PLACEHOLDERS, SEED, Program, Ref
from tspc.passes.analyse.sizes import Sizes
from tspc.passes.lower.run_op import call, constant
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
        sizes = Sizes(Factors(), captured.sizes(args), {})
        env = {(n.name, 0): x for n, x in zip(placeholders, inputs)}

        def get(r: Ref) -> torch.Tensor:
            return env[r.name, r.item or 0]

        for n in program.nodes:
            if n.op == OUTPUT:
                return [get(a) if isinstance(a, Ref) else sizes.value(a) for a in n.args]
            if n.op == CONSTANT:
                env[n.name, 0] = constant(n, inputs[0].device)
            elif n.op not in PLACEHOLDERS:
                results = call(n, [[]], [[]], sizes, get)
                for i, v in enumerate(results if isinstance(results, (list, tuple)) else [results]):
                    t = n.types[i]
                    stops = t is not None and v.requires_grad and not t.requires_grad
                    env[n.name, i] = v.detach() if stops else v
        raise AssertionError("a program without output")

    return run
