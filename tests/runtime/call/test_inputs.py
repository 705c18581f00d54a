"""Ranks of one axis run the same graph on the same data: what each tells, and what is said of one
that differs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from tests.support.group import alone
from tests.support.programs import program_of
from tests.support.samples import x
from tspc.base.errors import RankMismatchError
from tspc.base.options import parse
from tspc.runtime.call import inputs
from tspc.runtime.call.inputs import Checker, Section, agree, facts, signature
from tspc.runtime.comm.place import Place
from tspc.runtime.comm.requests import Axis
from tspc.runtime.mesh import resolve

PROGRAM = program_of(lambda t, w: t @ w * 0.5, x(2, 3), params={"w": x(3, 4)})
FACTS = {"grad mode": "enabled"}


@pytest.fixture
def place() -> Iterator[Place]:
    with alone():
        yield resolve(parse(None), torch.device("cpu"))[0]


def checker(place: Place, mode: str | bool = "auto") -> Checker:
    return Checker(place, mode, ["a", "b"], frozenset(["b"]), FACTS, "the text", ["w"])


def test_one_rank_agrees_with_itself(place: Place) -> None:
    check, w = checker(place), nn.Parameter(torch.ones(2))
    for _ in range(2):
        check([torch.ones(2), torch.zeros(3)], [w], [4])
    assert check.calls == 2 and len(check.hashes) == 1
    agree(place, FACTS, "compiles")
    inputs.replicas_agree(place, FACTS, "compiles")
    silent = checker(place, False)
    silent([torch.ones(2)])
    assert silent.calls == 0


def test_buffers_are_read_again_when_they_change(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = inputs.digest
    monkeypatch.setattr(inputs, "digest", lambda t: read.append(t.numel()) or plain(t))
    check, a, b = checker(place), torch.ones(2), torch.zeros(3)
    for _ in range(2):
        check([a, b])
    assert read == [2, 3, 2]
    b.add_(1)
    check([a, b])
    assert read == [2, 3, 2, 2, 3]


class Differs:
    """A rank that hears of another one."""

    def __init__(self, place: Place, other: Any) -> None:
        self.axis, self.group, self.other = place.axis, place.groups["checks"], other

    def __call__(self, word: int) -> bool:
        return False


def told(place: Place, here: Any, there: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """here, there: (words, sections) of rank 0 and of rank 1."""

    def gathered(out: list[Any], said: Any, group: object) -> None:
        out[:] = [here, there]

    monkeypatch.setattr(dist, "all_gather_object", gathered)
    with pytest.raises(RankMismatchError) as caught:
        inputs._compare(Differs(place, there), 0, lambda: here[0], lambda: here[1])  # type: ignore[arg-type]
    return str(caught.value)


def test_the_first_section_that_differs_is_told(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(shape: str, steps: str) -> list[Section]:
        return [
            Section("was called with", {"a": shape}, "same batch"),
            Section("has made", {"optimizer steps": steps, "calls": "3"}, "same steps"),
        ]

    text = told(place, ([1, 2], said("f[2]", "4")), ([1, 3], said("f[2]", "5")), monkeypatch)
    assert "ranks [1] of axis" in text and "Do this: same steps" in text
    assert "rank 0 has made optimizer steps: 4; rank 1 has made optimizer steps: 5" in text
    text = told(place, ([1], said("f[2]", "4")), ([9], said("f[3]", "4")), monkeypatch)
    assert "rank 0 was called with a: f[2]; rank 1 was called with a: f[3]" in text


def test_frozen_parameters_that_are_not_frozen_everywhere(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(names: str) -> list[Section]:
        return [Section("runs", {inputs.FROZEN: names}, "advice")]

    text = told(place, ([1], said("u, v")), ([2], said("v, w")), monkeypatch)
    assert "rank 0 runs frozen parameters: u; rank 1 runs frozen parameters: w" in text


def test_what_a_call_tells_in_words(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    monkeypatch.setattr(
        inputs, "_compare", lambda a, w, words, sections: heard.append((words(), sections()))
    )
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    checker(place)([torch.ones(2, 3), "text"], [w], [7], "a shares memory with b")
    words, sections = heard[0]
    assert len(words) == len(sections) == 6
    facts_of = [s.facts for s in sections]
    assert facts_of[0] == {**FACTS, "a": "float32[2, 3]"}
    assert facts_of[1] == {"the graph": "the text", "number 0": "7"}
    assert set(facts_of[2]) == {"a"}
    assert facts_of[3]["optimizer steps"] == "0" and facts_of[3]["changes in place of w"] == "0"
    assert facts_of[4] == {"as gradient of w": "one"}
    assert facts_of[5] == {"memory of its inputs": "a shares memory with b"}


def test_a_comparison_on_its_way_from_an_accelerator(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "_is_late", lambda t: True)
    check = checker(place)
    check([torch.ones(2), torch.ones(1)])
    assert len(inputs._LATE) == 1 and inputs._LATE[0].same.tolist() == [True, True]
    inputs.arrived()
    assert not inputs._LATE
    wrong = inputs._Late("tsp", ["a", "b"], torch.tensor([True, False]), None)
    inputs._LATE.append(wrong)
    p = nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    with pytest.raises(RankMismatchError, match="were given other values in b"):
        torch.optim.SGD([p], 0.1).step()


def test_a_graph_by_its_inputs_and_ops() -> None:
    told_of = signature(PROGRAM)
    assert told_of["x0"] == "float64[2, 3]" and told_of["w"] == "float64[3, 4]"
    assert told_of["op 0"] == "aten.matmul.default" and "0.5" in told_of["op 1"]
    assert facts(PROGRAM) == {"grad mode": "enabled", inputs.FROZEN: "none"}
    words = inputs.graph_in_words(PROGRAM)
    assert f"of {len(PROGRAM.nodes)} nodes with gradients" in words
    other = program_of(lambda t, w: t @ w * 0.25, x(2, 3), params={"w": x(3, 4)})
    assert inputs.graph_in_words(other) != words
    with torch.no_grad():
        assert inputs.graph_in_words(PROGRAM).endswith("without gradients")
    assert inputs.text(torch.int64, (2, 8)) == "int64[2, 8]"


def test_who_agrees_on_what(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of the axis by its group of checks, replicas by theirs, on one word of all facts."""
    seen: list[Any] = []
    monkeypatch.setattr(inputs, "_compare", lambda *args: seen.append(args))
    agree(place, {"a": "1", "b": "2"}, "compiles")
    agree(place, {"b": "2", "a": "1"}, "compiles")
    agree(place, {"b": "2", "a": "3"}, "compiles")
    first, same, other = seen
    assert first[0].axis is place.axis and first[0].group is place.groups["checks"]
    assert first[1] == same[1] != other[1] and first[2]() == [first[1]]
    assert first[3]() == [Section("compiles", {"a": "1", "b": "2"}, inputs.ADVICE)]
    inputs.replicas_agree(place, FACTS, "compiles")
    assert len(seen) == 3  # there are none
    group = place.groups["checks"]
    both = replace(place, replicas=Axis("r", 2, 0), groups={"replica checks": group})
    inputs.replicas_agree(both, FACTS, "compiles")
    assert seen[3][0].axis.name == "r" and seen[3][3]()[0].advice == inputs.SAME_GRAPHS


def test_numbers_and_what_comes_late() -> None:
    assert inputs._hash_of([1, 2]) == inputs._hash_of(iter([1, 2])) != inputs._hash_of([2, 1])
    assert inputs._is_late(torch.ones(1, device="meta")) and not inputs._is_late(torch.ones(1))
