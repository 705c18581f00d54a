"""Rules by brute force: an op on the pieces of every factor that its rule leaves cuttable, rejoined
by concatenation, sum or log-sum-exp, must equal the op on the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tspc.base.errors import RuleError
from tspc.factors.factor import Dims, Factor
from tspc.factors.placement import indices
from tspc.factors.registry import overload_of
from tspc.frontend.from_fx import convert
from tspc.ir.builder import Builder
from tspc.ir.program import INPUT, OUTPUT, Program, Ref, Size
from tspc.ops.run import Run
from tspc.passes.analyse.factorize import Analysis, Record, factorize
from tspc.passes.analyse.fold import added_once
from tspc.passes.analyse.sizes import Sizes
from tspc.passes.lower import local_op
from tspc.seams.tensors import OpOverload

PICK = torch.ops.tspc.pick.default
Values = dict[str, torch.Tensor]  # by `Ref.value`


def traced(
    fn: Callable[..., object],
    *tensors: torch.Tensor,
    apart: dict[OpOverload, Callable[..., object]] | None = None,
) -> tuple[Analysis, Values]:
    """The analysis of a function of tensors, its ops as they are written but for those taken apart,
    and every value."""
    gm = make_fx(fn, apart, pre_dispatch=True)(*tensors)
    kinds = [(INPUT, f"x{i}") for i in range(len(tensors))]
    program, positions = convert("sample", gm, kinds, [False] * len(tensors), {})
    a = factorize(program)
    return a, values(program, {n: tensors[i] for n, i in positions.items()})


def values(program: Program, inputs: Mapping[str, torch.Tensor]) -> Values:
    """Every node's value on one device."""
    run = Run(dict(inputs), {}, torch.device("cpu"))
    run.nodes(n for n in program.nodes if n.op != OUTPUT)
    return run.values


def called(
    a: Analysis, r: Record, cut: Mapping[Factor, Size], inputs: Values
) -> list[torch.Tensor]:
    """The results of an op on operands that are cut."""
    b = Builder()
    b.at(r.node, ())
    local_op.lower(b, r.node, r.ins, r.outs, Sizes(a.F, cut))
    run = Run(dict(inputs), {}, torch.device("cpu"))
    run.nodes(b.nodes)
    return [run.values[Ref(r.node.name, i).value] for i in range(len(r.node.types))]


def take(a: Analysis, x: torch.Tensor, dims: Dims, f: Factor, piece: list[int]) -> torch.Tensor:
    """The part of a value that a piece of a factor has."""
    for k, d in enumerate(dims):
        if f in a.F.leaves(tuple(d)):
            x = x.index_select(k, torch.tensor(indices(a.F, tuple(d), f, piece)))
    return x


def cuttable(r: Record) -> list[tuple[Factor, str]]:
    """(factor, "keep" | "reduce" | "lse"): what the rule says may be cut."""
    out = []
    for f in set().union(*r.carried_in, *r.carried_out):
        kinds = {role for role, *_ in r.roles.get(f, ())}
        if not isinstance(f.size, int) or f.size < 2:
            continue
        if not kinds and any(f in c for c in r.carried_out):
            out.append((f, "keep"))
        elif kinds in ({"reduce"}, {"lse"}):
            out.append((f, *kinds))
    return sorted(out, key=lambda x: x[0].id)


