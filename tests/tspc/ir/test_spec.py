"""Attention as data: its operands in order, the fields that are not as they are by themselves."""

from __future__ import annotations

from dataclasses import fields

from tspc.ir.spec import CAUSAL, FIELDS, OPERANDS, AttentionSpec, Operands


def test_operands_in_order_up_to_the_last() -> None:
    x = Operands("q", "k", "v", None, "s")
    assert x.all == ("q", "k", "v", None, "s", None, None)
    assert x.args == ("q", "k", "v", None, "s") and Operands(1, 2, 3).args == (1, 2, 3)


def test_a_function_of_those_that_there_are() -> None:
    x = Operands("q", "k", "v", sinks="s").map(str.upper)
    assert x == Operands("Q", "K", "V", sinks="S")


def test_only_fields_that_differ_are_arguments() -> None:
    a = AttentionSpec(causal=True, dropout=0.5)
    assert a.kwargs == {"causal": True, "dropout": 0.5} and AttentionSpec().kwargs == {}
    assert AttentionSpec(*a.all) == a and len(a.all) == len(fields(a))


def test_predicates_that_hold_together() -> None:
    assert AttentionSpec().texts == ()
    assert AttentionSpec(causal=True, predicate="(k > 2)").texts == (CAUSAL, "(k > 2)")
    assert AttentionSpec(predicate="(k > 2)").texts == ("(k > 2)",)


def test_the_factor_of_scores() -> None:
    assert AttentionSpec().factor(16) == 0.25 and AttentionSpec(scale=3.0).factor(16) == 3.0


def test_ops_have_the_fields_in_their_order() -> None:
    names = [part.split()[-1] for part in FIELDS.split(", ")]
    assert names == [f.name for f in fields(AttentionSpec)]
    of_ops = [part.split()[-1] for part in OPERANDS.split(", ")]
    assert of_ops == [f.name for f in fields(Operands)][: len(of_ops)]
