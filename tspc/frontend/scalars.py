"""Python floats that change from call to call: Dynamo's symbols become tensors.

In: a traced graph in which a float of the model is an input, a tensor [] of float64, read by
`item`. Out: an equal graph that computes with that tensor where an op can take one; where none
can, the float becomes its value, with a guard of Dynamo's (each value is then a graph of its own).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import sympy
import torch

from tspc.base.context import Arguments, Keywords
from tspc.frontend.autocast import off
from tspc.seams.compiler import FLEX, NESTING
from tspc.seams.sizes import SymT, TensorReferenceAnalysis, symbol_is_type, sympy_interp
from tspc.seams.tensors import OpOverload, TorchDispatchMode, tree_leaves, tree_map

aten = torch.ops.aten
ITEMS = (aten.item.default, aten._local_scalar_dense.default)
Symbolic = torch.SymInt | torch.SymFloat | torch.SymBool
Bound = torch.Tensor | float | None  # of a clamp
Value = TypeVar("Value")
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
HALF = (torch.float16, torch.bfloat16)
# the overload that takes tensors where this one takes numbers, at the same places
AS_TENSORS = {
    **{getattr(aten, n).Tensor: getattr(aten, n).Tensor for n in ("add", "sub", "mul", "div")},
    **{getattr(aten, n).Scalar: getattr(aten, n).Tensor for n in ("add", "sub", "mul", "div")},
    **{
        getattr(aten, n).Scalar: getattr(aten, n).Tensor
        for n in ("gt", "lt", "ge", "le", "eq", "ne", "remainder", "fmod")
    },
    aten.pow.Tensor_Scalar: aten.pow.Tensor_Tensor,
    aten.pow.Scalar: aten.pow.Tensor_Tensor,
    aten.clamp.default: aten.clamp.Tensor,
    aten.clamp_min.default: aten.clamp_min.Tensor,
    aten.clamp_max.default: aten.clamp_max.Tensor,
    aten.where.ScalarOther: aten.where.self,
    aten.where.ScalarSelf: aten.where.self,
    aten.where.Scalar: aten.where.self,
}


def as_tensors(gm: torch.fx.GraphModule) -> None:
    """The graph, in place, without symbolic floats. To be called under the fake mode of its
    inputs."""
    items = [n for n in gm.graph.nodes if n.target in ITEMS and _floats(n)]
    if not items:
        return
    values = {_expression(n.meta["val"]): n.meta["val"] for n in items}
    for n in gm.graph.nodes:
        if _in_sizes(n):
            _fix(values, n.meta.get("val"), *(a.meta.get("val") for a in n.all_input_nodes))
    tensors = _Tensors(gm, values)
    with off():
        for n in list(gm.graph.nodes):
            tensors.exchange(n)


def fixed_inside(gm: torch.fx.GraphModule) -> None:
    """Floats of a Dynamo graph with parts that are traced apart become their values."""
    apart = any(n.target in NESTING or _traced_apart(n.target) for n in gm.graph.nodes)
    for n in gm.graph.nodes if apart else ():
        value = n.meta.get("example_value")
        if isinstance(value, torch.SymFloat):
            float(value)


def _traced_apart(target: object) -> bool:
    names = ("autograd_function_apply",)
    return target is FLEX or getattr(target, "_name", "") in names


def _expression(x: Symbolic) -> sympy.Expr:
    return x.node.expr


def _free(value: object) -> Iterator[sympy.Symbol]:
    """The symbols of floats in what a node gives or takes, and in its sizes."""
    for x in tree_leaves(value):
        parts = x.shape if isinstance(x, torch.Tensor) else (x,)
        for p in parts:
            if isinstance(p, SYMBOLIC):
                yield from (s for s in p.node.expr.free_symbols if symbol_is_type(s, SymT.FLOAT))


def _floats(n: torch.fx.Node) -> bool:
    return any(True for _ in _free(n.meta.get("val")))


def _in_sizes(n: torch.fx.Node) -> bool:
    """A float decides about sizes, is an integer's part, or is returned."""
    value = n.meta.get("val")
    if n.op == "output":
        return True
    values = (a.meta.get("val") for a in n.all_input_nodes)
    whole = (torch.SymInt, torch.SymBool)
    sized = any(isinstance(x, torch.Tensor) for x in tree_leaves(value)) and _floats(n)
    return sized or any(isinstance(x, whole) and any(_free(x)) for x in values)


def _fix(values: dict[sympy.Expr, torch.SymFloat], *used: object) -> None:
    for s in set(_free(used)):
        float(values[s])


