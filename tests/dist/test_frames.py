"""What Dynamo leaves to Python is told once, with its cause and bytes; an error if it is strict."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

from tspc.runtime.call import frames as calls

pytestmark = pytest.mark.dist
EAGER = {"compiler": "eager"}
X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).double()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 16).double(), nn.Linear(16, 8).double()
        self.scale = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)) * self.scale)


class Disabled(Block):
    @torch._dynamo.disable
    def tail(self, h: torch.Tensor) -> torch.Tensor:
        return self.down(h)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(torch.tanh(self.up(x)))


def limit(strict: bool = False) -> list[float]:
    m = Block()
    fn = torch.compile(m, backend="tsp", options={**EAGER, "strict": strict})
    out = []
    with torch._dynamo.config.patch(recompile_limit=1):
        for m.scale in (1, 2, 3, 4):
            out.append(fn(X).detach().sum().item())
    return out


def disabled() -> None:
    fn = torch.compile(Disabled(), backend="tsp", options=EAGER)
    for _ in range(2):
        fn(X)


def suppressed() -> None:
    fn = torch.compile(Block(), backend="tsp", options={**EAGER, "layout": "nope"})
    with torch._dynamo.config.patch(suppress_errors=True):
        for _ in range(2):
            fn(X)


def function() -> None:
    m = Block()

    @torch._dynamo.disable
    def inner(x: torch.Tensor) -> torch.Tensor:
        return m(x)

    def step(x: torch.Tensor) -> torch.Tensor:
        return inner(x)

    torch.compile(step, backend="tsp", options=EAGER)(X)


def uncompiled() -> None:
    m = Block()
    torch.compile(m, backend="tsp", options=EAGER)(X)
    calls.EAGER.reported.clear()
    for _ in range(2):
        m(X)


def alike() -> None:
    fn = torch.compile(Block(), backend="tsp", options=EAGER)
    for _ in range(2):
        fn(X)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def lines_of(names: list[str]) -> dict[str, list[str]]:
    """What each of these functions logs on this rank of what ran whole."""
    out = {}
    for name in names:
        torch._dynamo.reset()
        handler = _Lines()
        logging.getLogger("tspc").addHandler(handler)
        globals()[name]()
        logging.getLogger("tspc").removeHandler(handler)
        out[name] = [l for l in handler.lines if "whole on every rank" in l]
    return out


WANTED = {
    "limit": r"Block: used whole .*: up.weight, up.bias, down.weight and 1 more, 2.2 KiB: .*"
    r"test_frames.py:\d+: torch._dynamo.config.recompile_limit \(1\) is reached by forward",
    "disabled": r"Disabled: used whole .*: down.weight, down.bias, 1.1 KiB: .*_dynamo.disable",
    "suppressed": r"Block: Dynamo gave tspc nothing of it: .*4 parameters of 2.2 KiB: .*suppress_",
    "function": r"step: Dynamo gave tspc nothing of it: .*4 parameters of 2.2 KiB: ",
    "uncompiled": r"used whole .*: Linear.weight, Linear.bias, .*called without torch.compile",
    "alike": "",
}


def test_what_runs_whole_is_told_once_on_one_rank(world: Any) -> None:
    first, second = world(2).run(lines_of, names=list(WANTED))
    for name, pattern in WANTED.items():
        assert len(first[name]) == bool(pattern), (name, first[name])
        assert not pattern or re.match(f"tspc: {pattern}", first[name][0]), first[name]
        assert not second[name]


def strict_limit() -> str:
    return _told(lambda: limit(True))


def _told(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return ""


def test_it_is_an_error_if_it_is_strict(world: Any) -> None:
    for said in world(2).run(strict_limit):
        assert re.match("UnsupportedError: Block: used whole .* allow it by strict=False", said)


def decorated() -> tuple[torch.Tensor, int]:
    """A forward that a library's decorator replaced, of a library's class."""
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).double()
    m.forward = torch.autocast("cpu", dtype=torch.bfloat16)(m.forward)
    out = torch.compile(m, backend="tsp", options={**EAGER, "strict": True})(X)
    return out.detach().clone(), sum(isinstance(p, DTensor) for p in m.parameters())


def test_a_decorated_forward_of_a_librarys_class_is_compiled(world: Any) -> None:
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).double()
    for out, shards in world(2).run(decorated):
        torch.testing.assert_close(out, m(X).detach(), rtol=1e-12, atol=1e-12)
        assert shards == 4
