"""Index expressions by op: what a rule says a tensor holds at an index is what torch computes, at
all indices; where it says nothing the value stays data."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tspc.frontend.from_fx import convert
from tspc.ir.program import INPUT, Node, Ref, Type
from tspc.masks.index import TRUE, At, Cases, index
from tspc.passes.rewrite.masks import expressions
from tspc.rules.index import RULES, Reader, as_dtype, literal, moved, rule

aten = torch.ops.aten
Tensor = torch.Tensor
I0, I1 = index(0), index(1)


def expression(fn: Callable[..., Tensor], *tensors: Tensor) -> tuple[Any, Tensor]:
    """Of the last value of a function, and the value."""
    gm = make_fx(fn, pre_dispatch=True)(*tensors)
    kinds = [(INPUT, f"x{i}") for i in range(len(tensors))]
    program, _ = convert("sample", gm, kinds, [False] * len(tensors), {})
    env: dict[Ref, Any] = {}
    expressions(program.nodes, env, {})
    return env.get(program.output.args[0]), fn(*tensors)


def at(e: Any, place: tuple[int, ...], data: dict[str, Tensor]) -> Any:
    """What an expression says of one place."""
    if isinstance(e, Cases):
        (value,) = (v for v, p in e.values if at(p, place, data))
        return value
    e = e.subs({index(d): i for d, i in enumerate(place)})
    e = e.replace(At, lambda x, *i: sympy.Integer(int(data[x.name][tuple(map(int, i))])))
    return bool(e) if e in (sympy.true, sympy.false) else int(e)


def agrees(e: Any, value: Tensor, data: dict[str, Tensor]) -> None:
    for place in itertools.product(*map(range, value.shape)):
        assert at(e, place, data) == value[place].item(), place


def q(n: int = 4) -> Tensor:
    return torch.arange(n)[:, None]


def k(n: int = 4) -> Tensor:
    return torch.arange(n)[None, :]


def causal() -> Tensor:
    return q() >= k()


X = torch.tensor([[0, 3, 1, 2], [2, 2, 0, 1]])
# rule -> a function without data, or of the integers X
SAMPLES: dict[str, Callable[..., Tensor]] = {
    "ge": lambda: q() >= k(),
    "le": lambda: q() <= k() + 1,
    "gt": lambda: q() > k(),
    "lt": lambda: q() < 2,
    "eq": lambda: q() == k(),
    "ne": lambda: q() != k(),
    "compared floats": lambda: torch.where(causal(), 0.0, -1.0) < -0.5,
    "compared with a float": lambda: q() >= 2.0,
    "add": lambda: torch.add(q(), k(), alpha=2),
    "sub": lambda: q() - k(),
    "mul": lambda: q() * k(),
    "or as a sum": lambda: causal() + (k() == 3),
    "and as a product": lambda: causal() * (k() > 0),
    "sum of floats": lambda: torch.where(causal(), 0.0, -1.0) + torch.where(q() == k(), 2.0, 0.0),
    "floor_divide": lambda: torch.arange(7) // 2,
    "remainder": lambda: torch.arange(7) % 3,
    "div": lambda: torch.div(torch.arange(7), 2, rounding_mode="trunc"),
    "neg": lambda: -torch.arange(3),
    "abs": lambda: (q() - k()).abs(),
    "rsub": lambda: 3 - torch.arange(4),
    "xor": lambda: causal() ^ (k() == 1),
    "and": lambda: causal() & (k() > 0),
    "or": lambda: causal() | (k() == 3),
    "not": lambda: ~causal(),
    "arange": lambda: torch.arange(2, 7),
    "full": lambda: torch.full((2, 3), 5),
    "ones": lambda: torch.ones(2, 3, dtype=torch.bool),
    "zeros": lambda: torch.zeros(2, 3),
    "full_like": lambda: torch.full_like(torch.arange(3), 4),
    "to": lambda: causal().to(torch.float32),
    "bool of integers": lambda: (q() - k()).to(torch.bool),
    "clone": lambda: torch.arange(3).clone(),
    "where": lambda: torch.where(causal(), 0.0, -1.5),
    "where of bools": lambda: torch.where(q() > 1, causal(), k() == 2),
    "masked_fill": lambda: torch.zeros(4, 4).masked_fill(~causal(), -torch.inf),
    "tril": lambda: torch.ones(4, 4, dtype=torch.bool).tril(1),
    "triu": lambda: torch.full((4, 4), -1.0).triu(1),
    "unsqueeze": lambda: (torch.arange(3) * 2).unsqueeze(0),
    "expand": lambda: torch.arange(3)[:, None].expand(3, 2),
    "transpose": lambda: causal().transpose(0, 1),
    "permute": lambda: aten.permute.default(causal().unsqueeze(0), [2, 0, 1]),
    "squeeze": lambda: aten.squeeze.dim(causal().unsqueeze(1), 1),
    "select": lambda: aten.select.int(q() - k(), 0, -2),
    "view": lambda: causal().view(4, 1, 4),
    "slice": lambda: aten.slice.Tensor(torch.arange(9), 0, -6, 8, 2),
    "index": lambda: (q() - k())[torch.arange(4) // 2, torch.arange(4)],
    "cumsum": lambda: torch.zeros(4, dtype=torch.bool).cumsum(0),
    "diff": lambda: torch.diff(torch.arange(5), prepend=torch.arange(1) - 1),
    "data": lambda x: x[:, :, None] == x[:, None, :],
    "data at an index": lambda x: aten.index.Tensor(x, [q() % 2, k()]) >= q(),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_an_expression_says_what_torch_computes(name: str) -> None:
    fn = SAMPLES[name]
    tensors = (X,) * fn.__code__.co_argcount
    e, value = expression(fn, *tensors)
    assert e is not None
    assert tensors or isinstance(e, Cases) or not e.atoms(At), "the rule says nothing"
    agrees(e, value, {"x0": X})


# functions whose last op no rule reads: the value is data
DATA: dict[str, Callable[..., Tensor]] = {
    "division by a negative number": lambda: torch.arange(4) // -2,
    "truncated division of what may be negative": lambda: torch.div(
        torch.arange(4) - 2, 3, rounding_mode="trunc"
    ),
    "a view that merges dims": lambda: (q() - k()).view(16),
    "an index with a gap": lambda: aten.index.Tensor(q() - k(), [None, torch.arange(2)]),
    "a running sum": lambda: torch.arange(4).cumsum(0),
    "differences that change": lambda: torch.diff(torch.arange(4) ** 2, prepend=torch.arange(1)),
    "a second difference": lambda: torch.diff(torch.arange(6), 2),
    "bools subtracted from a number": lambda: torch.rsub(causal().long(), 1),
    "an exclusive or of integers": lambda: q() ^ k(),
    "an integer and": lambda: q() & k(),
    "an integer or": lambda: q() | k(),
    "an integer not": lambda: ~q(),
    "a choice of integers": lambda: torch.where(causal(), q(), k()),
    "a triangle of integers": lambda: (q() - k()).tril(),
}


@pytest.mark.parametrize("name", DATA)
def test_where_no_rule_says_what_it_holds_it_is_data(name: str) -> None:
    e, _ = expression(DATA[name])
    assert e.atoms(At)


def test_floats_that_are_no_few_cases_are_unknown() -> None:
    assert expression(lambda: torch.arange(4).to(torch.float32))[0] is None
    assert expression(lambda: torch.arange(4.0))[0] is None
    assert expression(lambda: torch.full((2,), torch.inf) - torch.full((2,), torch.inf))[0] is None


def test_numbers_of_a_type() -> None:
    assert literal(True, torch.int64) is TRUE and literal(2, torch.bool) is TRUE
    assert literal(2.0, torch.int64) == 2 and literal(I0, torch.int64) is I0
    assert literal(0.1, torch.float32) == Cases(((float(torch.tensor(0.1)), TRUE),))


def test_casts_between_kinds() -> None:
    p = sympy.Ge(I0 - I1, 0)
    both = as_dtype(p, torch.float32)
    assert isinstance(both, Cases) and dict(both.values)[1.0] == p
    assert as_dtype(both, torch.bool) == p and as_dtype(p, torch.bool) is p
    assert as_dtype(both, torch.int64) is None and as_dtype(I0 + 1, torch.float32) is None
    assert as_dtype(I0 + 1, torch.int32) == I0 + 1
    narrow = as_dtype(Cases(((0.1, TRUE),)), torch.float16)
    assert isinstance(narrow, Cases) and narrow.values[0][0] == torch.tensor(0.1).half().item()


def test_dims_move_at_once() -> None:
    assert moved(I0 - I1, {0: 1, 1: 0}) == I1 - I0


def test_a_reader_aligns_operands_from_the_right() -> None:
    types = {Ref("x"): Type((3,), torch.int64)}
    node = Node("y", aten.add.Tensor, types=(Type((2, 3), torch.int64),))
    r = Reader(node, {Ref("x"): I0 + 1}, types)
    assert r.aligned(Ref("x")) == I1 + 1 and r.aligned(4) == 4 and r.shape(Ref("x")) == (3,)


def test_an_op_has_one_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tspc.rules.index.RULES", {"ge": RULES["ge"]})
    with pytest.raises(AssertionError, match="ge"):
        rule("ge")(RULES["le"])
