"""What of a program costs a rank more than its share, and what to change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.programs import Tensor, mlp, program_of, unit_of
from tspc.base.options import parse
from tspc.explain import report
from tspc.explain.report import Report, reports, warning, warnings
from tspc.ir.program import Type
from tspc.passes.analyse.refused import Refused

X = torch.zeros(2, 7, 6)
WEIGHTS = {"m.up": torch.zeros(6, 5), "m.down": torch.zeros(5, 6)}


def told(fn: Callable[..., Any], *tensors: Tensor, **fields: Any) -> list[Report]:
    params = fields.pop("params", WEIGHTS)
    return reports(unit_of(program_of(fn, *(tensors or (X,)), params=params), "localize", **fields))


def test_nothing_to_say() -> None:
    assert told(mlp) == []


def test_ops_that_run_replicated() -> None:
    def fn(x: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
        y = torch.tanh(x @ up) @ down
        return [y.sort(1).values.tanh().mean(), y.flatten(1).cumprod(1).mean()]

    got = told(fn)
    texts = [r.what for r in got]
    assert any("sort" in t and "runs replicated" in t for t in texts), texts
    assert all(r.replicated and not r.internal and r.bytes > 0 and r.change for r in got)
    assert not any("tanh" in t for t in texts)


def test_weights_that_are_not_folded() -> None:
    def tied(x: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
        return [torch.tanh(x @ up) @ down * down.sum()]

    got = told(tied)
    (one,) = [r for r in got if "gathered at use" in r.what]
    assert one.what.startswith("m.down, m.up gathered at use, not folded (m.down is also used by")
    assert one.bytes == 4 * 60 and not one.replicated
    refused = Refused(regions={frozenset({"m.down"}): "x", frozenset(WEIGHTS): "it fails"})
    inner = [r for r in told(mlp, refused=refused) if r.internal]
    assert inner and all("an error inside of tspc" in r.what and r.replicated for r in inner)


def test_a_graph_without_a_sequence() -> None:
    (one,) = told(lambda a, up, down: [a @ up @ down + up[0, 0]], torch.zeros(3, 6)) or [None]
    if one is not None:
        assert "no dim of this graph is a sequence" in one.what or "gathered" in one.what


def test_everything_is_refused() -> None:
    refused = Refused(everything="boom", source="model.py:3")
    (one,) = told(mlp, refused=refused)
    assert one.where == "model.py:3" and one.internal and one.bytes > 4 * 60
    assert "an error inside of tspc (boom): the whole graph runs replicated" in one.what


def test_an_op_that_is_refused() -> None:
    def fn(x: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
        return [(torch.tanh(x @ up) @ down).exp().mean()]

    got = told(fn, refused=Refused({"exp": "boom"}))
    assert [r.what for r in got if r.internal] == [
        "aten.exp.default runs replicated: an error inside of tspc (boom)"
    ]


def test_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    full = parse({"outputs": "full"})
    assert told(mlp, options=full) == []
    monkeypatch.setattr(report, "LARGE", 1)
    (one,) = told(mlp, options=full)
    assert one.what == "an output [2, 7, 6] is gathered along the sequence"
    assert one.bytes == 4 * 84 and not one.replicated and "sharded" in one.change
    monkeypatch.setattr(report, "LARGE", 1 << 30)
    (one,) = told(mlp, options=full, graph_break="model.py:7")
    assert (one.where, one.bytes) == ("model.py:7", 4 * 84)
    assert one.what == "a graph break, at which 1 activation cut along the sequence are gathered"
    assert told(lambda *a: [mlp(*a)[0].mean()], options=full, graph_break="model.py:7") == []


A = Report("a.py:1", "op runs", 2**20, "change it")


def test_a_line_of_each() -> None:
    assert str(A) == "a.py:1: op runs: 1.0 MiB on each rank; change it"
    again, other = Report("a.py:1", "op runs", 2**20, "change it"), Report("b.py:1", "x", 1, "y")
    assert report._merged([A, other, again]) == [
        Report("a.py:1", "op runs (2 times)", 2**21, "change it"),
        other,
    ]
    assert warning([other, A]) == f"{A} (and 1 more: tspc.explain lists them)"
    assert warning([A]) == str(A)
    inner = Report("c.py:1", "z", 5, "w", internal=True)
    assert warnings([A, inner, other]) == [str(inner), warning([A, other])]
    assert warnings([]) == [] and warnings([inner]) == [str(inner)]


def test_bytes() -> None:
    assert report._bytes(None, {}) == 0 and report._bytes(Type((2, 3), torch.float64), {}) == 48
