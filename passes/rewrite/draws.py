"""Make every random op a function of one seed per call and of global positions.

In: a normalized program. Out: an equal one, in distribution, whose random ops are those of
`tspc.ops.counter`; where there are any it has one placeholder more, the seed. Two runs of a node
with one seed give one result, on any part of its dims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tspc.base.context import Arguments, Keywords
from tspc.base.errors import UnsupportedError
from tspc.ir.binding import bind
from tspc.ir.builder import Builder
from tspc.ir.program import INPUT, PLACEHOLDERS, SEED, Node, Program, Ref, Size, Type
from tspc.ops import counter  # noqa: F401  defines the ops
from tspc.ops.attention import ATTENTION, bound
from tspc.seams.tensors import OpOverload

aten = torch.ops.aten
tspc = torch.ops.tspc
_DROPOUTS = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
)


class _Drawer(Builder):
    """Emits nodes in the place of one; number: which random op of the program it is."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.args = 0, Keywords()

    def start(self, n: Node) -> None:
        self.at(n)
        self.number, self.args = self.number + 1, bind(n)[0]

    def draw_as(
        self, suffix: str, op: OpOverload, args: Arguments, t: Type, **kwargs: object
    ) -> Ref:
        """The node of no suffix is the one that stands for the random op."""
        if suffix:
            return self.emit(op, *args, types=(t,), suffix=suffix, **kwargs)
        self.types = (t,)
        return self.end(op, *args, **kwargs)

    def state(self, shape: Sequence[Size]) -> tuple[Ref, tuple[Ref, ...]]:
        """The op's state and the positions of every dim."""
        seed = Ref(SEED)
        state = Type((2,), torch.int64)
        instance = self.draw_as("state", tspc.instance.default, (seed, self.number), state)
        at, stride = [], 1
        for k, n in reversed(list(enumerate(shape))):
            t = Type((n,), torch.int64)
            at.append(self.draw_as(f"at{k}", tspc.positions.default, (seed, n, stride), t))
            stride = stride * n
        return instance, tuple(reversed(at))

    def draw(self, op: OpOverload, dtype: torch.dtype, suffix: str, like: Ref | None) -> Ref:
        """`op` of the node's shape, along the dims of `like`."""
        shape = self.node.type.shape
        if like is not None and self.type(like).shape != shape:
            like = None
        return self.draw_as(suffix, op, (like, *self.state(shape)), Type(shape, dtype), dtype=dtype)


def draw_by_counter(program: Program) -> Program:
    """Raises `UnsupportedError` for a random op that the ranks could not agree on."""
    d = _Drawer()
    drawn = False
    renamed: dict[Ref, Ref] = {}
    for n in program.nodes:
        n = n.map_refs(lambda r: renamed.get(r, r))
        if _is_identity(n):
            renamed[Ref(n.name)] = n.args[0]
        elif not _is_random(n):
            d.add(n)
        else:
            d.start(n)
            make = _RULES.get(n.op)
            seeded = d.args.get("generator") is not None
            if make is None or seeded or n.type.dtype.is_complex:
                raise UnsupportedError(
                    f"{n.source}: {n.op} draws random numbers that the ranks cannot share; "
                    "make them of torch.rand, torch.randn or torch.bernoulli without a generator, "
                    "or pass them to the model"
                )
            make(d)
            drawn = True
    if not drawn:
        return replace(program, nodes=tuple(d.nodes)).without_dead_nodes()
    seed = Node(SEED, INPUT, types=(Type((), torch.int64),))
    first = [n for n in d.nodes if n.op in PLACEHOLDERS]
    calls = [n for n in d.nodes if n.op not in PLACEHOLDERS]
    return replace(program, nodes=(*first, seed, *calls)).without_dead_nodes()


def _is_identity(n: Node) -> bool:
    """Dropout that drops nothing."""
    return n.op in _DROPOUTS and (not n.args[2] or n.args[1] == 0)


def _is_random(n: Node) -> bool:
    if not n.is_call:
        return False
    if n.op == ATTENTION:
        x, a = bound(n)
        return bool(a.dropout) and x.states is None
    if n.op == aten.rrelu.default:
        return bool(bind(n)[0]["training"])
    return torch.Tag.nondeterministic_seeded in n.op.tags


def _dropout(d: _Drawer) -> None:
    x, p = d.args["input"], d.args["p"]
    d.draw_as("", tspc.dropout.default, (x, *d.state(d.node.type.shape), float(p)), d.node.type)


def _attention(d: _Drawer) -> None:
    x, a = bound(d.node)
    shape = d.type(x.q).shape[:-1]
    states = d.draw_as(
        "states", tspc.query_states.default, (x.q, *d.state(shape)), Type(shape, torch.int64)
    )
    d.draw_as("", ATTENTION, replace(x, states=states).args, d.node.type, **a.kwargs)


def _like(d: _Drawer) -> Ref | None:
    """The operand whose dims the result has."""
    refs = [r for r in d.node.refs() if d.type(r).shape == d.node.type.shape]
    return refs[0] if refs else None


