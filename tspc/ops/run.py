"""The one interpreter: nodes of a program, run in order on tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.types import IntLikeType

from tspc.base.context import Context
from tspc.ir.body import STEP, Lengths, Named, Piece, evaluate
from tspc.ir.program import CONSTANT, OUTPUT, PLACEHOLDERS, Node, Program, Ref
from tspc.ops.recompute import recomputed

aten = torch.ops.aten
# the clone that made a value viewable may be gone
_INSTEAD = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
}
Results = Sequence[torch.Tensor]


class Run:
    """values: by `Ref.value`, filled as the nodes run. symbols: of the sizes. device: of what the
    nodes make of nothing. kept: values that stand for those made here; the gradient goes on to what
    made them. leaving: nodes of a checkpointed part that others read.
    """

    def __init__(
        self,
        values: Named,
        symbols: Lengths,
        device: torch.device,
        kept: Mapping[str, torch.Tensor] | None = None,
        leaving: Collection[str] = (),
    ):
        self.values, self.symbols, self.device = values, symbols, device
        self.kept, self.leaving = kept or {}, leaving
        self._sizes: dict[sympy.Basic, Any] = {}

    def nodes(self, nodes: Iterable[Node]) -> list[Any]:
        """-> what the output node returns."""
        for n in nodes:
            if n.op == OUTPUT:
                return [self.argument(a) for a in n.args]
            if n.op not in PLACEHOLDERS:
                with recomputed(n.recompute, n.name in self.leaving):
                    self.keep(n, self.results(n))
        return []

    def keep(self, n: Node, results: Results) -> None:
        """Autograd follows what the types say."""
        for item, x in enumerate(results):
            t = n.types[item] if item < len(n.types) else None
            if t is not None and isinstance(x, torch.Tensor):
                x = x.detach() if x.requires_grad and not t.requires_grad else x
            name = Ref(n.name, item).value
            self.values[name] = _Kept.apply(self.kept[name], x) if name in self.kept else x

    def results(self, n: Node) -> Results:
        if n.op == CONSTANT:
            x = torch.tensor(n.kwargs["value"], dtype=n.type.dtype, device=self.device)
            return [x.reshape([int(s) for s in n.type.shape])]
        args, kwargs = self.argument(n.args), {k: self.argument(v) for k, v in n.kwargs.items()}
        if n.op == aten.arange.default:
            kwargs.setdefault("device", self.device)
        out = (_INSTEAD.get(n.op) or n.op)(*args, **kwargs)
        return out if isinstance(out, (list, tuple)) else [out]

    def argument(self, a: Any) -> Any:
        if isinstance(a, Ref):
            return self.values[a.value]
        if isinstance(a, (tuple, list)):
            return [self.argument(x) for x in a]
        if isinstance(a, sympy.Expr):
            if a not in self._sizes:
                self._sizes[a] = evaluate(a, self.symbols)
            return self._sizes[a]
        return a


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, kept: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return kept.view_as(kept)

    @staticmethod
    def backward(ctx: Context, *gs: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, gs[0]


def run_piece(
    piece: Piece, symbols: Lengths, step: torch.Tensor, values: Named, kept: Named
) -> Named:
    """All values by name: those that a piece of a body reads, and those that it makes.

    step: which shard, []. kept: values that stand for those made here.
    """
    run = Run({**values, STEP: step}, symbols, step.device, kept)
    run.nodes(piece.nodes)
    return run.values


def _leaving(program: Program) -> frozenset[str]:
    """What a checkpointed part makes for others. A fold does not count: it would keep what it saves
    for its backward too."""
    fold = torch.ops.tspc.fold.default
    groups = {n.name: n.recompute for n in program.nodes if n.op != fold}
    return frozenset(
        r.name
        for n in program.nodes
        for r in n.refs()
        if groups.get(r.name, 0) not in (0, n.recompute)
    )


class LocalProgram(torch.nn.Module):
    """One rank's program to be traced: (symbols, rows c of each sequence, placeholders), in order
    -> outputs."""

    def __init__(self, program: Program, sizes: Sequence[sympy.Symbol]):
        super().__init__()
        self.program, self.sizes = program, tuple(sizes)
        self.leaving = _leaving(program)
        self.names = [n.name for n in program.nodes if n.op in PLACEHOLDERS]

    def forward(self, *args: Any) -> list[torch.Tensor | IntLikeType]:
        count = len(self.sizes)
        values = dict(zip(self.names, args[count:]))
        symbols = dict(zip(self.sizes, args[:count]))
        tensors = (x for x in values.values() if isinstance(x, torch.Tensor))
        device = next((x.device for x in tensors), torch.device("cpu"))
        return Run(values, symbols, device, leaving=self.leaving).nodes(self.program.nodes)
