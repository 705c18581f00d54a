"""What docs/adding.md says holds: its code runs, and does what the page says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tspc
from tspc.base.errors import RuleError
from tspc.factors.registry import RULES

PAGE = (Path(__file__).parents[2] / "docs" / "adding.md").read_text()


def sections() -> dict[str, list[str]]:
    """Title -> its blocks of code."""
    parts = re.split(r"^## (.*)\n", PAGE, flags=re.M)[1:]
    blocks = (re.findall(r"```python\n(.*?)```", text, re.S) for text in parts[1::2])
    return dict(zip(parts[::2], blocks))


def run(*titles: str) -> dict[str, Any]:
    """What the code of these sections leaves behind, one after the other."""
    space: dict[str, Any] = {}
    for title in titles:
        for code in sections()[title]:
            exec(compile(code, f"docs/adding.md, {title}", "exec"), space)
    return space


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Any]]:
    before = dict(RULES)
    yield run(*sections())
    RULES.clear()  # other tests ask for a sample of every rule
    RULES.update(before)


def test_an_op_of_ones_own_folds(page: dict[str, Any]) -> None:
    plan = tspc.plan(page["model"], (page["x"],), ranks=2)
    (fold,) = plan.rewritten.folds
    assert any("squash" in str(n.op) for n in fold.kwargs["fold"].body)
    assert not plan.rewritten.typed.fallbacks
    assert tspc.verify(page["model"], (page["x"],), ranks=3, tolerance=1e-9).worst < 1e-9


def test_without_a_rule_it_is_gathered_and_told(page: dict[str, Any]) -> None:
    op = torch.ops.adding.squash.default
    kept = RULES.pop(op)
    try:
        plan = tspc.plan(page["model"], (page["x"],), ranks=2)
        assert not plan.rewritten.folds
        assert "squash" in str(plan)
        assert tspc.verify(page["model"], (page["x"],), ranks=2, tolerance=1e-9).worst < 1e-9
    finally:
        RULES[op] = kept


def test_a_rule_that_claims_too_much_fails_by_brute_force(page: dict[str, Any]) -> None:
    """A normalisation is not element by element."""

    @torch.library.custom_op("adding::centre", mutates_args=())
    def centre(x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True)

    centre.register_fake(torch.empty_like)
    assert page["cuts"] > 0
    tspc.rule(centre, "... d -> ... d")
    try:
        with pytest.raises(RuleError, match="rule of adding.centre.* cut along"):
            tspc.check_rule(centre, [(torch.randn(3, 5),)])
    finally:
        del RULES[torch.ops.adding.centre.default]


def test_a_second_rule_is_an_error(page: dict[str, Any]) -> None:
    with pytest.raises(RuleError, match="two rules"):
        tspc.rule(page["squash"], "... d, d -> ... d")


def test_a_pass(page: dict[str, Any]) -> None:
    ops = [str(n.op) for n in page["programs"][0].nodes]
    assert ops.count("aten.mul.Tensor") == 2
    after = page["after"]
    assert [str(n.op) for n in after.nodes].count("aten.mul.Tensor") == 1
    exp = next(n for n in after.nodes if "exp" in str(n.op))
    assert after.node(exp.args[0].name).op == "input"


def test_a_schedule(page: dict[str, Any]) -> None:
    assert page["error"] < 1e-9


def test_a_kernel(page: dict[str, Any]) -> None:
    assert page["blocks"]


def test_the_repository_has_what_the_page_names() -> None:
    """Names of functions and constants in the steps "In the repository"."""
    root = Path(__file__).parents[2]
    for file, names in {
        "passes/pipeline.py": ["PIPELINE = ", "PREPARE = "],
        "tspc/base/options.py": ["SCHEDULES = "],
        "passes/lower/choose.py": ["SCHEDULES = "],
        "runtime/fold/travel.py": ["class Weights", "class Gradients"],
        "runtime/attention/table.py": ["KERNELS = "],
        "tspc/factors/registry.py": ["def computed("],
    }.items():
        text = (root / file).read_text()
        assert not [n for n in names if n not in text], file
