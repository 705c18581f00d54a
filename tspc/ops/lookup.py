"""Which integers of a program say what is looked up, and how large they may be.

In: a program before anything is cut. Out: `Lookups`: the indices that hang on no float value, so
that every rank knows them whole before a call begins. `watched` puts a check before the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from tspc.ir.kinds import PADS
from tspc.ir.program import (
    BUFFER,
    CONSTANT,
    INPUT,
    PARAM,
    PLACEHOLDERS,
    SEED,
    Node,
    Program,
    Ref,
    Size,
)
from tspc.ops import library as ops  # noqa: F401  defines tspc::pick
from tspc.seams.tensors import OpOverload

aten = torch.ops.aten
PICK = torch.ops.tspc.pick.default
IN_RANGE = torch.ops.tspc.in_range.default
DIMENSIONED = (  # (what is looked up, the dim, the index, ...); -1 is no index
    aten.index_select.default,
    aten.gather.default,
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter_add.default,
    aten.scatter_reduce.two,
    aten.index_add.default,
    aten.index_copy.default,
)
PLACED = (aten.index.Tensor, aten.index_put.default)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
COPIES = (aten.clone.default, aten._unsafe_view.default)
READ_OTHERWISE = (aten.view.dtype, aten._neg_view.default)  # views with other elements
OWN = (PICK, aten.embedding.default)  # what they run as does not check


@dataclass(frozen=True)
class Elements:
    """Those of an input, and constants."""

    input: str
    constants: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Lookup:
    """index: its values lie in [0, size), or with `wraps` in [-size, size).

    table: what it is looked up in, for the reader; of: the inputs that the index is made of, or
    nothing, where the lengths of a call are all that it hangs on. ours: of a kernel of tspc's.
    elements: what its elements are among, if that is seen without computing it.
    """

    index: Ref
    shape: tuple[Size, ...]
    size: Size
    wraps: bool
    table: str
    op: str
    source: str
    of: tuple[str, ...]
    ours: bool
    elements: Elements | None


@dataclass(frozen=True)
class Lookups:
    """listed: in the program's order. nodes: by name, all of the program's."""

    listed: tuple[Lookup, ...] = ()
    nodes: Mapping[str, Node] = field(default_factory=dict)


def lookups(program: Program) -> Lookups:
    """Of the whole program; an index that hangs on random numbers is left out."""
    by_name = {n.name: n for n in program.nodes}
    integers = _known(program)
    by_key: dict[object, Lookup] = {}
    for n in program.nodes:
        for table, index, size, wraps in _of(n, by_name):
            t = by_name[index.name].types[index.item or 0]
            if index.name not in integers or t is None or t.dtype not in INTEGERS:
                continue
            name = "its classes" if table == index else _name(table, by_name)
            words = name, _word(n), n.source, tuple(sorted(integers[index.name]))
            lookup = Lookup(
                index, t.shape, size, wraps, *words, n.op in OWN, _elements(index, by_name)
            )
            by_key.setdefault((index, size, wraps), lookup)
    return Lookups(tuple(by_key.values()), by_name)


def watched(program: Program) -> Program:
    """Each index that floats of the model make goes through an op that checks it while it runs, on
    the rank that has it; what it is looked up in does not."""
    by_name, integers = {n.name: n for n in program.nodes}, _known(program)
    nodes: list[Node] = []
    for n in program.nodes:
        for table, index, size, _ in _of(n, by_name) if n.op in OWN else ():
            maker = by_name[index.name]
            t = maker.types[index.item or 0]
            if index.name in integers or t is None or t.dtype not in INTEGERS:
                continue
            where = f"{n.source}: {_word(n)} in {_name(table, by_name)}"
            types = (maker.types[index.item or 0],)
            check = Node(f"{n.name}.index", IN_RANGE, (index, size, where), {}, types, n.source)
            nodes.append(replace(check, recompute=n.recompute))
            passed = Ref(check.name)
            n = n.map_refs(lambda r, index=index, passed=passed: passed if r == index else r)
        nodes.append(n)
    return replace(program, nodes=tuple(nodes)) if len(nodes) > len(program.nodes) else program


def _elements(value: Ref, by_name: Mapping[str, Node]) -> Elements | None:
    """What a value's are among: one of an input, seen through views, pads and fills by a mask."""
    n = by_name[value.name]
    if n.op == INPUT:
        return Elements(n.name)
    if not n.is_call or not n.args or not isinstance(n.args[0], Ref):
        return None
    inner = _elements(n.args[0], by_name)
    if inner is None or n.op in COPIES or _is_view(n.op):
        return inner
    if n.op in PADS:
        at = {aten.pad.default: 3, aten.constant_pad_nd.default: 2}[n.op]
        filled = n.kwargs.get("value", n.args[at] if len(n.args) > at else None) or 0
        constant = n.op != aten.pad.default or (*n.args[2:3], "constant")[0] == "constant"
        kept = inner.constants
    elif n.op == aten.masked_fill.Scalar:
        filled, constant = n.args[2], True
        kept = inner.constants - {_masked(n.args[1], n.args[0], by_name)}
    else:
        return None
    if not constant or not isinstance(filled, (int, float)) or filled != int(filled):
        return None
    return Elements(inner.input, kept | {int(filled)})


