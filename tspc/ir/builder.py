"""Nodes one after the other, each made in the place of one that there was.

In the place of n, n.1 with its source, and n itself with its types:

    b = Builder()
    b.at(n)
    y = b.of(aten.mul.Tensor, (x, 2), shape, dtype)
    b.end(aten.add.Tensor, y, z)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from tspc.base.context import Arguments
from tspc.ir.program import Node, Ref, Size, Type, refs_in
from tspc.seams.tensors import OpOverload

Types = tuple[Type | None, ...]


class Builder:
    """The nodes so far. by_name: those of a program, which the new ones join."""

    def __init__(self, by_name: MutableMapping[str, Node] | None = None):
        self.nodes: list[Node] = []
        self.by_name: MutableMapping[str, Node] = {} if by_name is None else by_name
        self.node, self.types, self._count = Node("", ""), Types(), 0
        self._instead: dict[str, Ref] = {}

    def at(self, n: Node, types: Types | None = None) -> None:
        """What comes next stands in the place of this node. types: of its results; its own."""
        self.node, self.types, self._count = n, n.types if types is None else types, 0

    def add(self, n: Node) -> Ref:
        n = n.map_refs(self.use)
        self.nodes.append(n)
        self.by_name[n.name] = n
        return Ref(n.name)

    def end(self, op: OpOverload | str, *args: Any, **kwargs: Any) -> Ref:
        """The node at hand itself, as this op."""
        return self.add(replace(self.node, op=op, args=args, kwargs=kwargs, types=self.types))

    def emit(
        self, op: OpOverload | str, *args: Any, types: Types = (), suffix: str = "", **kwargs: Any
    ) -> Ref:
        """A node of a name of its own: that of the node at hand, and the suffix or a number."""
        name = f"{self.node.name}.{suffix}"
        while name.endswith(".") or not suffix and name in self.by_name:
            self._count += 1
            name = f"{self.node.name}.{self._count}"
        return self.add(replace(self.node, name=name, op=op, args=args, kwargs=kwargs, types=types))

    def of(
        self,
        op: OpOverload,
        args: Arguments,
        shape: Iterable[Size],
        dtype: torch.dtype,
        suffix: str = "",
        /,
        **kwargs: Any,
    ) -> Ref:
        """The same, of one result; autograd follows what it is made of."""
        grad = dtype.is_floating_point and any(self.type(r).requires_grad for r in refs_in(args))
        t = Type(tuple(shape), dtype, grad)
        return self.emit(op, *args, types=(t,), suffix=suffix, **kwargs)

    def type(self, r: Ref) -> Type:
        """Of a value made before."""
        r = self.use(r)
        t = self.by_name[r.name].types[r.item or 0]
        assert t is not None
        return t

    def instead(self, old: Ref, new: Ref) -> None:
        """Later nodes that read `old` read `new`."""
        self._instead[old.value] = self.use(new)

    def use(self, r: Ref) -> Ref:
        return self._instead.get(r.value, r)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """What is exchanged here is exchanged in here only."""
        outside = dict(self._instead)
        try:
            yield
        finally:
            self._instead = outside
