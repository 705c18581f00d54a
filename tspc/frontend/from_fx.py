"""A traced fx graph -> a `Program`: nodes as data, sizes as sympy expressions."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch

from tspc.base.errors import CaptureError
from tspc.frontend.autograd_grad import gives_itself
from tspc.ir.program import CONSTANT, OUTPUT, Node, Program, Ref, Type, refs_in
from tspc.ir.source import source_line
from tspc.masks.index import rounded_down
from tspc.seams.sizes import FloorDiv
from tspc.seams.tensors import FakeTensor

_SKIPPED = ("sym_size", "_assert")
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def convert(
    name: str,
    traced: torch.fx.GraphModule,
    kinds: Sequence[tuple[str, str]],
    grads: Sequence[bool],
    hints: dict[sympy.Symbol, int],
) -> tuple[Program, dict[str, int]]:
    """An fx graph -> `Program` and the graph input that each placeholder is.

    Functional values carry no `requires_grad`: it is derived from the operands and the `no_grad`
    sections.
    """
    conversion = _Conversion(traced)
    placeholders = traced.graph.find_nodes(op="placeholder")
    for i, (n, (kind, wanted), grad) in enumerate(zip(placeholders, kinds, grads)):
        conversion.placeholder(n, kind, wanted, grad, i)
    for n in traced.graph.nodes:
        if n.op != "placeholder":
            conversion.node(n)
    return Program(name, tuple(conversion.nodes), hints).without_dead_nodes(), conversion.positions


class _Conversion:
    """The nodes so far. enabled: what comes next is under no `no_grad`."""

    def __init__(self, traced: torch.fx.GraphModule):
        self.traced, self.enabled = traced, True
        self.env: dict[torch.fx.Node, Ref] = {}
        self.nodes: list[Node] = []
        self.positions: dict[str, int] = {}
        self.names: set[str] = set()
        self.differentiable: set[Ref] = set()

    def unique(self, wanted: str) -> str:
        got, k = wanted, 1
        while got in self.names:
            got, k = f"{wanted}_{k}", k + 1
        self.names.add(got)
        return got

    def argument(self, a: Any) -> Any:
        if isinstance(a, torch.fx.Node):
            value = a.meta.get("val")
            return divided(value.node.expr) if isinstance(value, _SYMBOLIC) else self.env[a]
        if isinstance(a, (list, tuple)):
            return tuple(self.argument(x) for x in a)
        if isinstance(a, dict):
            return {k: self.argument(v) for k, v in a.items()}
        return divided(a.node.expr) if isinstance(a, _SYMBOLIC) else a

    def add(self, n: torch.fx.Node, node: Node) -> None:
        self.nodes.append(node)
        self.env[n] = Ref(node.name)
        self.differentiable |= _differentiable(node)

    def placeholder(self, n: torch.fx.Node, kind: str, wanted: str, grad: bool, i: int) -> None:
        value = n.meta.get("val")
        if isinstance(value, torch.Tensor):
            self.add(n, Node(self.unique(wanted), kind, types=(type_of(value, grad),)))
            self.positions[self.nodes[-1].name] = i

    def node(self, n: torch.fx.Node) -> None:
        if n.op == "get_attr":
            tensor = getattr(self.traced, str(n.target), None)
            if isinstance(tensor, torch.Tensor):
                self.add(n, constant(self.unique(n.name), tensor))
        elif n.op == "output":
            results = n.args[0] if isinstance(n.args[0], (tuple, list)) else (n.args[0],)
            self.nodes.append(Node(OUTPUT, OUTPUT, self.argument(results)))
        elif n.target is operator.getitem:
            source, item = self.argument(n.args)
            self.env[n] = Ref(source.name, item)
        elif "_set_grad_enabled" in str(n.target):
            self.enabled = bool(n.args[0])
        elif isinstance(n.meta.get("val"), _SYMBOLIC) or any(s in str(n.target) for s in _SKIPPED):
            return
        elif not self.enabled and gives_itself(n):
            self.env[n] = self.argument(n.args[0])
        else:
            self.call(n)

    def call(self, n: torch.fx.Node) -> None:
        args, kwargs = self.argument(n.args), self.argument(n.kwargs)
        grad = self.enabled and "detach" not in str(n.target)
        grad = grad and any(r in self.differentiable for r in refs_in((args, kwargs)))
        value = n.meta.get("val")
        values = value if isinstance(value, (tuple, list)) else [value]
        types = tuple(type_of(v, grad) if isinstance(v, torch.Tensor) else None for v in values)
        group = n.meta.get("ac_graph_id", 0)
        name = self.unique(n.name)
        self.add(n, Node(name, n.target, args, kwargs, types, source_line(n), group))


def _differentiable(node: Node) -> set[Ref]:
    """How the node's differentiable results are referred to."""
    items = [k for k, t in enumerate(node.types) if t is not None and t.requires_grad]
    return {Ref(node.name, k) for k in items} | ({Ref(node.name)} if items else set())


def constant(name: str, tensor: torch.Tensor) -> Node:
    """A lifted constant; its value must be real."""
    if isinstance(tensor, FakeTensor):
        raise CaptureError(f"{name}: a constant of the model was traced without its value")
    t = Type(tuple(tensor.shape), tensor.dtype)
    return Node(name, CONSTANT, kwargs={"value": tensor.tolist()}, types=(t,))


def type_of(value: torch.Tensor, requires_grad: bool) -> Type:
    """Sizes as ints or sympy expressions."""
    shape = tuple(
        divided(s.node.expr) if isinstance(s, torch.SymInt) else int(s) for s in value.shape
    )
    number = value.is_floating_point() or value.is_complex()
    return Type(shape, value.dtype, requires_grad and number)


def divided(size: sympy.Expr) -> sympy.Expr:
    """Exact divisions are done: s**2 // s is s (a batch as long as the sequence is one symbol)."""

    def quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
        exact = sympy.cancel(a / b)
        whole = exact.is_polynomial() and all(
            c.is_Integer for c in sympy.Poly(exact, *exact.free_symbols or [sympy.Dummy()]).coeffs()
        )
        return exact if whole else rounded_down(a, b)

    return size.replace(FloorDiv, quotient) if size.has(FloorDiv) else size  # pyright: ignore[reportReturnType]
