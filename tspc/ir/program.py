"""A captured forward program as plain data: nodes in order, sympy sizes, no torch tensors.

Every pass takes a `Program` and returns one. A node's `op` is a torch `OpOverload`, or one of the
kinds below for what is not a call. Multi-output nodes are read through `Ref(name, item)`.

The text of a program is read back: `Program.parse(str(p)) == p`. A line a node, its types before
its op, `grad` where autograd follows, `recompute` and the file and line of the model last.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import sympy
import torch

from tspc.base.context import Arguments, Keywords
from tspc.ir.text import CLASSES, Reader, declared, show
from tspc.seams.tensors import OpOverload

Size = int | sympy.Expr
PARAM, BUFFER, INPUT, CONSTANT, OUTPUT, FOLD, APART = (
    "param",
    "buffer",
    "input",
    "constant",
    "output",
    "fold",
    "apart",
)
PLACEHOLDERS = (PARAM, BUFFER, INPUT)
SEED = "tspc.seed"  # the input that a program with random ops has besides its own


SDPA = torch.ops.aten.scaled_dot_product_attention.default
CASTS = (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default)
SHAPE_ONLY = (  # take no value of their operand
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_zeros.default,
    torch.ops.aten.new_ones.default,
    torch.ops.aten.new_full.default,
)


@dataclass(frozen=True)
class Ref:
    """A use of a node's value; `item` picks one of several outputs."""

    name: str
    item: int | None = None

    @property
    def value(self) -> str:
        """One name of the value, however it is referred to."""
        return f"{self.name}[{self.item}]" if self.item else self.name

    def __repr__(self) -> str:
        return named(self.name) + (f"[{self.item}]" if self.item is not None else "")


def named(name: str) -> str:
    return f"%{name}" if re.fullmatch(r"[\w.]+", name) else f"%{name!r}"


@dataclass(frozen=True)
class Type:
    """A tensor's shape (ints or sympy expressions over the program's symbols), dtype and whether
    autograd follows it."""

    shape: tuple[Size, ...]
    dtype: torch.dtype
    requires_grad: bool = False

    @property
    def is_float(self) -> bool:
        return self.dtype.is_floating_point or self.dtype.is_complex

    def text(self) -> str:
        grad = " grad" if self.requires_grad else ""
        return f"{show(self.dtype)}[{', '.join(map(show, self.shape))}]{grad}"


@dataclass(frozen=True)
class Node:
    """One operation.

    `args` may nest tuples; tensors are `Ref`s, sizes are ints or sympy expressions. param,
    buffer, input: no args. constant: kwargs["value"] is a nested list. output: args are the
    returned values.
    """

    name: str
    op: Any  # an OpOverload, or one of the kinds above
    args: Arguments = ()
    kwargs: Keywords = field(default_factory=dict)
    types: tuple[Type | None, ...] = ()
    source: str = ""  # "file:line" of the user's model
    recompute: int = 0  # the checkpointed part of the model that it is of; 0: none

    @property
    def type(self) -> Type:
        t = self.types[0]
        assert t is not None
        return t

    @property
    def is_call(self) -> bool:
        return not isinstance(self.op, str)

    def argument(self, i: int, default: object = None) -> Any:
        """A positional one, or the default where it is not given."""
        return self.args[i] if i < len(self.args) else default

    def line(self) -> str:
        """As text; what is in a fold takes more lines."""
        types = ", ".join("-" if t is None else t.text() for t in self.types)
        args = [*map(show, self.args), *(f"{k}={show(v)}" for k, v in self.kwargs.items())]
        group = f" recompute {self.recompute}" if self.recompute else ""
        source = f"  # {self.source}" if self.source else ""
        typed = f"{named(self.name)}: {types}" if self.types else named(self.name)
        return f"{typed} = {self.op}({', '.join(args)}){group}{source}"

    def refs(self) -> list[Ref]:
        return list(refs_in((self.args, self.kwargs)))

    def map_refs(self, fn: Callable[[Ref], Ref]) -> Node:
        return replace(self, args=map_refs(self.args, fn), kwargs=map_refs(self.kwargs, fn))


def casts_of_parameters(nodes: Iterable[Node]) -> dict[str, str]:
    """Value -> the parameter that it is a cast of."""
    params, out = set(), {}
    for n in nodes:
        if n.op == PARAM:
            params.add(n.name)
        elif n.op in CASTS and n.args[0].name in params:
            out[n.name] = n.args[0].name
    return out


