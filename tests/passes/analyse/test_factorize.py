"""The rules applied once, in order: dims of values, roles of factors, what has no rule or is
refused."""

from __future__ import annotations

import torch

from tests.support.programs import analysis_of, program_of
from tests.support.samples import ids, x
from tspc.factors.factor import Factors
from tspc.ir.program import OUTPUT
from tspc.passes.analyse.factorize import (
    REFUSED,
    Analysis,
    factorize,
    homogeneous,
    in_segment,
)

aten = torch.ops.aten
Tensor = torch.Tensor
A = x(2, 5, 4)


def roles(a: Analysis, name: str) -> set[tuple[str, int | None, str, int]]:
    (r,) = (r for r in a.records if r.node.op != OUTPUT and name in str(r.node.op))
    return {(role, i, why, f.size) for f, rs in r.roles.items() for role, i, why in rs}


def test_factors_go_from_operands_to_results() -> None:
    def fn(t: Tensor, w: Tensor) -> Tensor:
        return aten.linear.default(t, w).relu()

    a = analysis_of(fn, A, params={"w": x(6, 4)})
    made, relu, out = a.records
    assert made.outs[0][:2] == a.env["x0", 0][:2] and relu.outs[0] == made.outs[0]
    assert out.node.op == OUTPUT and a.makers[relu.node.name] is relu
    assert roles(a, "linear") == {("reduce", 0, "", 4), ("reduce", 1, "", 4)}
    assert [[f.size for f in c] for c in relu.carried_in] == [[2, 5, 6]] or relu.carried_in


def test_ops_without_a_rule_are_fallbacks() -> None:
    a = analysis_of(lambda t: t.renorm(2, 1, 1.0), A)
    ((name, op),) = a.fallbacks
    assert op == "aten.renorm.default" and name in a.makers
    assert {role for role, *_ in roles(a, "renorm")} == {"whole"}


def test_refused_ops_are_cut_like_their_operand_after() -> None:
    program = program_of(lambda t: t.sin().cos(), A)
    first = next(n.name for n in program.nodes if n.is_call)
    a = factorize(program, refused={first})
    assert {why for *_, why, _ in roles(a, "sin")} == {REFUSED}
    assert a.makers[first].outs[0] == a.env["x0", 0] and not roles(a, "cos")


def test_sealed_dims_are_factors_of_their_own() -> None:
    program = program_of(lambda t: t.sin(), A)
    name = next(n.name for n in program.nodes if n.is_call)
    a = factorize(program, {name: ((0, 1),)})
    (record, _) = a.records
    assert record.outs[0][1] != record.ins[0][1] and a.F.size(record.outs[0][1]) == 5
    assert ("whole", None, "sealed", 5) in roles(a, "sin")


def test_replicated_values_follow() -> None:
    def fn(t: Tensor, i: Tensor) -> Tensor:
        return t + aten.unsqueeze.default(i.double(), 2)

    a = analysis_of(fn, A, ids(5, 2, 5))
    assert [r.node.op for r in a.records[:-1]] == [aten.add.Tensor]
    (added,) = a.records[:-1]
    assert added.ins[1][:2] == list(added.ins[0][:2])


def test_a_product_whose_softmax_follows_exchanges_its_dim() -> None:
    def fn(t: Tensor) -> Tensor:
        return aten.softmax.int(aten.matmul.default(t, aten.transpose.int(t, 1, 2)) * 2, -1)

    a = analysis_of(fn, A)
    (r,) = (r for r in a.records if r.node.op == aten.matmul.default)
    last = next(iter(a.F.leaves(r.outs[0][2])))
    assert last.image_of is not None
    assert ("exchange", 1, "", 5) in roles(a, "matmul")


def test_a_factor_in_two_dims_is_met_twice() -> None:
    square = x(5, 5)
    a = analysis_of(lambda p: aten.mm.default(p, p), square)
    assert any(role == "twice" for role, *_ in roles(a, "mm"))


def test_parts_of_sums() -> None:
    F = Factors()
    h, d = F.new(3), F.new(4)
    dim = F.concat([(h, d), (d,)])
    assert homogeneous(F, dim, d) and not homogeneous(F, dim, h) and homogeneous(F, (h,), h)
    assert in_segment(F, [dim], h) and not in_segment(F, [(h,)], h)
    assert not in_segment(F, None, h)
    a = analysis_of(lambda p, q: torch.cat([p, q], 1).sum(1), x(2, 3), x(2, 4))
    assert ("twice", None, "in part of a summed dim", 3) in roles(a, "sum")