def _plain(op: OpOverload) -> Callable[[_Drawer], object]:
    """A draw as torch's op has it."""
    return lambda d: d.draw(op, d.node.type.dtype, "", _like(d))


def _done(d: _Drawer, drawn: Ref) -> None:
    """The last node takes the name and the dtype of the random op; nothing differentiates it."""
    t = replace(d.node.type, requires_grad=False)
    d.draw_as("", aten._to_copy.default, (drawn,), t, dtype=t.dtype)


def _affine(op: OpOverload, scale: str, shift: str) -> Callable[[_Drawer], None]:
    """A draw times one argument plus another, each a number or a tensor."""

    def make(d: _Drawer) -> None:
        dtype = d.node.type.dtype
        drawn = d.draw(op, dtype, "drawn", _like(d))
        t = replace(d.node.type, requires_grad=False)
        a, b = d.args[scale], d.args[shift]
        times = aten.mul.Tensor if isinstance(a, Ref) else aten.mul.Scalar
        plus = aten.add.Tensor if isinstance(b, Ref) else aten.add.Scalar
        drawn = d.draw_as("scaled", times, (drawn, a), t)
        d.draw_as("", plus, (drawn, b), t)

    return make


def _uniform(d: _Drawer) -> None:
    low, high = d.args["from"], d.args["to"]
    d.args = {"scale": high - low, "shift": low}
    _affine(tspc.uniform.default, "scale", "shift")(d)


def _bernoulli(d: _Drawer) -> None:
    """1 where a uniform number is less than p."""
    p = d.args["p"] if "p" in d.args else d.args["self" if "self" in d.args else "input"]
    wide = torch.float64 if isinstance(p, Ref) and d.type(p).dtype == torch.float64 else None
    dtype = wide or torch.float32
    drawn = d.draw(tspc.uniform.default, dtype, "drawn", _like(d))
    less = aten.lt.Tensor if isinstance(p, Ref) else aten.lt.Scalar
    drawn = d.draw_as("less", less, (drawn, p), Type(d.node.type.shape, torch.bool))
    _done(d, drawn)


def _exponential(d: _Drawer) -> None:
    """-log(1 - u) / rate, never zero: its logarithm is taken."""
    dtype = torch.promote_types(d.node.type.dtype, torch.float32)
    t = Type(d.node.type.shape, dtype)
    drawn = d.draw(tspc.uniform.default, dtype, "drawn", _like(d))
    drawn = d.draw_as("negative", aten.neg.default, (drawn,), t)
    drawn = d.draw_as("log", aten.log1p.default, (drawn,), t)
    drawn = d.draw_as("positive", aten.neg.default, (drawn,), t)
    drawn = d.draw_as("least", aten.clamp_min.default, (drawn, torch.finfo(dtype).eps / 4), t)
    _done(d, d.draw_as("scaled", aten.mul.Scalar, (drawn, 1.0 / d.args["lambd"]), t))


def _integers(d: _Drawer) -> None:
    """floor(u * (high - low)) + low."""
    low, high = d.args.get("low") or 0, d.args["high"]
    wide = Type(d.node.type.shape, torch.float64)
    drawn = d.draw(tspc.uniform.default, wide.dtype, "drawn", _like(d))
    drawn = d.draw_as("scaled", aten.mul.Scalar, (drawn, high - low), wide)
    drawn = d.draw_as("floor", aten.floor.default, (drawn,), wide)
    drawn = d.draw_as("shifted", aten.add.Scalar, (drawn, low), wide)
    _done(d, drawn)


def _permutation(d: _Drawer) -> None:
    """The order of uniform numbers."""
    drawn = d.draw(tspc.uniform.default, torch.float64, "drawn", None)
    drawn = d.draw_as("order", aten.argsort.default, (drawn,), Type(d.node.type.shape, torch.int64))
    _done(d, drawn)


_RULES: dict[OpOverload, Callable[[_Drawer], object]] = {
    aten.dropout.default: _dropout,
    ATTENTION: _attention,
    aten.rand.default: _plain(tspc.uniform.default),
    aten.rand_like.default: _plain(tspc.uniform.default),
    aten.randn.default: _plain(tspc.normal.default),
    aten.randn_like.default: _plain(tspc.normal.default),
    aten.bernoulli.default: _bernoulli,
    aten.bernoulli.p: _bernoulli,
    aten.bernoulli.Tensor: _bernoulli,
    aten.uniform.default: _uniform,
    aten.exponential.default: _exponential,
    aten.normal_functional.default: _affine(tspc.normal.default, "std", "mean"),
    aten.normal.float_float: _affine(tspc.normal.default, "std", "mean"),
    aten.normal.Tensor_float: _affine(tspc.normal.default, "std", "mean"),
    aten.normal.float_Tensor: _affine(tspc.normal.default, "std", "mean"),
    aten.normal.Tensor_Tensor: _affine(tspc.normal.default, "std", "mean"),
    aten.randint.default: _integers,
    aten.randint.low: _integers,
    aten.randint_like.default: _integers,
    aten.randint_like.low_dtype: _integers,
    aten.randperm.default: _permutation,
}
