"""One-op samples: every registered rule is tried by brute force, and roles that forbid a cut are
needed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch

import tspc.rules  # noqa: F401  fills the registries
from tests.support.op_samples import contraction_samples, pointwise_samples, reduction_samples
from tests.support.rules_table import DOC, table
from tests.support.samples import MORE, Sample, ids, more_forbidden, of, x
from tspc.backend.brute import check, check_cut, check_meaning, traced
from tspc.factors.registry import COMPUTED, RULES
from tspc.ir.program import SDPA
from tspc.ops.attention import ATTENTION
from tspc.passes.analyse.factorize import EXTRA_POINTWISE, VANISHED, Analysis

aten, pick = torch.ops.aten, torch.ops.tspc.pick.default


def view_samples() -> list[Sample]:
    a, b = x(3, 10, 7), x(3, 10, 7)
    return [
        of(aten.t.default, x(3, 5)),
        of(aten.numpy_T.default, x(3, 5)),
        of(aten.view_as_complex.default, x(3, 5, 2)),
        (lambda p: aten.view_as_real.default(aten.view_as_complex.default(p)), (x(3, 5, 2),)),
        of(aten.view.default, a, [3, 2, 5, 7]),
        of(aten.view.default, a, [30, 7]),
        of(aten.view.default, a, [3, 70]),
        of(aten.view.default, x(3, 10), [6, 5]),
        of(aten.reshape.default, a, [3, 5, -1]),
        of(aten._unsafe_view.default, a, [3, 5, 14]),
        of(aten.flatten.using_ints, a, 1, 2),
        of(aten.flatten.using_ints, a, 0, 1),
        of(aten.unflatten.int, a, 1, [2, 5]),
        of(aten.unsqueeze.default, a, -1),
        of(aten.unsqueeze.default, a, 1),
        of(aten.squeeze.dim, x(3, 1, 7), 1),
        of(aten.squeeze.dim, a, 1),
        of(aten.squeeze.dims, x(1, 5, 1), [0, 2]),
        of(aten.squeeze.default, x(1, 5, 1, 7)),
        of(aten.transpose.int, a, -1, 0),
        of(aten.permute.default, a, [2, 0, -2]),
        of(aten.expand.default, x(3, 1, 7), [2, 3, 5, -1]),
        of(aten.expand.default, a, [2, -1, 10, 7]),
        of(aten.broadcast_to.default, x(5, 1), [3, 5, 7]),
        of(aten.repeat.default, a, [2, 1, 3, 1]),
        of(aten.repeat.default, x(3, 5), [2, 3]),
        of(aten.repeat_interleave.self_int, a, 2, 1),
        of(aten.repeat_interleave.self_int, a, 3, -1),
        of(aten.chunk.default, a, 2, 1),
        of(aten.chunk.default, a, 3, 1),
        of(aten.split.Tensor, a, 5, 1),
        of(aten.split.Tensor, a, 4, 1),
        of(aten.split_with_sizes.default, a, [4, 6], -2),
        of(aten.split.sizes, a, [3, 7], 1),
        of(aten.tensor_split.sections, a, 3, 1),
        of(aten.slice.Tensor, a, 1, 2, 8),
        of(aten.slice.Tensor, a, 1, -4),
        of(aten.slice.Tensor, a, 1, 0, 9223372036854775807, 2),
        of(aten.slice.Tensor, a, 1, 1, 9223372036854775807, 2),
        of(aten.slice.Tensor, a, 1, 1, 8, 3),
        of(aten.slice.Tensor, a, -1, 0, -1),
        of(aten.select.int, a, 1, 3),
        of(aten.unbind.int, a, 1),
        of(aten.slice_scatter.default, a, x(3, 4, 7), 1, 2, 6),
        of(aten.slice_scatter.default, a, x(3, 4, 7), 1, 0, 4),
        of(aten.slice_scatter.default, a, x(3, 4, 7), 1, -4),
        of(aten.slice_scatter.default, a, x(3, 5, 7), 1, 0, 10, 2),
        (lambda p: aten.slice_scatter.default(torch.zeros(3, 10, 7), p, 1, 3, 7), (x(3, 4, 7),)),
        (lambda p, q: aten.cat.default([p, q], 1), (a, x(3, 4, 7))),
        (lambda p, q: aten.cat.default([p, q], -1), (a, b)),
        (lambda p, q: aten.cat.default([p, q], 1), (x(0), a)),
        (lambda p, q: aten.stack.default([p, q], 1), (a, b)),
        (lambda p, q: aten.stack.default([p, q], -1), (a, b)),
        (lambda p: aten.stack.default([p, p], 0), (a,)),
        of(aten.pad.default, a, [1, 2]),
        of(aten.pad.default, a, [0, 0, 2, 1], "constant", 3.0),
        of(aten.pad.default, a, [0, -2]),
        of(aten.pad.default, a, [2, -1, -3, 0]),
        of(aten.pad.default, a, [2, 2], "reflect"),
        of(aten.pad.default, a, [2, -2]),
        of(aten.pad.default, a, [2, 2], "circular"),
        of(aten.constant_pad_nd.default, a, [1, 0, 0, 3], 1.0),
        of(aten.constant_pad_nd.default, a, [-1, -1], 1.0),
        (lambda p, i: aten.index.Tensor(p, [None, i]), (a, ids(10, 4))),
        (lambda p, i, j: aten.index.Tensor(p, [i, j]), (a, ids(3, 11, 1), ids(10, 4))),
        (lambda p, i, j: aten.index.Tensor(p, [i, None, j]), (a, ids(3, 11), ids(7, 11))),
        of(aten.gather.default, a, 1, ids(10, 3, 4, 7)),
        of(aten.gather.default, a, 1, ids(10, 2, 4, 5)),
        of(aten.diff.default, a, 1, 1),
        of(aten.diff.default, a, 2, -1),
        of(aten.roll.default, a, [1], [1]),
        of(aten.roll.default, a, [1], []),
    ]


def composite_samples() -> list[Sample]:
    """A few ops in a row: factors refined by an earlier or later op."""

    def rotate(p: torch.Tensor) -> torch.Tensor:
        first = aten.slice.Tensor(p, 2, 0, 5)
        second = aten.slice.Tensor(p, 2, 5, 10)
        return aten.cat.default([aten.neg.default(second), first], 2)

    def heads(p: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        q, k = aten.chunk.default(aten.linear.default(p, w), 2, 2)
        q, k = (aten.view.default(aten.clone.default(t), [3, 5, 2, 7]) for t in (q, k))
        return aten.mul.Tensor(q, k)

    def repeated(p: torch.Tensor) -> torch.Tensor:
        wide = aten.expand.default(aten.unsqueeze.default(p, 2), [3, 2, 4, 5, 7])
        return aten.reshape.default(wide, [3, 8, 5, 7])

    def interleaved(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return aten.matmul.default(q, aten.repeat_interleave.self_int(p, 4, 1))

    def tiled(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return aten.mul.Tensor(aten.repeat.default(p, [1, 3]), q)

    def padded(p: torch.Tensor) -> torch.Tensor:
        return aten.mul.Tensor(aten.pad.default(p, [0, 0, 1, 0]), 2.0)

    def shifted(p: torch.Tensor) -> torch.Tensor:
        return aten.sub.Tensor(aten.slice.Tensor(p, 1, 1), aten.slice.Tensor(p, 1, 0, -1))

    def scores(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        s = aten.softmax.int(aten.matmul.default(p, aten.transpose.int(q, 1, 2)), -1)
        return aten.matmul.default(s, q)

    def written(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return aten.mul.Tensor(aten.slice_scatter.default(p, q, 2, 3, 7), 2.0)

    return [
        (rotate, (x(3, 5, 10),)),
        (heads, (x(3, 5, 11), x(28, 11))),
        (repeated, (x(3, 2, 5, 7),)),
        (interleaved, (x(3, 2, 5, 7), x(3, 8, 11, 5))),
        (tiled, (x(3, 5), x(3, 15))),
        (padded, (x(3, 5, 7),)),
        (shifted, (x(3, 5, 7),)),
        (scores, (x(3, 5, 7), x(3, 5, 7))),
        (written, (x(3, 5, 7), x(3, 5, 4))),
    ]


def random_samples() -> list[Sample]:
    tspc = torch.ops.tspc
    a, state = x(3, 5, 7), ids(2**32, 2)
    at = [torch.arange(n) for n in a.shape]
    q, k, v, states = qkv = x(3, 4, 5, 6), x(3, 2, 7, 6), x(3, 2, 7, 11), ids(2**62, 3, 4, 5)
    mask = x(4, 5, 7)

    def attend(causal: bool) -> Sample:
        def fn(*given: torch.Tensor) -> Any:
            qkv, (m, s) = given[:3], given[3:]
            m = None if causal else m
            return ATTENTION(*qkv, m, s, dropout=0.5, causal=causal, grouped=True)

        return fn, (q, k, v, mask, states)

    return [
        (lambda p, s, *i: tspc.dropout.default(p, s, i, 0.5), (a, state, *at)),
        (lambda p, s, *i: tspc.uniform.default(p, s, i, dtype=p.dtype), (a, state, *at)),
        (lambda p, s, *i: tspc.normal.default(p, s, i, dtype=p.dtype), (a, state, *at)),
        (lambda p, s, *i: tspc.query_states.default(p, s, i), (a, state, *at[:2])),
        attend(False),
        attend(True),
        (
            partial(under_a_predicate, "(d0[k] == d0[q])"),
            (x(3, 4, 7, 6), *qkv[1:3], ids(2, 3, 1, 7)),
        ),
    ]


def under_a_predicate(text: str, *given: torch.Tensor) -> torch.Tensor:
    *qkv, data = given
    return ATTENTION(*qkv, data=data, predicate=text, grouped=True)


GROUPS = {
    "random": random_samples,
    "pointwise": pointwise_samples,
    "contractions": contraction_samples,
    "reductions": reduction_samples,
    "views": view_samples,
    "composites": composite_samples,
    "attentions": lambda: [sample for sample, _ in attentions()],
    **MORE,
}

# registered, but no cut can be tried
UNTRIED = {aten.empty_like.default: "its values are undefined"}


@pytest.fixture(scope="module")
def reached() -> dict[str, dict[Any, int]]:
    """Cuts tried per op, by group."""
    return {}


@pytest.mark.parametrize("group", GROUPS)
def test_pieces_rejoin(group: str, reached: dict[str, dict[Any, int]]) -> None:
    cuts: dict[Any, int] = reached.setdefault(group, {})
    for fn, tensors in GROUPS[group]():
        a, env = traced(fn, *tensors)
        vanished(a)
        check_meaning(a, env)
        for op, n in check(a, env).items():
            cuts[op] = cuts.get(op, 0) + n


def vanished(a: Analysis) -> None:
    """Every factor of an operand is in an output or has a role."""
    for r in a.records:
        lost = [f for f, roles in r.roles.items() if VANISHED in {why for *_, why in roles}]
        assert not lost, f"{r.node.op} {r.node.args}"


def test_a_factor_that_a_rule_loses_is_needed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        COMPUTED, aten.flip.default, lambda op: [[op.ins[0][0], op.F.dim(5, "lost")]]
    )
    a, _ = traced(lambda p: aten.flip.default(p, [1]), x(3, 5))
    (record,) = (r for r in a.records if r.node.op == aten.flip.default)
    ((f, roles),) = record.roles.items()
    assert f.size == 5 and roles == {("whole", 0, VANISHED)}


def test_every_rule_is_reached(reached: dict[str, dict[Any, int]]) -> None:
    for group in set(GROUPS) - set(reached):
        test_pieces_rejoin(group, reached)
    tried = set().union(*reached.values())
    missed = {*RULES, *COMPUTED, *EXTRA_POINTWISE} - tried - set(UNTRIED)
    assert not missed, f"no cut of these was tried: {sorted(map(str, missed))}"
    assert not tried & set(UNTRIED)


def test_the_table_of_rules_is_up_to_date(
    reached: dict[str, dict[Any, int]], request: pytest.FixtureRequest
) -> None:
    """docs/rules.md; `make rules` writes it."""
    for group in set(GROUPS) - set(reached):
        test_pieces_rejoin(group, reached)
    text = table(reached, UNTRIED, forbidden_ops())
    if request.config.getoption("--update-golden"):
        DOC.write_text(text)
    assert DOC.read_text() == text, "make rules"


def attentions() -> list[tuple[Sample, set[tuple[str, int, int]]]]:
    """Attention with every kind of mask; (role, operand, size) of all its roles."""
    attend = aten.scaled_dot_product_attention.default
    q, k, v, states = x(3, 6, 5, 4), x(3, 2, 7, 4), x(3, 2, 7, 11), ids(2**62, 3, 6, 5)
    plain = {("whole", 0, 4), ("whole", 1, 4), ("exchange", 1, 7), ("exchange", 2, 7)}
    masked, causal = plain | {("exchange", 3, 7)}, plain | {("at", 0, 5)}
    dropped_causal = causal | {("at", 4, 5)}
    all_heads, few = (q, x(3, 6, 7, 4), x(3, 6, 7, 11)), {"enable_gqa": True}

    def dropping(mask: torch.Tensor | None) -> Sample:
        def fn(*given: torch.Tensor) -> Any:
            m = given[4] if mask is not None else None
            told = {"dropout": 0.5, "causal": mask is None, "grouped": True}
            return ATTENTION(*given[:3], m, given[3], **told)

        return fn, [q, k, v, states, *([mask] if mask is not None else [])]

    return [
        (of(attend, *all_heads), plain),
        (of(attend, *all_heads, None, 0.0, True), causal),
        (of(attend, q, k, v, None, 0.0, True, **few), causal),
        (of(attend, *all_heads, x(3, 6, 5, 7)), masked),
        (of(attend, *all_heads, x(5, 7)), masked),
        (of(attend, q, k, v, **few), plain),
        (of(attend, q, k, v, x(3, 6, 5, 7), **few), masked),
        (of(attend, *(t[0] for t in all_heads)), plain),
        (of(attend, *(t[0] for t in all_heads), x(6, 5, 7)), masked),
        (of(attend, *(t[0, 0] for t in all_heads)), plain),
        (dropping(None), dropped_causal),
        (dropping(x(6, 5, 7)), masked),
        (dropping(x(3, 6, 5, 7)), masked),
    ]


def roles_of(sample: Sample, ops: Sequence[Any]) -> set[tuple[str, int, int]]:
    """(role, operand, size) in the records of these ops."""
    return {
        (role, operand, f.size)
        for r in traced(sample[0], *sample[1])[0].records
        if r.node.op in ops
        for f, roles in r.roles.items()
        for role, operand, _ in roles
    }


@pytest.mark.parametrize("sample,roles", attentions())
def test_what_attention_needs(sample: Sample, roles: set[tuple[str, int, int]]) -> None:
    assert roles_of(sample, [SDPA, ATTENTION]) == roles


def forbidden() -> list[tuple[str, Sample]]:
    """(role, sample): cutting the factors that have the role changes the values."""
    q, k = x(3, 4, 7, 6), x(3, 4, 7, 6)
    attend = aten.scaled_dot_product_attention.default
    a = x(3, 5, 7)
    return [
        ("whole", of(aten.softmax.int, a, -1)),
        ("scan", of(aten.cumsum.default, a, 1)),
        ("halo", of(aten.flip.default, a, [1])),
        ("halo", of(aten.roll.default, a, [1], [1])),
        ("whole", of(aten.amax.default, a, [1])),
        ("whole", of(aten.var.dim, a, [1])),
        ("whole", of(aten.rms_norm.default, a, [7], x(7))),
        ("whole", of(aten.layer_norm.default, a, [7], x(7), x(7))),
        ("whole", of(aten.repeat.default, a, [1, 3, 1])),
        ("whole", of(aten.conv2d.default, x(2, 3, 9, 11), x(5, 3, 4, 2), x(5))),
        ("whole", of(aten.constant_pad_nd.default, a, [2, 3], 1.0)),
        ("exchange", of(attend, q, k, k)),
        ("at", of(attend, q, k, k, None, 0.0, True)),
        ("at", (partial(under_a_predicate, "(k + 2 >= q)"), (q, k, k, ids(2, 3, 1, 7)))),
        ("select", of(aten.select.int, a, 1, 3)),
        ("select", of(aten.embedding.default, x(13, 7), ids(13, 3, 5))),
        ("trim", of(aten.slice.Tensor, a, 1, 1)),
        ("twice", (lambda p: aten.mm.default(p, p), [x(5, 5)])),
        *more_forbidden(),
    ]


def forbidden_ops() -> dict[Any, set[str]]:
    """Op -> the roles that a sample shows to be needed."""
    found: dict[Any, set[str]] = {}
    for role, (fn, tensors) in forbidden():
        for r in traced(fn, *tensors)[0].records:
            if any(role == x[0] for roles in r.roles.values() for x in roles):
                found.setdefault(r.node.op, set()).add(role)
    return found


@pytest.mark.parametrize("role,sample", forbidden())
def test_a_role_is_needed(role: str, sample: Sample) -> None:
    a, env = traced(sample[0], *sample[1])
    cuts = [(r, f) for r in a.records for f, rs in r.roles.items() if role in {x[0] for x in rs}]
    assert cuts
    for r, f in cuts:
        for how in ("keep", "reduce"):
            with pytest.raises((AssertionError, RuntimeError, IndexError)):
                check_cut(a, r, env, f, how)
