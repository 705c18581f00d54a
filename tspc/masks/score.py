"""What a model does to the scores of attention before a mask is added, as text over `s`: one number
in, one out, as `aten.mul(aten.tanh(aten.div(s, 50.0)), 50.0)` caps them softly.

The text is executed by the same ops, so it is what the model computes; autograd gives its
derivative.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from types import CodeType

import torch

from tspc.base.context import Arguments, Keywords

Tensor = torch.Tensor
Step = tuple[str, Arguments, Keywords]  # an op of ATen, its first operand the score
SCORE = "s"
# with the constant first: the op that has it last, and what it takes of the score
_MIRRORED = {
    "add": ("add", "{}"),
    "mul": ("mul", "{}"),
    "sub": ("rsub", "{}"),
    "div": ("mul", "aten.reciprocal({})"),
}
_NAMES = {"aten": torch.ops.aten, "inf": math.inf, "nan": math.nan}


def applied(packet: str, args: Sequence[object], kwargs: Keywords, at: int = 0) -> str | None:
    """The text of an op of ATen whose operand `at` is the text of a score; None where the op is not
    pointwise, or another operand is no constant."""
    if at and packet in _MIRRORED:
        packet, text = _MIRRORED[packet]
        args, at = (text.format(args[at]), args[1 - at]), 0
    op = getattr(torch.ops.aten, packet, None)
    if (
        op is None
        or (at and packet != "pow")
        or not any(
            torch.Tag.pointwise in getattr(op, o).tags
            and torch.Tag.nondeterministic_seeded not in getattr(op, o).tags
            for o in op.overloads()
        )
    ):
        return None
    constants = [a for i, a in enumerate(args) if i != at] + list(kwargs.values())
    if not all(a is None or isinstance(a, (bool, int, float, str)) for a in constants):
        return None
    shown = [str(a) if i == at else repr(a) for i, a in enumerate(args)]
    shown += [f"{name}={value!r}" for name, value in kwargs.items()]
    return f"aten.{packet}({', '.join(shown)})"


def composed(steps: Sequence[Step]) -> str | None:
    """The text of ops on one score after the other, the last one first; "" for none, None where one
    of them has no text."""
    text: str | None = SCORE
    for packet, args, kwargs in reversed(steps):
        text = applied(packet, (text, *args[1:]), kwargs) if text is not None else None
    return text if steps else ""


@lru_cache(maxsize=64)
def _code(text: str) -> CodeType:
    return compile(text, "<score>", "eval")


def modified(text: str, scores: Tensor) -> Tensor:
    """The scores after the text; as they are for none."""
    if not text:
        return scores
    return eval(_code(text), {**_NAMES, SCORE: scores})  # noqa: S307  text of `applied`


def pulled_back(text: str, scores: Tensor, cotangent: Tensor) -> Tensor:
    """The cotangent of the scores from that of what `modified` makes of them."""
    if not text:
        return cotangent
    with torch.enable_grad():
        before = scores.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(modified(text, before), before, cotangent)
    return gradient


def shown(text: str) -> str:
    """For a reader: mul(tanh(div(s, 50.0)), 50.0)."""
    return re.sub(r"\baten\.", "", text)