class _Tensors:
    """Nodes of a graph are exchanged for others, of tensors."""

    def __init__(self, gm: torch.fx.GraphModule, values: dict[sympy.Expr, torch.SymFloat]):
        self.graph, self.values = gm.graph, values
        self.known: dict[Any, torch.Tensor] = {}  # symbol or expression -> its tensor

    def exchange(self, n: torch.fx.Node) -> None:
        """A node that takes a float, for one that takes its tensor or its value."""
        value = n.meta.get("val")
        if isinstance(value, SYMBOLIC) and any(_free(value)):
            if n.target in ITEMS:
                self.known[value.node.expr] = _value(n.args[0])
            return
        args, kwargs = tree_map(_value, (n.args, n.kwargs))
        symbolic = any(isinstance(x, torch.SymFloat) for x in tree_leaves((args, kwargs)))
        if not symbolic or not isinstance(n.target, OpOverload):
            return
        if isinstance(value, torch.Tensor) and any(_free((args, kwargs))):
            with _Recorder(n) as recorder:
                try:
                    out = self._computed(n.target, value.dtype, args, kwargs)
                except NotImplementedError:  # torch has no tensor for this arithmetic
                    out = None
                if out is not None and out.dtype != value.dtype:
                    out = out.to(value.dtype)
            if out is not None:
                new = recorder.nodes[id(out)]
                n.replace_all_uses_with(new)
                new.meta = {**n.meta, "val": out}
                self.graph.erase_node(n)
                return
        _fix(self.values, args, kwargs)
        n.args, n.kwargs = tree_map(_fixed, (n.args, n.kwargs))

    def _computed(
        self, target: OpOverload, dtype: torch.dtype, args: Arguments, kwargs: Keywords
    ) -> torch.Tensor | None:
        """The op's value, of tensors; None if it takes none."""
        if target in AS_TENSORS:
            keywords, operands = dict(kwargs), list(args)
            alpha = keywords.pop("alpha", 1)
            if any(_free(alpha)):
                operands[1] = operands[1] * self._typed(alpha, operands[1])
            elif alpha != 1:
                keywords["alpha"] = alpha
            beside = next(a for a in args if isinstance(a, torch.Tensor) and a.dtype != torch.bool)
            operands, keywords = tree_map(lambda x: self._typed(x, beside), (operands, keywords))
            op = AS_TENSORS[target]
            return (
                _clamped(op, operands, keywords)
                if "clamp" in op.name()
                else op(*operands, **keywords)
            )
        if target is aten.rsub.Scalar and not args[2:]:
            return aten.sub.Tensor(self._typed(args[1], args[0]), args[0])
        if target is aten.masked_fill.Scalar:
            return aten.where.self(args[1], self._tensor(args[2]).to(dtype), args[0])
        if target is aten.lerp.Scalar:
            return aten.lerp.Tensor(args[0], args[1], self._tensor(args[2]).to(dtype))
        if target in (aten.full.default, aten.new_full.default, aten.full_like.default):
            size = {aten.full.default: args[0], aten.new_full.default: args[1]}.get(target)
            size = args[0].shape if size is None else size
            return aten.expand.default(self._tensor(args[-1]).to(dtype), size)
        return None

    def _typed(self, x: Value, beside: torch.Tensor) -> Value | torch.Tensor:
        """A symbolic float as a tensor [] that computes beside `beside` in the type that the number
        would: of half precision by its kernel's wider numbers."""
        if not isinstance(x, torch.SymFloat):
            return x
        dtype = torch.result_type(beside, 0.5)
        return self._tensor(x).to(torch.float32 if dtype in HALF else dtype)

    def _tensor(self, x: Symbolic | float) -> torch.Tensor:
        """A number in float64, []. Raises `NotImplementedError`."""
        expression = sympy.sympify(_expression(x) if isinstance(x, SYMBOLIC) else x)
        if expression not in self.known:
            for s in expression.free_symbols - self.known.keys():
                raise NotImplementedError(f"{s} is the size of an input")
            self.known[expression] = sympy_interp(TensorReferenceAnalysis, self.known, expression)
        return self.known[expression]


def _clamped(
    op: Callable[..., torch.Tensor], operands: Sequence[Bound], keywords: Mapping[str, Bound]
) -> torch.Tensor:
    """Bounds that are numbers become tensors too."""
    x = operands[0]
    assert isinstance(x, torch.Tensor)

    def bound(b: Bound) -> torch.Tensor | None:
        if isinstance(b, torch.Tensor) or b is None:
            return b
        return torch.full((), b, dtype=x.dtype, device=x.device)

    return op(x, *map(bound, operands[1:]), **{k: bound(b) for k, b in keywords.items()})


def _value(x: object) -> Any:
    return x.meta["val"] if isinstance(x, torch.fx.Node) else x


def _fixed(x: object) -> object:
    """A node of a float that has its value now."""
    value = _value(x)
    fixed = isinstance(value, torch.SymFloat) and not value.node.expr.free_symbols
    return float(value) if fixed else x


class _Recorder(TorchDispatchMode):
    """What runs becomes nodes before one, whose operands it takes."""

    def __init__(self, before: torch.fx.Node):
        super().__init__()
        self.before = before
        values = ((n, n.meta.get("val")) for n in before.graph.nodes)
        self.nodes = {id(x): n for n, x in values if isinstance(x, torch.Tensor)}

    def __torch_dispatch__(
        self, op: OpOverload, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        out = op(*args, **(kwargs or {}))
        nodes = tree_map(lambda x: self.nodes.get(id(x), x), (args, kwargs or {}))
        with self.before.graph.inserting_before(self.before):
            new = self.before.graph.call_function(op, *nodes)
        new.meta = {**self.before.meta, "val": out}
        self.nodes[id(out)] = new
        return out
