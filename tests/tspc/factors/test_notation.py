"""The rule notation: parsed once, written back the same, errors that show the place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tspc.base.errors import RuleError
from tspc.factors.factor import Dims, Factors
from tspc.factors.notation import Op, Rule, apply, fallback, pointwise, replace
from tspc.factors.registry import RULES, rule
from tspc.ir.program import SDPA, Node, Ref, Type


@pytest.mark.parametrize("op", list(RULES), ids=str)
def test_every_rule_round_trips(op: object) -> None:
    r = RULES[op]
    text, _, roles = str(r).partition(", ") if "," not in str(r) else (str(r), "", "")
    again = Rule.parse(
        text.split(", reduce")[0].split(", select")[0].split(", whole")[0], r.once, **dict_of(r)
    )
    assert again == r
    del roles


def dict_of(r: Rule) -> dict[str, str]:
    out: dict[str, str] = {}
    for letter, role in r.roles:
        out[role] = f"{out.get(role, '')} {letter}".strip()
    return out


def test_a_letter_that_vanishes_must_say_how() -> None:
    with pytest.raises(RuleError, match=r"\^ k vanish"):
        Rule.parse("m k, k n -> m n")


def test_an_unknown_role_is_named() -> None:
    with pytest.raises(RuleError, match="unknown role"):
        Rule.parse("m k -> m", gone="k")


def test_two_rules_for_an_op() -> None:
    with pytest.raises(RuleError, match="two rules"):
        rule(torch.ops.aten.linear.default, "... i, o i, o -> ... o", reduce="i", once=2)


@pytest.mark.parametrize(
    "text,roles,told",
    [
        ("m k -> m k", {"reduce": "k"}, "k stays: it cannot be reduce"),
        ("v d, i -> v d i", {"select": "v"}, "v stays: it cannot be select"),
        ("m k -> m", {"at": "k"}, "k vanishes: it cannot be at"),
        ("m -> m c", {"reduce": "c"}, "it cannot be reduce"),
        ("m -> m c", {"at": "c"}, "c is new: it can only be whole"),
    ],
)
def test_a_role_that_a_letter_cannot_have(text: str, roles: dict[str, str], told: str) -> None:
    with pytest.raises(RuleError, match=told):
        Rule.parse(text, **roles)


A, B = (Type((3, 5, 7), torch.float64), Type((7, 5), torch.float64))


def op_of(op: Any, refs: list[Ref | None], ins: list[Dims], F: Factors, *types: Type) -> Op:
    return Op(Node("y", op, types=types), {}, refs, ins, F)


def dims(F: Factors, *shape: int) -> Dims:
    return [F.dim(n) for n in shape]


def events(op: Op) -> set[tuple[str, int | None, int]]:
    return {(e.role, e.operand, f.size) for e in op.events for f in e.dim}


def test_letters_unify_over_operands_and_tell_their_roles() -> None:
    F = Factors()
    left, right = dims(F, 3, 5, 7), dims(F, 2, 7)
    op = op_of(torch.ops.aten.linear.default, [Ref("x"), Ref("w")], [left, right], F, A)
    op.node = Node("y", op.node.op, types=(Type((3, 5, 2), torch.float64),))
    (out,) = apply(Rule.parse("... i, o i -> ... o", reduce="i"), op)
    assert out == [left[0], left[1], right[0]]
    assert F.expand(left[2]) == F.expand(right[1])
    assert events(op) == {("reduce", 0, 7), ("reduce", 1, 7)}


def test_one_dim_of_two_letters_takes_the_sizes_of_the_others() -> None:
    F = Factors()
    heads, few = dims(F, 6, 5), dims(F, 2, 5)
    op = op_of(SDPA, [Ref("q"), Ref("k")], [heads, few], F, Type((6, 5), torch.float64))
    (out,) = apply(Rule.parse("(k g) d, k d -> (k g) d"), op)
    assert [f.size for f in F.expand(heads[0])] == [2, 3]
    assert F.expand(heads[0])[:1] == F.expand(few[0])
    assert F.expand(out[0]) == F.expand(heads[0])
    odd = op_of(SDPA, [Ref("q"), Ref("k")], [dims(F, 7, 5), dims(F, 2, 5)], F, A)
    apply(Rule.parse("(k g) d, k d -> (k g) d"), odd)
    assert ("whole", 0, 7) in events(odd)


def test_a_class_met_twice_in_an_output_is_exchanged() -> None:
    F = Factors()
    x = dims(F, 5, 3)
    op = op_of(SDPA, [Ref("x"), Ref("x")], [x, list(x)], F, Type((5, 5), torch.float64))
    (out,) = apply(Rule.parse("a d, b d -> a b", whole="d"), op)
    first, second = out
    assert first == x[0] and F.find(second[0]).image_of is F.find(first[0])
    assert {("exchange", 1, 5), ("whole", 0, 3)} <= events(op)


def test_new_letters_and_ones() -> None:
    F = Factors()
    op = op_of(SDPA, [Ref("x")], [dims(F, 3)], F, Type((3, 4, 1), torch.float64))
    (out,) = apply(Rule.parse("a -> a c 1", whole="c"), op)
    assert [F.size(d) for d in out] == [3, 4, 1] and events(op) == {("whole", None, 4)}


def test_a_weak_operand_follows_and_refines_nothing() -> None:
    F = Factors()
    strong, weak = dims(F, 12), dims(F, 12)
    op = op_of(SDPA, [Ref("m"), Ref("x")], [weak, strong], F, Type((12,), torch.float64))
    op.weak = [True, False]
    (out,) = apply(Rule.parse("a, a -> a"), op)
    assert out == strong and op.ins[0] == strong
    assert op.join(weak[0], strong[0], 0, 1) == strong[0]
    assert op.join(strong[0], weak[0], 1, 0) == strong[0]
    assert op.join((), weak[0]) == weak[0] and op.join(weak[0], ()) == weak[0]


def test_dims_that_do_not_match_are_whole() -> None:
    F = Factors()
    op = op_of(SDPA, [Ref("x"), Ref("y")], [], F)
    a, b = F.dim(3), F.dim(5)
    assert op.join(a, b, 0, 1) == a and events(op) == {("whole", 0, 3), ("whole", 1, 5)}


def test_images_have_their_originals_gathered() -> None:
    F = Factors()
    f = F.new(6)
    twin = F.image(f)
    op = op_of(SDPA, [Ref("x"), Ref("y")], [], F)
    assert op.join((f,), (twin,), 0, 1) == (twin,) and events(op) == {("exchange", 0, 6)}
    assert replace(F, (f,), {f}) == (twin,)
    dim = F.concat([(f,), F.dim(2)])
    assert [g.size for g in F.leaves(replace(F, dim, {f}))] == [6, 2]
    assert next(F.leaves(replace(F, dim, {f}))) is twin


def test_broadcast_from_the_right() -> None:
    F = Factors()
    x, row = dims(F, 3, 5, 7), dims(F, 1, 7)
    op = op_of(torch.ops.aten.add.Tensor, [Ref("x"), Ref("r")], [x, row], F, A)
    assert pointwise(op) == [x] and F.expand(row[1]) == F.expand(x[2]) and not op.events


def test_an_op_that_runs_as_a_whole() -> None:
    F = Factors()
    op = op_of(torch.ops.aten.topk.default, [Ref("x")], [dims(F, 3, 5)], F, A, B)
    outs = fallback(op, "why")
    assert [[F.size(d) for d in out] for out in outs] == [[3, 5, 7], [7, 5]]
    assert events(op) == {("whole", 0, 3), ("whole", 0, 5)} | {
        ("whole", None, n) for n in (3, 5, 7)
    }
    assert {e.why for e in op.events} == {"why"} and op.shape(1) == (7, 5)


def test_a_role_along_a_sequence_needs_a_form_for_pieces() -> None:
    F = Factors()
    op = op_of(torch.ops.aten.relu.default, [Ref("x")], [dims(F, 3)], F, A)
    with pytest.raises(RuleError, match="aten.relu.default has no form for pieces: .* halo"):
        op.event("halo", F.dim(3), 0)
    op.event("whole", ())
    assert op.new(1, "none") == () and not op.events
    (classes,) = op.new(4, "classes")
    assert (classes.size, events(op)) == (4, {("whole", None, 4)})


def test_a_rule_as_text() -> None:
    r = Rule.parse("... (a b) 1, b -> ... a b", (1,), whole="a")
    assert str(r) == "... (a b) 1, b -> ... a b, whole=a" and r.once == (1,)
    assert Rule.letters(r.ins) == {"a", "b"}
    with pytest.raises(RuleError, match="operands -> results, with one arrow"):
        Rule.parse("a b")