def _masked(mask: Ref, x: Ref, by_name: Mapping[str, Node]) -> object:
    """The c of a mask x == c; None if it is no such mask."""
    n, equal = by_name[mask.name], aten.eq.Scalar
    if n.op == aten.logical_not.default:
        n, equal = by_name[n.args[0].name], aten.ne.Scalar
    return n.args[1] if n.op == equal and n.args[0] == x else None


def _is_view(op: object) -> bool:
    """By its schema: what it gives is its first argument's memory, read only, as it is."""
    if not isinstance(op, OpOverload) or op.namespace != "aten" or op in READ_OTHERWISE:
        return False
    aliases = [r.alias_info for r in op._schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


def _word(n: Node) -> str:
    return "the loss" if n.op == PICK else n.op.name().removeprefix("aten::")


def _known(program: Program) -> dict[str, set[str]]:
    """Value without a float of the model's behind it -> the inputs that it hangs on."""
    out: dict[str, set[str]] = {}
    for n in program.nodes:
        if n.name not in program.replicated or n.name == SEED:
            continue
        if n.op in PLACEHOLDERS:
            out[n.name] = {n.name} if n.op in (INPUT, BUFFER) else set()
        elif n.op == CONSTANT:
            out[n.name] = set()
        elif n.is_call and all(r.name in out for r in n.refs()):
            out[n.name] = set().union(*(out[r.name] for r in n.refs()))
    return out


def _of(n: Node, by_name: Mapping[str, Node]) -> list[tuple[Ref, Ref, Size, bool]]:
    """(what is looked up, the index, the size of the dim, wraps) of a node."""
    if not n.is_call or not n.args or not isinstance(n.args[0], Ref):
        return []
    x = n.args[0]
    t = by_name[x.name].types[x.item or 0]
    shape = tuple[Size, ...]() if t is None else t.shape
    if n.op == aten.embedding.default:
        return [(x, n.args[1], shape[0], False)]
    if n.op == PICK:
        return [(x, n.args[1], shape[-1], False)]
    if n.op == aten.one_hot.default:
        classes = n.args[1] if len(n.args) > 1 else -1
        return [(x, x, classes, False)] if classes != -1 else []
    if n.op in PLACED:
        indices = [(k, r) for k, r in enumerate(n.args[1]) if r is not None]
        if any(by_name[r.name].type.dtype == torch.bool for _, r in indices):
            return []
        return [(x, r, shape[k], True) for k, r in indices]
    if n.op in DIMENSIONED and len(n.args) > 2 and isinstance(n.args[2], Ref) and shape:
        return [(x, n.args[2], shape[n.args[1] % len(shape)], False)]
    return []


def _name(ref: Ref, by_name: Mapping[str, Node]) -> str:
    """What is looked up: the nearest parameter or buffer behind it, or its own name."""
    seen, todo = {ref.name}, [ref.name]
    while todo:
        n = by_name[todo.pop(0)]
        if n.op in (PARAM, BUFFER):
            return n.name if n.name == ref.name else f"what {n.name} makes"
        if n.op == INPUT and n.name == ref.name:
            return n.name
        for r in sorted(n.refs(), key=lambda r: by_name[r.name].op != PARAM):
            if r.name not in seen:
                seen.add(r.name)
                todo.append(r.name)
    return ref.name
