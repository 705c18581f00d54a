"""Options by name and value: what is valid is taken, what is not is named with what is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tspc.base.errors import OptionError
from tspc.base.options import MAX_SPEED, MIN, Options, memory_limit, one_of, parse


class Planned:
    """What a plan is to the options."""

    options = Options(schedule="gather", strict=True)


def test_options_are_what_was_chosen_and_defaults() -> None:
    assert parse(None) == Options()
    chosen = {"schedule": {"*.mlp": "ring"}, "layout": "zigzag", "param_dtype": torch.bfloat16}
    assert parse(chosen) == Options(**chosen)


def test_a_plan_brings_its_own() -> None:
    options = parse({"plan": Planned(), "schedule": "ring"})
    assert (options.schedule, options.strict) == ("ring", True)


def test_replicas_that_shard_cut_parameters() -> None:
    assert parse({"replicas": "shard"}).cut and not Options().cut


@pytest.mark.parametrize(
    "chosen,text",
    [
        ({"scedule": "ring"}, "unknown option 'scedule'; did you mean 'schedule'?"),
        ({"xyz": 1}, r"unknown option 'xyz' \(valid: mesh, axis"),
        ({"layout": "zig"}, "layout='zig'; valid: 'auto', 'contiguous', 'zigzag'"),
        ({"schedule": "rings"}, "schedule='rings'; valid: 'auto', 'ring'"),
        ({"schedule": {"head": "rings"}}, "schedule='rings'"),
        ({"schedule": {1: "ring"}}, "names or globs are strings"),
        ({"axis": 3}, "axis is the name of a dim"),
        ({"plan": 3}, "plan is what tspc.plan"),
        ({"memory_budget": "much"}, "memory_budget='much'"),
        ({"reduce_dtype": torch.int64}, "reduce_dtype=torch.int64; valid: None, torch.bfloat16"),
        ({"hardware": "abacus"}, "hardware='abacus'"),
        ({"mesh": 2}, "options: mesh is a DeviceMesh"),
        ([], "options is a dict by name"),
    ],
)
def test_what_is_not_valid(chosen: Any, text: str) -> None:
    with pytest.raises(OptionError, match=text.replace("?", r"\?")):
        parse(chosen)


@pytest.mark.parametrize(
    "budget,limit",
    [
        (MAX_SPEED, 1000),
        (MIN, 0),
        (0.25, 250),
        (1.0, 1000),
        (77, 77),
        (0, 0),
        ("2GiB", 2 * 2**30),
        ("1.5 kb", 1500),
        ("1B", 1),
    ],
)
def test_a_budget_in_bytes(budget: object, limit: float) -> None:
    assert memory_limit(budget, 1000) == limit


@pytest.mark.parametrize("budget", [1, True, -1, 1.5, "2 parsecs", None])
def test_no_budget(budget: object) -> None:
    text = "one byte is '1B', all of it 1.0" if budget is not True and budget == 1 else "valid: "
    with pytest.raises(OptionError, match=text):
        memory_limit(budget, 1000)


def test_values_that_are_no_plain_ones_are_not_compared() -> None:
    assert one_of(0.5, (0.5, 1)) and one_of(None, (None,)) and not one_of("a", ("b",))
    assert not one_of(torch.ones(2), ("a", 1))
