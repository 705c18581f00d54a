"""The rule notation: parsed once, written back the same, errors that show the place."""

from __future__ import annotations

import pytest
import torch

from tspc.base.errors import RuleError
from tspc.factors.notation import Rule
from tspc.factors.registry import RULES, rule


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
