"""The ladder: errors inside of tspc, injected, cost time and memory, not the run, and are told."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import sympy
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import tspc
from examples.llama_like import LlamaLike
from tspc.explain.report import reports, warnings
from tspc.ir.body import chunk_of
from tspc.ir.program import Node
from tspc.ops.run import Run
from tspc.passes import pipeline
from tspc.passes.analyse import factorize
from tspc.passes.ladder import at_hand
from tspc.passes.lower import pieces, propagate

aten = torch.ops.aten
TOKENS = torch.zeros(2, 8, dtype=torch.long)


@pytest.fixture
def ladder(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As users run: rungs are taken."""
    monkeypatch.delenv("TSPC_STRICT_INTERNAL")
    return monkeypatch


class Model(nn.Module):
    """Two regions with an op in the stream between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(32, 8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 32)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = x + self.down(F.gelu(self.up(x)))
        logits = self.head(self.norm(torch.tanh(x)))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


TANH = f"test_ladder.py:{inspect.getsourcelines(Model.forward)[1] + 3}"


def verified(**options: Any) -> Any:
    torch.manual_seed(0)
    tokens, labels = torch.randint(0, 32, (2, 2, 7))
    return tspc.verify(Model().double(), (tokens, labels), {}, 3, options, 1e-9).graphs[0].rewritten


def fail_at(patch: pytest.MonkeyPatch, module: Any, function: str, fails: Callable[..., bool]):
    """The function of a pass raises for these arguments."""
    real = getattr(module, function)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if fails(*args):
            raise KeyError("injected")
        return real(*args, **kwargs)

    patch.setattr(module, function, failing)


def test_an_op_that_a_rule_cannot_treat(ladder: pytest.MonkeyPatch) -> None:
    fail_at(ladder, factorize, "pointwise", lambda op: op.node.op == aten.tanh.default)
    made = verified()
    assert list(made.refused.nodes) == ["tanh"] and len(made.folds) == 2
    (line,) = [x for x in warnings(reports(made)) if "inside of tspc" in x]
    assert f"{TANH}: aten.tanh.default runs replicated: an error inside" in line
    assert "(KeyError: 'injected' (in pass factorize of tspc, at %tanh" in line
    assert "MiB on each rank; please report it" in line


def test_an_op_that_cannot_be_placed(ladder: pytest.MonkeyPatch) -> None:
    def fails(s: Any, n: Any, record: Any) -> bool:
        return n.op == aten.tanh.default and n.name not in s.analysis.refused

    fail_at(ladder, propagate, "_call", fails)
    assert list(verified().refused.nodes) == ["tanh"]


def test_a_region_that_cannot_be_made(ladder: pytest.MonkeyPatch) -> None:
    fail_at(ladder, pieces._Maker, "steps", lambda m, *_: "up.weight" in m.fold.weights)
    made = verified()
    assert list(made.refused.regions) == [{"up.weight", "down.weight"}]
    (line,) = [x for x in warnings(reports(made)) if "inside of tspc" in x]
    assert "down.weight, up.weight gathered at use, not folded (an error inside of tspc" in line
    assert len(made.folds) == 1


def test_a_graph_that_no_pass_can_treat(ladder: pytest.MonkeyPatch) -> None:
    fail_at(ladder, pipeline, "choose", lambda a, *_: bool(a.program.nodes and not all_refused(a)))
    made = verified()
    assert made.refused.everything and not made.folds and not made.choice.leaves
    (line,) = warnings(reports(made))
    assert "the whole graph runs replicated on all ranks" in line and "test_ladder.py:" in line


def all_refused(a: Any) -> bool:
    return bool(a.refused.everything)


def test_ops_one_after_another_until_all_are_refused(ladder: pytest.MonkeyPatch) -> None:
    fail_at(ladder, propagate, "_call", lambda s, n, r: not all_refused(s.analysis))
    assert verified().refused.everything


def test_a_graph_that_cannot_be_traced(ladder: pytest.MonkeyPatch) -> None:
    """An error of lowering, at an op."""

    fail_at(ladder, Run, "results", _cut_tanh)
    assert list(verified().refused.nodes) == ["tanh"]


def test_the_cause_is_logged(ladder: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fail_at(ladder, factorize, "pointwise", lambda op: op.node.op == aten.tanh.default)
    with caplog.at_level(logging.DEBUG, "tspc"):
        verified()
    (record,) = [r for r in caplog.records if "injected" in r.getMessage()]
    assert record.levelno == logging.DEBUG and record.exc_info and record.exc_info[2] is not None


def test_strict_is_told(ladder: pytest.MonkeyPatch) -> None:
    fail_at(ladder, factorize, "pointwise", lambda op: op.node.op == aten.tanh.default)
    with pytest.raises(Exception, match=rf"{TANH}: KeyError: 'injected'.*strict=False"):
        verified(strict=True)


def test_the_suite_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """TSPC_STRICT_INTERNAL=1, as everywhere in the tests."""
    fail_at(monkeypatch, factorize, "pointwise", lambda op: op.node.op == aten.tanh.default)
    with pytest.raises(Exception, match="KeyError: 'injected'"):
        verified()


def test_what_is_said_on_purpose_stays(ladder: pytest.MonkeyPatch) -> None:
    model, given = LlamaLike(layers=1), (TOKENS,)
    with pytest.raises(Exception, match="'mlps' matches no region"):
        tspc.plan(model, given, ranks=2, options={"schedule": {"mlps": "ring"}})


def lowered(ranks: list[int]) -> tuple[float, float, list[str], str]:
    """On these ranks a cut op cannot be lowered: (loss, one device's, lines logged, message)."""
    lines = _Lines()
    log = logging.getLogger("tspc")
    log.addHandler(lines)
    loss, message = 0.0, ""
    torch.manual_seed(0)
    model, (tokens, labels) = Model().double(), torch.randint(0, 32, (2, 2, 7))
    one = model(tokens, labels).item()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TSPC_STRICT_INTERNAL")
        if dist.get_rank() in ranks:
            fail_at(patch, Run, "results", _cut_tanh)
        fn = torch.compile(model, backend="tsp", options={"compiler": "eager"})
        try:
            loss = fn(tokens, labels)
            loss.backward()
            loss = loss.item()
        except Exception as e:
            message = str(e)
    log.removeHandler(lines)
    return loss, one, lines.lines, message


def _cut_tanh(run: Any, n: Any) -> bool:
    return n.op == aten.tanh.default and chunk_of(0) in sympy.Tuple(*n.type.shape).free_symbols


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.mark.dist
def test_ranks_climb_alike(world: Any) -> None:
    for rank, (loss, one, lines, message) in enumerate(world(2).run(lowered, ranks=[0, 1])):
        assert not message and loss == pytest.approx(one, rel=1e-12)
        told = [x for x in lines if "tanh.default runs replicated: an error inside" in x]
        assert len(told) == (rank == 0)


@pytest.mark.dist
def test_a_rank_that_climbs_alone_is_told(world: Any) -> None:
    for *_, message in world(2).run(lowered, ranks=[1]):
        assert re.search(r"ranks \[1\] of axis .* differ from rank 0", message)
        assert "rank 1 after an error inside of tspc refuses tanh: KeyError" in message


def test_what_the_frames_of_an_error_hold() -> None:
    def fails(n: Node, other: int) -> None:
        raise ValueError

    ours = FunctionType(fails.__code__, {"__name__": "tspc.sample", "ValueError": ValueError})
    node = Node("t", torch.ops.aten.tanh.default)
    for fn, held in ((fails, []), (ours, [node])):
        with pytest.raises(ValueError) as e:
            fn(node, 3)
        assert list(at_hand(e.value)) == held