def pieces(f: Factor) -> list[list[int]]:
    """Two uneven pieces."""
    n = int(f.size)
    return [list(range(n // 3 + 1)), list(range(n // 3 + 1, n))]


def run(
    a: Analysis, r: Record, env: Values, f: Factor, how: str, piece: list[int]
) -> list[torch.Tensor]:
    """The op on one piece of a factor; what is added after a sum only in the first."""
    dims = {x: d for x, d in zip(r.refs, r.ins) if x is not None}
    once = added_once(r.node) if how == "reduce" and piece[0] else None

    def get(x: Ref) -> torch.Tensor:
        v = take(a, env[x.value], dims[x], f, piece)
        return torch.zeros_like(v) if x == once else v

    if r.node.op == PICK and how == "reduce":
        logits, labels = (get(x) for x in r.refs[:2] if x is not None)
        return [r.node.op(logits, labels, torch.tensor(piece[0]))]
    return called(a, r, {f: len(piece)}, {x.value: get(x) for x in dims})


def check_cut(a: Analysis, r: Record, env: Values, f: Factor, how: str) -> None:
    """The pieces of one factor, rejoined, are the whole."""
    split, where = pieces(f), f"{r.node.name} {r.node.op} cut along {f}"
    try:
        parts = [run(a, r, env, f, how, p) for p in split]
    except RuntimeError as e:
        raise AssertionError(f"{where}: {e}") from e
    for i, dims in enumerate(r.outs):
        whole = env[Ref(r.node.name, i).value]
        if how == "keep":
            for piece, p in zip(split, parts):
                torch.testing.assert_close(p[i], take(a, whole, dims, f, piece), msg=where)
            continue
        both = torch.stack([p[i] for p in parts])
        joined = both.sum(0) if how == "reduce" else both.logsumexp(0)
        torch.testing.assert_close(joined, whole, msg=where)


def check(a: Analysis, env: Values) -> dict[OpOverload, int]:
    """Compares every piece; returns how many cuts were tried per op."""
    done: dict[OpOverload, int] = {}
    for r in a.records:
        if r.node.op == OUTPUT:
            continue
        for f, how in cuttable(r):
            check_cut(a, r, env, f, how)
            done[r.node.op] = done.get(r.node.op, 0) + 1
    return done


def only(x: torch.Tensor, dim: int, position: int) -> torch.Tensor:
    """Zero but at one position of a dim."""
    out = torch.zeros_like(x)
    out.select(dim, position).copy_(x.select(dim, position))
    return out


def outputs(
    r: Record, a: Analysis, env: Values, swap: dict[Ref, torch.Tensor]
) -> list[torch.Tensor]:
    """The op on the whole, some operands exchanged; numbers as floats."""
    results = called(a, r, {}, env | {x.value: v for x, v in swap.items()})
    return [x if x.is_floating_point() or x.is_complex() else x.double() for x in results]


def check_meaning(a: Analysis, env: Values) -> None:
    """What is selected: each result takes one position of it. Where positions are read: a result
    depends on no other position of it."""
    for r in a.records:
        for f, roles in r.roles.items() if r.node.op != OUTPUT else ():
            kinds = {role for role, *_ in roles}
            for x, dims in zip(r.refs, r.ins):
                at = [k for k, d in enumerate(dims or ()) if a.F.expand(tuple(d)) == (f,)]
                if x is None or len(at) != 1 or not kinds & {"select", "at"}:
                    continue
                value, where = env[x.value], f"{r.node.op} {kinds} {f}"
                if value.dtype == torch.int64:
                    continue
                parts = [only(value, at[0], p) for p in range(int(f.size))]
                each = [outputs(r, a, env, {x: part}) for part in parts]
                for i, whole in enumerate(outputs(r, a, env, {})):
                    if "at" in kinds:
                        (k,) = (k for k, d in enumerate(r.outs[i]) if f in a.F.leaves(tuple(d)))
                        for p, e in enumerate(each):
                            torch.testing.assert_close(
                                e[i].select(k, p), whole.select(k, p), msg=where
                            )
                    elif kinds == {"select"}:
                        none = outputs(r, a, env, {x: torch.zeros_like(value)})[i]
                        moved = torch.stack([e[i] - none for e in each])
                        torch.testing.assert_close(moved.sum(0) + none, whole, msg=where)
                        assert ((moved != 0).sum(0) <= 1).all(), where


def check_rule(
    op: Callable[..., object],
    samples: Sequence[Sequence[object]],
    kwargs: Mapping[str, object] = {},
) -> int:
    """Try the rule of an op by brute force.

    op: as given to `tspc.rule`. samples: the positional arguments of a call each, tensors on the
    CPU (float64 tells best) and others; kwargs: keywords of all calls. Every factor that the rule
    leaves cuttable is cut in two uneven pieces, the op runs on each, and what they make, rejoined,
    must be what the whole op makes; what is said to be selected or read by position must be so.
    -> how many cuts were tried. Raises `RuleError` naming the op and the factor where a cut changes
    the result, and where no sample reaches a cut.
    """
    overload, tried = overload_of(op), 0
    for number, sample in enumerate(samples):
        tensors = [x for x in sample if isinstance(x, torch.Tensor)]

        def call(*xs: torch.Tensor, sample: Sequence[object] = sample) -> object:
            following = iter(xs)
            args = [next(following) if isinstance(x, torch.Tensor) else x for x in sample]
            return overload(*args, **kwargs)

        try:
            a, env = traced(call, *tensors)
            tried += check(a, env).get(overload, 0)
            check_meaning(a, env)
        except (AssertionError, RuntimeError) as e:
            raise RuleError(f"the rule of {overload} is wrong, sample {number}: {e}") from e
    if not tried:
        raise RuleError(
            f"no sample of {overload} reaches a cut: it has no rule, or its rule leaves no dim of "
            "size 2 or more cuttable"
        )
    return tried