def refs_in(value: object) -> Iterator[Ref]:
    """Every `Ref` in nested tuples, lists and dicts, in order."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from refs_in(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from refs_in(v)


def map_refs(value: object, fn: Callable[[Ref], Ref]) -> object:
    """`value` with `fn` applied to every `Ref` inside."""
    if isinstance(value, Ref):
        return fn(value)
    if isinstance(value, (tuple, list)):
        return tuple(map_refs(v, fn) for v in value)
    if isinstance(value, dict):
        return {k: map_refs(v, fn) for k, v in value.items()}
    return value


@dataclass(frozen=True)
class Program:
    """A graph: nodes in execution order, placeholders first, one output node last.

    `hints` gives each symbol an example.
    """

    name: str
    nodes: tuple[Node, ...]
    hints: dict[sympy.Symbol, int] = field(default_factory=dict)

    @cached_property
    def replicated(self) -> frozenset[str]:
        """Values without a parameter and without a float input behind them."""
        out: set[str] = set()
        for n in self.nodes:
            if n.op in PLACEHOLDERS:
                is_data = n.op == INPUT and n.type.is_float
                alike = n.op != PARAM and not is_data
            else:
                alike = n.op in SHAPE_ONLY or all(r.name in out for r in n.refs())
            if alike and n.op != OUTPUT:
                out.add(n.name)
        return frozenset(out)

    def node(self, name: str) -> Node:
        return next(n for n in self.nodes if n.name == name)

    @property
    def output(self) -> Node:
        return self.nodes[-1]

    def type_of(self, ref: Ref) -> Type:
        t = self.node(ref.name).types[ref.item or 0]
        assert t is not None
        return t

    def __str__(self) -> str:
        """The symbols, then the nodes."""
        symbols = filter(None, [declared(self.symbols, self.hints)])
        return "\n".join([f"program {self.name!r}", *symbols, *(n.line() for n in self.nodes)])

    @classmethod
    def parse(cls, text: str) -> Program:
        """What `str` writes. Raises `ValueError` with the line that cannot be read."""
        return parts(text)[0]

    @property
    def symbols(self) -> list[sympy.Symbol]:
        """Those with a hint, then the others that there are."""
        return list(dict.fromkeys((*self.hints, *_symbols(self.nodes))))

    def without_dead_nodes(self) -> Program:
        """Calls whose results nothing reads are dropped; placeholders stay."""
        used: set[str] = set()
        keep: list[Node] = []
        for n in reversed(self.nodes):
            if n.op == OUTPUT or n.op in PLACEHOLDERS or n.name in used:
                used |= {r.name for r in n.refs()}
                keep.append(n)
        return replace(self, nodes=tuple(reversed(keep)))


def _symbols(value: object) -> Iterator[sympy.Symbol]:
    """Of all sizes in nodes, types and what they hold, in order."""
    if isinstance(value, sympy.Basic):
        yield from sorted(value.atoms(sympy.Symbol), key=str)
    elif isinstance(value, Type):
        yield from _symbols(value.shape)
    elif isinstance(value, Node):
        yield from _symbols((value.types, value.args, value.kwargs))
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from _symbols(v)
    elif isinstance(value, dict):
        yield from _symbols(list(value.values()))
    elif is_dataclass(value) and type(value).__name__ in CLASSES:
        yield from _symbols([getattr(value, f.name) for f in fields(value) if f.compare])


def parts(text: str) -> tuple[Program, dict[str, object]]:
    """A program, and the bodies behind it by name. Raises `ValueError`."""
    reader = _Reader(text)
    program, bodies = reader.program(), dict[str, object]()
    while reader.peek() in ("symbol", "body"):
        reader.declared()
        if reader.take("body"):
            name = reader.of(str, "a name")
            bodies[name] = reader.value()
    if reader.kind != "end":
        raise reader.error("a node")
    return program, bodies


class _Reader(Reader):
    """Programs and nodes."""

    def program(self) -> Program:
        self.expect("program")
        name, hints = self.of(str, "a name"), self.declared()
        nodes = []
        while self.kind == "ref":
            nodes.append(self.node())
        return Program(name, tuple(nodes), hints)

    def declared(self) -> dict[sympy.Symbol, int]:
        """Those with an example."""
        hints: dict[sympy.Symbol, int] = {}
        while self.take("symbol"):
            symbol, kinds = self.next(), dict[str, bool]()
            while self.kind == "name" and self.peek() not in ("symbol", "body"):
                holds = not self.take("not")
                kinds[self.next()] = holds
            self.symbols[symbol] = sympy.Symbol(symbol, **kinds)
            if self.take("="):
                hints[self.symbols[symbol]] = self.of(int, "a number")
        return hints

    def name(self) -> str:
        token = self.next()[1:]
        return ast.literal_eval(token) if token[0] in "'\"" else token

    def node(self) -> Node:
        name, types = self.name(), list[Type | None]()
        if self.take(":"):
            types.append(self.type())
            while self.take(","):
                types.append(self.type())
        self.expect("=")
        op = self.next()
        self.expect("(")
        args, kwargs = self.arguments()
        group = self.of(int, "a number") if self.take("recompute") else 0
        source = self.next().removeprefix("#").strip() if self.kind == "source" else ""
        return Node(name, _op(op), tuple(args), kwargs, tuple(types), source, group)

    def type(self) -> Type | None:
        return None if self.take("-") else self.of(Type, "a type")

    def typed(self, dtype: torch.dtype) -> Type:
        self.expect("[")
        return Type(tuple(self.many("]", self.size)), dtype, self.take("grad"))

    def size(self) -> Size:
        value = self.value()
        if not isinstance(value, int | sympy.Expr):
            raise self.error("a size")
        return value

    def atom(self) -> object:
        """Uses, types and blocks of nodes too."""
        if self.kind == "ref":
            name = self.name()
            if not self.take("["):
                return Ref(name)
            item = self.of(int, "a number")
            self.expect("]")
            return Ref(name, item)
        if self.peek() == "{" and self.tokens[self.at + 1][0] == "ref":
            self.next()
            nodes = []
            while not self.take("}"):
                nodes.append(self.node())
            return tuple(nodes)
        value = super().atom()
        if isinstance(value, torch.dtype) and self.peek() == "[":
            return self.typed(value)
        return value


def _op(text: str) -> OpOverload | str:
    """aten.add.Tensor -> the overload; a kind is its name."""
    if "." not in text:
        return text
    space, name, overload = text.split(".")
    return getattr(getattr(getattr(torch.ops, space), name), overload)
