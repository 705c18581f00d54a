"""What people write around a model: each habit is a function that is run on a compiled model over
2 real ranks and on a plain copy on one device, in float64; what it returns must be equal.

A habit is registered by `@habit(...)` in a module of this folder; `tests/parity/test_habits.py`
runs them.
"""

from __future__ import annotations

import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from tests.support.models import make, whole

TOLERANCE = 1e-9


@dataclass
class Side:
    """One of the two copies.

    call: the compiled model, or the plain one itself. wrap: what makes a callable so (compiles it,
    or gives it back): for what compiles a part, a step, or an object of its own.
    """

    model: nn.Module
    wrap: Callable[[Any], Any]
    compiled: bool
    call: Any = None

    def __post_init__(self) -> None:
        self.call = self.wrap(self.model)

    def loss(self, ids: torch.Tensor | None = None) -> torch.Tensor:
        ids = tokens() if ids is None else ids
        return self.call(ids, ids)

    def grads(self) -> dict[str, Any]:
        return {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}

    def weights(self) -> dict[str, Any]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}


@dataclass(frozen=True)
class Habit:
    """raises: (type, text) of the error that the compiled side raises, on every rank, in place of
    a value; the plain side is then not compared.

    again: on a model that habits before have called, its first weights put back, which compiles
    once for all of them.
    """

    do: Callable[[Side], Any]
    build: Callable[[], nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)
    raises: tuple[type[Exception], str] | None = None
    again: bool = False


HABITS: dict[str, Habit] = {}


def tiny() -> nn.Module:
    """A decoder of one layer with a loss: model(tokens, labels) -> scalar."""
    return make("gpt2_like", heads=2, layers=1)


def tokens(length: int = 9, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 187, (2, length), generator=generator)


def habit(
    build: Callable[[], nn.Module] = tiny,
    options: Mapping[str, Any] | None = None,
    raises: tuple[type[Exception], str] | None = None,
    again: bool = False,
) -> Callable[[Callable[[Side], Any]], Callable[[Side], Any]]:
    """Register a habit by its function's module and name. options: of the backend; "compiler" is
    "eager" unless given."""

    def register(do: Callable[[Side], Any]) -> Callable[[Side], Any]:
        name = f"{do.__module__.rsplit('.', 1)[-1]}.{do.__name__}"
        assert name not in HABITS, f"two habits are called {name}"
        HABITS[name] = Habit(do, build, {"compiler": "eager", **(options or {})}, raises, again)
        return do

    return register


def run(names: Sequence[str], module: str) -> dict[str, str]:
    """On one rank: habit -> what is wrong with it, of those that do not hold."""
    __import__(module)
    found, called = {}, {}
    for n in sorted(names, key=lambda n: not HABITS[n].again):
        if not HABITS[n].again:
            torch._dynamo.reset()
        wrong = _wrong(HABITS[n], called)
        if wrong:
            found[n] = wrong
    return found


def _wrong(h: Habit, called: dict[Any, Side]) -> str:
    """called: by what builds it, a compiled model for habits that take one again."""
    try:
        side = _again(h, called) if h.again else _side(h, True)
        torch.manual_seed(0)
        mine = h.do(side)
    except Exception as e:
        if h.raises is None:
            return "".join(traceback.format_exception(e))[-3000:]
        kind, text = h.raises
        good = isinstance(e, kind) and text in str(e)
        return "" if good else f"raised {type(e).__name__}: {e}"
    if h.raises is not None:
        return f"did not raise {h.raises[0].__name__}"
    torch.manual_seed(0)
    one = h.do(_side(h, False))
    return _differs("result", mine, one)


def _again(h: Habit, called: dict[Any, Side]) -> Side:
    key = h.build, repr(h.options)
    if key not in called:
        called[key] = _side(h, True)
        return called[key]
    side, first = called[key], _side(h, False).model
    side.model.load_state_dict(first.state_dict())
    side.model.train().requires_grad_(True).zero_grad()
    return side


def _side(h: Habit, compiled: bool) -> Side:
    def wrap(x: Any) -> Any:
        return torch.compile(x, backend="tsp", options=dict(h.options)) if compiled else x

    torch.manual_seed(0)
    model = h.build()
    return Side(model, wrap, compiled)


def _differs(at: str, a: Any, b: Any) -> str:
    """What differs first between a value of the ranks and one of one device."""
    if isinstance(b, Mapping):
        if list(a) != list(b):
            return f"{at}: {list(a)}, one device has {list(b)}"
        return next((d for k in b if (d := _differs(f"{at}[{k!r}]", a[k], b[k]))), "")
    if isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return f"{at}: {len(a)} items, one device has {len(b)}"
        return next(
            (d for i, (x, y) in enumerate(zip(a, b)) if (d := _differs(f"{at}[{i}]", x, y))), ""
        )
    if isinstance(b, torch.Tensor):
        if not isinstance(a, torch.Tensor):
            return f"{at}: {type(a).__name__}, one device has a tensor"
        a, b = whole(a.detach()), b.detach()
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{at}: {a.dtype}{list(a.shape)}, one device has {b.dtype}{list(b.shape)}"
        a, b = a.double(), b.double()
        error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) if b.numel() else 0.0
        return "" if error <= TOLERANCE or torch.equal(a, b) else f"{at}: off by {error:.2e}"
    if isinstance(b, np.ndarray):
        return _differs(at, torch.from_numpy(np.asarray(a)), torch.from_numpy(b))
    if isinstance(b, numbers.Number) and not isinstance(b, bool):
        good = a == b or abs(complex(a) - complex(b)) <= TOLERANCE * abs(complex(b))
        return "" if good else f"{at}: {a!r}, one device has {b!r}"
    return "" if a == b else f"{at}: {a!r}, one device has {b!r}"
