"""Reading a program backwards from a node: what makes a value, and what it keeps of its operand."""

from __future__ import annotations

from collections import ChainMap, Counter

from tspc.ir.builder import Builder
from tspc.ir.program import Node, Program, Ref, Type


class Reading:
    """Of the program as it is. b: what is made in the place of the node that is read from."""

    def __init__(self, program: Program):
        self.by_name = {n.name: n for n in program.nodes}
        self.users = Counter(r.name for n in program.nodes for r in n.refs())
        self.start(program.nodes[0])

    def start(self, n: Node) -> None:
        self.b = Builder(ChainMap({}, self.by_name))
        self.b.at(n)

    def _type(self, r: Ref) -> Type:
        return self.b.type(r)

    def _inner(self, r: object) -> Node | None:
        """What makes a value that has this one use, in the same part of the model."""
        if not isinstance(r, Ref):
            return None
        node = self.by_name[r.name]
        if not node.is_call or self.users[node.name] != 1 or r.item is not None:
            return None
        return node if node.recompute == self.b.node.recompute else None

    def _keeps_rows(self, n: Node) -> bool:
        """The last two dims are those of the operand."""
        before = self._type(n.args[0]).shape
        return len(n.type.shape) > 2 and n.type.shape[-2:] == before[-2:]

    def _drops_a_column(self, n: Node) -> bool:
        """All of the last dim but its last element."""
        _, dim, start, end, *step = (*n.args, *(None,) * (4 - len(n.args)))
        size = self._type(n.args[0]).shape[-1]
        last = (dim or 0) % len(n.type.shape) == len(n.type.shape) - 1
        return last and not start and end in (-1, size - 1) and step in ([], [1])
