"""Views of stored tensors. Those that cut what is cut (a row, a range, all of it in one dim) are
gathered where they are read, and written through to what is stored; in the others dims move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tspc.base.context import Arguments, Keywords
from tspc.base.errors import ShardedParameterError
from tspc.runtime.params.stored import put, whole
from tspc.seams.tensors import OpOverload, make_subclass, no_torch_function, tree_leaves, tree_map


class Part(torch.Tensor):
    """base: what is stored. full: the base, gathered when it was at `version`; shown: the view of
    it."""

    __torch_function__ = no_torch_function  # type: ignore[assignment]

    base: DTensor
    full: torch.Tensor
    shown: torch.Tensor
    version: int

    @staticmethod
    def made(base: DTensor, full: torch.Tensor, inner: torch.Tensor) -> Part:
        self = make_subclass(Part, inner)
        assert isinstance(self, Part)
        self.base, self.full, self.shown = base, full, inner
        self.version = base._local_tensor._version
        return self

    def fresh(self) -> torch.Tensor:
        """As the base is now; collective where it was written into."""
        if self.version != self.base._local_tensor._version:
            self.full.copy_(whole(self.base))
            self.version = self.base._local_tensor._version
        return self.shown

    def __repr__(self, **settings: object) -> str:
        return repr(self.fresh())

    def __deepcopy__(self, memo: object) -> torch.Tensor:
        return self.fresh().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.fresh().clone().__reduce_ex__(protocol)

    def numpy(self, **settings: Any) -> Any:
        return self.fresh().detach().requires_grad_(self.requires_grad).numpy(**settings)

    def tolist(self) -> Any:
        return self.fresh().tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: OpOverload, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        kwargs = kwargs or {}
        written = _written(func, args, kwargs)
        if torch.is_grad_enabled() and any(x.base.requires_grad for x in written):
            raise ShardedParameterError(
                f"{func} writes into a part of a sharded tensor that has a gradient: make it by "
                "torch.where or torch.cat, or write under torch.no_grad()"
            )
        whole_args, named = tree_map(
            lambda x: x.fresh() if isinstance(x, Part) else x, (args, kwargs)
        )
        out = func(*whole_args, **named)
        for x in written:
            put(x.base, x.full)
            x.version = x.base._local_tensor._version
        if written and func._schema.name.endswith("_"):
            return args[0]
        if func.is_view and isinstance(args[0], Part):
            return parts_of(args[0].base, args[0].full, out)
        return out


def parts_of(
    base: DTensor, full: torch.Tensor, out: torch.Tensor | Sequence[torch.Tensor]
) -> Part | Sequence[Part]:
    """The views that an op made of the gathered base."""
    if isinstance(out, torch.Tensor):
        return Part.made(base, full, out)
    views = [Part.made(base, full, x) for x in out]
    return tuple(views) if isinstance(out, tuple) else views


def _written(func: OpOverload, args: Arguments, kwargs: Keywords) -> list[Part]:
    parts = []
    for i, a in enumerate(func._schema.arguments):
        if a.alias_info is not None and a.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(a.name)
            parts += [x for x in tree_leaves(value) if isinstance(x, Part)]
    return parts


def places(name: str, x: DTensor, named: Keywords) -> dict[int, int]:
    """Dim -> where it is in the result, of those that are whole in it."""
    n = x.dim()
    same = {d: d for d in range(n)}
    if name == "t":
        return {0: 1, 1: 0} if n == 2 else same
    if name == "transpose":
        a, b = named["dim0"] % n, named["dim1"] % n
        return same | {a: b, b: a}
    if name == "permute":
        return {d % n: i for i, d in enumerate(named["dims"])}
    if name in ("view", "_unsafe_view"):
        return same if tuple(named["size"]) == tuple(x.shape) else {}
    if name == "expand":
        more = len(named["size"]) - n
        kept = tuple(named["size"])[more:]
        return {d: d + more for d in range(n)} if kept == tuple(x.shape) else {}
    if name == "unsqueeze":
        at = named["dim"] % (n + 1)
        return {d: d + (d >= at) for d in range(n)}
    at = named.get("dim", 0) % n
    if name == "select":
        return {d: d - (d > at) for d in range(n) if d != at}
    cut = named.get("start") or 0, min(named.get("end") or x.shape[at], x.shape[at])
    whole_range = (*cut, named.get("step", 1)) == (0, x.shape[at], 1)
    return same if whole_range else {d: d for d in range(n) if d != at}
