"""Run the pieces of a body, eagerly or compiled; the backward recomputes the piece and
differentiates it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.types import IntLikeType

from tspc.ir.body import Body, Lengths, Piece, evaluate, symbol_values
from tspc.ir.program import Type
from tspc.ops.run import run_piece
from tspc.runtime.lowering.trace import Fakes, local_fakes
from tspc.seams.lowering import TracingContext, V, compile_fx_inner, select_decomp_table, tracing

Values = dict[str, torch.Tensor]
# of sizes, the step and tensors; the list is emptied
Lowered = Callable[[list[torch.Tensor | IntLikeType]], Sequence[torch.Tensor]]


class EagerPieces:
    """Pieces as plain functions under autograd."""

    def __init__(self, body: Body):
        self.body = body

    def forward(self, index: int, symbols: Lengths, step: torch.Tensor, values: Values) -> Values:
        """What the piece writes and saves."""
        piece = self._piece(index)
        with torch.no_grad():
            results = run_piece(piece, symbols, step, {n: values[n] for n in piece.reads}, {})
        return {n: results[n] for n in (*piece.writes, *piece.saves)}

    def again(self, index: int, symbols: Lengths, step: torch.Tensor, values: Values) -> Values:
        """What the piece writes, made from what it reads and saved."""
        piece = self._piece(index)
        kept = {n: values[n] for n in piece.saves}
        with torch.no_grad():
            results = run_piece(piece, symbols, step, {n: values[n] for n in piece.reads}, kept)
        return {n: results[n] for n in piece.writes}

    def backward(
        self, index: int, symbols: Lengths, step: torch.Tensor, values: Values, cotangents: Values
    ) -> Values:
        """Gradients of what the piece reads."""
        piece = self._piece(index)
        wanted = [n for n in piece.reads if self.body.values[n].requires_grad]
        leaves = {n: values[n].detach().requires_grad_() for n in wanted}
        kept = {n: values[n] for n in piece.saves}
        with torch.enable_grad():
            reads = {n: leaves.get(n, values[n]) for n in piece.reads}
            results = run_piece(piece, symbols, step, reads, kept)
        outs = [n for n in cotangents if results[n].requires_grad]
        if not outs or not wanted:
            return {}
        grads = torch.autograd.grad(
            [results[n] for n in outs],
            [leaves[n] for n in wanted],
            [cotangents[n].to(results[n].dtype) for n in outs],
            allow_unused=True,
        )
        return {n: g for n, g in zip(wanted, grads) if g is not None}

    def _piece(self, index: int) -> Piece:
        piece = self.body.steps[index]
        assert isinstance(piece, Piece)
        return piece


def cotangent_names(body: Body, index: int) -> tuple[str, ...]:
    """What the piece writes that a cotangent may come for."""
    piece = body.steps[index]
    assert isinstance(piece, Piece)
    wanted: set[str | None] = {o.name for o in body.outs if o.differentiable}
    for a in body.attentions:
        wanted |= {*a.operands.all}
    for later in body.steps[index + 1 :]:
        if isinstance(later, Piece):
            wanted |= set(later.reads)
    return tuple(n for n in piece.writes if n in wanted and body.values[n].requires_grad)


class InductorPieces:
    """Pieces compiled by Inductor, each forward and backward once, with symbolic sizes.

    guards: what lowering assumed, over the symbols of `symbols` (the program's and the rows).
    """

    def __init__(
        self,
        body: Body,
        hints: Mapping[sympy.Symbol, int],
        rows: Sequence[int],
        device: torch.device,
    ):
        self.body, self.guards = body, []
        self.last = max(i for i, step in enumerate(body.steps) if isinstance(step, Piece))
        self.forwards: dict[int, Lowered] = {}
        self.agains: dict[int, Lowered] = {}
        self.backwards: dict[int, tuple[Lowered, list[str], tuple[str, ...]]] = {}
        for index, step in enumerate(body.steps):
            if isinstance(step, Piece):
                self._compile(index, step, hints, rows, device)

    def _compile(
        self,
        index: int,
        piece: Piece,
        hints: Mapping[sympy.Symbol, int],
        rows: Sequence[int],
        device: torch.device,
    ) -> None:
        body = self.body
        sizes = symbol_values(body, [hints[s] for s in body.symbols], rows)
        cotangents = cotangent_names(body, index)
        wanted = [n for n in piece.reads if body.values[n].requires_grad]
        names: list[str] = []

        def forward(*inputs: object) -> list[torch.Tensor]:
            symbols, step, tensors = self._split(inputs, piece.reads)
            results = run_piece(piece, symbols, step, tensors, {})
            return [results[n] for n in (*piece.writes, *piece.saves)]

        def again(*inputs: object) -> list[torch.Tensor]:
            symbols, step, tensors = self._split(inputs, (*piece.reads, *piece.saves))
            kept = {n: tensors.pop(n) for n in piece.saves}
            results = run_piece(piece, symbols, step, tensors, kept)
            return [results[n] for n in piece.writes]

        def backward(*inputs: object) -> list[torch.Tensor]:
            names_of = (*piece.reads, *piece.saves, *(f"cotangent of {n}" for n in cotangents))
            symbols, step, tensors = self._split(inputs, names_of)
            gs = [tensors.pop(f"cotangent of {n}") for n in cotangents]
            kept = {n: tensors.pop(n) for n in piece.saves}
            leaves = {n: tensors[n].detach().requires_grad_() for n in wanted}
            with torch.enable_grad():
                results = run_piece(piece, symbols, step, {**tensors, **leaves}, kept)
                grads = torch.autograd.grad(
                    [results[n] for n in cotangents], list(leaves.values()), gs, allow_unused=True
                )
            names[:] = [n for n, g in zip(wanted, grads) if g is not None]
            return [g for g in grads if g is not None]

        self.forwards[index] = self._lower(forward, sizes, piece.reads, device, False)
        if piece.saves and index < self.last:
            reads = (*piece.reads, *piece.saves)
            self.agains[index] = self._lower(again, sizes, reads, device, True)
        if cotangents and wanted:
            reads = (*piece.reads, *piece.saves, *cotangents)
            lowered = self._lower(backward, sizes, reads, device, True)
            self.backwards[index] = lowered, names, cotangents

    def _split(
        self, inputs: Sequence[Any], names: Sequence[str]
    ) -> tuple[dict[sympy.Symbol, IntLikeType], torch.Tensor, Values]:
        count = len(self.body.sizes)
        symbols = dict(zip(self.body.sizes, inputs[:count]))
        return symbols, inputs[count], dict(zip(names, inputs[count + 1 :]))

    def _lower(
        self,
        fn: Callable[..., list[torch.Tensor]],
        sizes: Mapping[sympy.Symbol, int],
        reads: Sequence[str],
        device: torch.device,
        is_backward: bool,
    ) -> Lowered:
        types = [(Type((), torch.int64), device)]
        for n in reads:
            v = self.body.values[n]
            types.append((Type(v.shape, v.dtype), device))
        fakes = local_fakes(self.body.sizes, sizes, (), types)
        inputs = [*fakes.symbols.values(), *fakes.tensors]
        with tracing(TracingContext(fakes.mode)), fakes.mode, torch.no_grad():
            gm = make_fx(fn, select_decomp_table(), tracing_mode="real")(*inputs)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        out = next(n for n in gm.graph.nodes if n.op == "output")
        out.meta["user_visible_output_idxs"] = list(range(len(out.args[0])))
        compiled = self._made(gm, inputs, fakes, is_backward)
        named = {v.node.expr: s for s, v in fakes.symbols.items() if isinstance(v, torch.SymInt)}
        self.guards += [g.expr.xreplace(named) for g in fakes.env.guards]
        return compiled

    def _made(
        self, gm: torch.fx.GraphModule, inputs: Sequence[Any], fakes: Fakes, is_backward: bool
    ) -> Lowered:
        context = tracing(TracingContext(fakes.mode))
        with V.set_fake_mode(fakes.mode), context, torch.no_grad():
            compiled: Any = compile_fx_inner(gm, inputs, is_backward=is_backward)
        return compiled

    def _given(
        self, symbols: Lengths, step: torch.Tensor, tensors: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | IntLikeType]:
        sizes = [symbols[s] for s in self.body.sizes]
        return [*sizes, step, *(t.contiguous() for t in tensors)]

    def forward(self, index: int, symbols: Lengths, step: torch.Tensor, values: Values) -> Values:
        """What the piece writes and saves."""
        piece = self.body.steps[index]
        assert isinstance(piece, Piece)
        inputs = self._given(symbols, step, [values[n] for n in piece.reads])
        return dict(zip((*piece.writes, *piece.saves), self.forwards[index](inputs)))

    def again(self, index: int, symbols: Lengths, step: torch.Tensor, values: Values) -> Values:
        """What the piece writes, made from what it reads and saved."""
        piece = self.body.steps[index]
        assert isinstance(piece, Piece)
        if index not in self.agains:
            return self.forward(index, symbols, step, values)
        inputs = self._given(symbols, step, [values[n] for n in (*piece.reads, *piece.saves)])
        return dict(zip(piece.writes, self.agains[index](inputs)))

    def backward(
        self, index: int, symbols: Lengths, step: torch.Tensor, values: Values, cotangents: Values
    ) -> Values:
        """Gradients of what the piece reads."""
        piece = self.body.steps[index]
        assert isinstance(piece, Piece)
        if index not in self.backwards:
            return {}
        compiled, names, wanted = self.backwards[index]
        gs = []
        for n in wanted:
            v = self.body.values[n]
            if n in cotangents:
                gs.append(cotangents[n].to(v.dtype))
            else:
                shape = [evaluate(s, symbols) for s in v.shape]
                gs.append(torch.zeros(shape, dtype=v.dtype, device=step.device))
        inputs = self._given(
            symbols, step, [*(values[n] for n in (*piece.reads, *piece.saves)), *gs]
        )
        return dict(zip(names, compiled(inputs)))


class TracedPieces(InductorPieces):
    """The same graphs, before a compiler takes them. run: of a graph, on its inputs."""

    def __init__(
        self,
        body: Body,
        hints: Mapping[sympy.Symbol, int],
        rows: Sequence[int],
        run: Callable[[torch.fx.GraphModule, list[Any]], Sequence[torch.Tensor]],
    ):
        self.run = run
        super().__init__(body, hints, rows, torch.device("cpu"))

    def _made(
        self, gm: torch.fx.GraphModule, inputs: Sequence[Any], fakes: Fakes, is_backward: bool
    ) -> Lowered:
        return lambda values: self.run(gm, values)
