"""Parameters that a model writes into in its forward, under `.data` or `no_grad`.

In: a Dynamo graph. Out: an interpreter of it for tracing. As on one device, what reads the
parameter after the write gets the new value, and its gradient is the parameter's.
"""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch.fx import Node

from tspc.base.errors import UnsupportedError
from tspc.frontend.autocast import Entered
from tspc.seams.lowering import has_data_mutation
from tspc.seams.tensors import tree_map

ADVICE = "write into it by .data or under torch.no_grad(), and read the parameter itself after"
DETACHING = ("detach", "detach_", "data", "_get_data_attr")
# what gives the memory of its first argument; of others, a write that reaches a parameter is told
# when it has happened
VIEWS = frozenset(
    [
        "view",
        "view_as",
        "reshape",
        "flatten",
        "unflatten",
        "transpose",
        "swapaxes",
        "swapdims",
        "movedim",
        "permute",
        "t",
        "T",
        "mT",
        "squeeze",
        "unsqueeze",
        "narrow",
        "select",
        "getitem",
        "diagonal",
        "expand",
        "expand_as",
        "chunk",
        "split",
        "unbind",
        "alias",
    ]
)


class Overwriting(Entered):
    """Runs a Dynamo graph on functional tensors.

    kinds: (kind, name) of each placeholder. parameters: the places of those that take gradients.
    """

    def __init__(
        self,
        gm: torch.fx.GraphModule,
        kinds: list[tuple[str, str]],
        parameters: Collection[int],
    ):
        super().__init__(gm)
        holders = list(gm.graph.find_nodes(op="placeholder"))
        self.names = {holders[i]: kinds[i][1] for i in parameters}
        self.aliases: set[Node] = set()
        self.written = {p for n in gm.graph.nodes if (p := self._writes(n)) is not None}
        for n in self.aliases:
            if not _detached(n) and not self.aliases.issuperset(n.users):
                raise UnsupportedError(
                    f"{self._name(n)}: a view of it is written and read; {ADVICE}"
                )
        self.now: dict[Node, torch.Tensor] = {}  # as it was given, which the writes change
        self.zero: dict[Node, torch.Tensor] = {}  # with the gradient of the parameter

    @property
    def places(self) -> set[int]:
        """Of the parameters that are written."""
        holders = list(self.module.graph.find_nodes(op="placeholder"))  # type: ignore[union-attr]
        return {i for i, n in enumerate(holders) if n in self.written}

    def _writes(self, n: Node) -> Node | None:
        """The parameter that the node writes into."""
        if not _may_write(n):
            return None
        chain = [n]
        while _is_alias(chain[-1]) and isinstance(chain[-1].args[0], Node):
            chain.append(chain[-1].args[0])
        if chain[-1] not in self.names:
            return None
        self.aliases.update(chain[:-1])
        return chain[-1]

    def _name(self, n: Node) -> str:
        while n not in self.names:
            n = n.args[0]  # type: ignore[assignment]
        return self.names[n]

    def run_node(self, n: Node) -> object:
        if n in self.aliases and _may_write(n) and torch.is_grad_enabled() and not _detached(n):
            raise UnsupportedError(f"{self._name(n)}: the model writes into it; {ADVICE}")
        value = super().run_node(n)
        if n in self.written:
            self.now[n], self.zero[n] = value, value - value.detach()
        return value

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple, dict]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if self.written.isdisjoint(n.all_input_nodes) or n in self.aliases:
            return args, kwargs
        if n.op != "output" and not torch.is_grad_enabled():
            return args, kwargs
        new = {id(x): self._read(p) for p, x in self.now.items() if has_data_mutation(x)}

        def now(x: object) -> object:
            return new.get(id(x), x)

        return tree_map(now, (args, kwargs))

    def _read(self, p: Node) -> torch.Tensor:
        """The new value, with the parameter's gradient."""
        return self.now[p].detach() + self.zero[p]


def _op_name(n: Node) -> str:
    return getattr(n.target, "__name__", str(n.target)).rpartition(".")[2]


def _is_alias(n: Node) -> bool:
    """It has the memory of its first argument."""
    named = _op_name(n) in DETACHING or _op_name(n) in VIEWS or _may_write(n)
    if _op_name(n) == "getattr" and len(n.args) > 1:
        named = n.args[1] in DETACHING or n.args[1] in VIEWS
    return bool(n.args) and named


def _detached(n: Node) -> bool:
    """It, or what it is made of, has no gradient."""
    while isinstance(n, Node) and n.op != "placeholder":
        if _op_name(n) in DETACHING:
            return True
        n = n.args[0]  # type: ignore[assignment]
    return False


def _may_write(n: Node) -> bool:
    """By its name: torch's ops in place end in an underscore."""
    name = getattr(n.target, "__name__", str(n.target)).split(".")[0]
    of_python = n.target is operator.setitem or name in ("iadd", "isub", "imul", "itruediv")
    in_place = name.endswith("_") and not name.endswith("__")
    return n.op in ("call_function", "call_method") and (of_python or in_place)
