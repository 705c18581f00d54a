"""Rules by op: declared once, and refused where they do not fit the op."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tspc.base.errors import RuleError
from tspc.factors import registry
from tspc.factors.notation import Rule, pointwise

aten = torch.ops.aten


@torch.library.custom_op("registry::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RULES", "COMPUTED", "ONCE"):
        monkeypatch.setattr(registry, name, {})
    yield


def test_a_rule_of_an_overload_a_packet_or_a_custom_op() -> None:
    registry.rule(aten.mm.default, "m k, k n -> m n", reduce="k")
    registry.rule(aten.linear.default, "... i, o i, o -> ... o", once=2, reduce="i")
    registry.rule(twice, "... -> ...")
    op = torch.ops.registry.twice.default
    assert set(registry.RULES) == {aten.mm.default, aten.linear.default, op}
    assert registry.RULES[aten.mm.default] == Rule.parse("m k, k n -> m n", reduce="k")
    assert {aten.linear.default: 2} == registry.ONCE


def test_what_is_an_op() -> None:
    assert registry.overload_of(torch.ops.registry.twice) is torch.ops.registry.twice.default
    assert registry.overload_of(twice) is torch.ops.registry.twice.default
    with pytest.raises(RuleError, match="has the overloads .*: give one of them"):
        registry.overload_of(aten.add)
    with pytest.raises(RuleError, match="takes an op of torch.ops .* not 3"):
        registry.overload_of(3)


@pytest.mark.parametrize(
    "text,wrong", [("a, b, c -> a", "3 operands"), ("m k, k n -> m n, m", "2 results")]
)
def test_a_rule_that_does_not_fit_the_schema(text: str, wrong: str) -> None:
    with pytest.raises(RuleError, match=f"has {wrong}, aten::mm"):
        registry.rule(aten.mm.default, text, reduce="k" if "k" in text else "b c")
    assert not registry.RULES


def test_a_second_rule_of_either_kind() -> None:
    fn = registry.computed(aten.relu.default, aten.add.Tensor, once=1)(pointwise)
    assert fn is pointwise and {aten.relu.default: 1, aten.add.Tensor: 1} == registry.ONCE
    assert {aten.relu.default: pointwise, aten.add.Tensor: pointwise} == registry.COMPUTED
    with pytest.raises(RuleError, match="two rules for aten.relu.default"):
        registry.rule(aten.relu.default, "... -> ...")
    with pytest.raises(RuleError, match="two rules for aten.relu.default"):
        registry.computed(aten.relu.default)(pointwise)
