"""What is done to scores, as text: the text of ops computes what they do, and its derivative."""

from __future__ import annotations

import pytest
import torch

from tspc.masks.score import applied, composed, modified, pulled_back, shown

X = torch.linspace(-2, 2, 7, dtype=torch.float64)
CAP = "aten.mul(aten.tanh(aten.div(s, 50.0)), 50.0)"


@pytest.mark.parametrize(
    "packet,args,at,text",
    [
        ("mul", ("s", 0.5), 0, "aten.mul(s, 0.5)"),
        ("tanh", ("s",), 0, "aten.tanh(s)"),
        ("add", (1.5, "s"), 1, "aten.add(s, 1.5)"),
        ("sub", (1.5, "s"), 1, "aten.rsub(s, 1.5)"),
        ("div", (1.5, "s"), 1, "aten.mul(aten.reciprocal(s), 1.5)"),
        ("pow", (2.0, "s"), 1, "aten.pow(2.0, s)"),
    ],
)
def test_the_text_of_an_op_computes_it(packet: str, args: tuple, at: int, text: str) -> None:
    assert applied(packet, args, {}, at) == text
    value = (
        getattr(torch.ops.aten, packet)(*(X if a == "s" else a for a in args))
        if (packet != "sub" or at == 0)
        else 1.5 - X
    )
    torch.testing.assert_close(modified(text, X), value, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    "packet,args,at",
    [
        ("softmax", ("s", -1), 0),
        ("no_such_op", ("s",), 0),
        ("atan2", (1.0, "s"), 1),
        ("mul", ("s", torch.ones(2)), 0),
        ("dropout", ("s", 0.5, True), 0),
    ],
)
def test_what_has_no_text(packet: str, args: tuple, at: int) -> None:
    assert applied(packet, args, {}, at) is None


def test_keywords_are_kept() -> None:
    text = applied("gelu", ("s",), {"approximate": "tanh"})
    assert text == "aten.gelu(s, approximate='tanh')"
    assert torch.equal(modified(text, X), torch.nn.functional.gelu(X, approximate="tanh"))


def test_ops_one_after_the_other_the_last_first() -> None:
    steps = [("mul", ("x", 50.0), {}), ("tanh", ("y",), {}), ("div", ("z", 50.0), {})]
    assert composed(steps) == CAP and composed([]) == ""
    assert composed([*steps, ("softmax", ("x", -1), {})]) is None
    assert torch.equal(modified(CAP, X), torch.tanh(X / 50) * 50)


def test_the_cotangent_is_that_of_autograd() -> None:
    x, g = X.clone().requires_grad_(), torch.arange(7.0, dtype=torch.float64)
    (torch.tanh(x / 50) * 50).backward(g)
    assert x.grad is not None and torch.equal(pulled_back(CAP, X, g), x.grad)
    assert pulled_back("", X, g) is g and modified("", X) is X


def test_for_a_reader_without_namespaces() -> None:
    assert shown(CAP) == "mul(tanh(div(s, 50.0)), 50.0)"
