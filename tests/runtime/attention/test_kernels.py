"""Attention of local queries against the whole sequence: values, log-sum-exp and gradients against
one device, fused and written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tspc.ir.layout import Layout, Span
from tspc.ir.spec import AttentionSpec, Operands
from tspc.ops.attention import attention as whole_attention
from tspc.runtime.attention import kernels
from tspc.runtime.attention.blocks import Meeting
from tspc.runtime.comm.drivers import lockstep

Tensor = torch.Tensor
RANKS, LENGTH = 2, 9


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


Q, K, V, NARROW = draw(2, 4, LENGTH, 6), draw(2, 4, LENGTH, 6), draw(2, 4, LENGTH, 6), 3
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {}),
    "scaled": ({"scale": 0.3}, {}),
    "window": ({"causal": True, "predicate": "(k + 2 >= q)"}, {}),
    "capped": ({"score": "aten.mul(aten.tanh(s), 2.0)"}, {}),
    "dropped": ({"dropout": 0.5}, {"states": True}),
    "filled": ({"predicate": "(k >= q + 1)", "fill": -1e30}, {}),
    "few heads": ({"grouped": True}, {"heads": 2}),
    "few heads, written out": ({"grouped": True, "score": "aten.tanh(s)"}, {"heads": 2}),
    "narrow values": ({"causal": True}, {"narrow": True}),
    "masked": ({}, {"mask": True}),
}


def tensors(k: Tensor, v: Tensor, **kind: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    heads, others = kind.get("heads", 4), dict[str, Tensor]()
    k, v = k[:, :heads], v[:, :heads]
    if kind.get("narrow"):
        v = v[..., :NARROW]
    if kind.get("states"):
        others["states"] = torch.randint(0, 2**62, (2, 4, LENGTH))
    if kind.get("mask"):
        others["mask"] = torch.rand(2, 1, LENGTH, LENGTH) > 0.3
    return k, v, others


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("name", CASES)
def test_on_ranks_it_is_one_devices(name: str, order: str) -> None:
    fields, kind = CASES[name]
    k, v, others = tensors(K, V, **kind)
    layout = Layout(RANKS, order)
    span = Span(layout, int(layout.chunk_rows(LENGTH)), LENGTH)
    m = Meeting(AttentionSpec(**fields), span, span)
    at = [layout.positions(r, span.rows, LENGTH) for r in range(RANKS)]
    real = [layout.valid(r, span.rows, LENGTH) for r in range(RANKS)]
    leaves = [x.clone().requires_grad_() for x in (Q, k, v)]
    wanted = whole_attention(*leaves, others.get("mask"), others.get("states"), **fields)
    g = torch.randn_like(wanted)
    grads = torch.autograd.grad(wanted, leaves, g)
    local = [
        Operands(Q[:, :, i], k[:, :, i], v[:, :, i], **{n: x[:, :, i] for n, x in others.items()})
        for i in at
    ]
    done = lockstep([kernels.attention(r, x, m) for r, x in enumerate(local)])
    cotangents = [torch.where(ok[:, None], g[:, :, i], 0.0) for i, ok in zip(at, real)]
    steps = [
        kernels.attention_backward(r, c, x, d, m, False)
        for r, (c, x, d) in enumerate(zip(cotangents, local, done))
    ]
    for i, ok, (out, _), back in zip(at, real, done, lockstep(steps)):
        torch.testing.assert_close(out[:, :, ok], wanted.detach()[:, :, i[ok]])
        for d, whole in zip(back, grads):
            torch.testing.assert_close(d[:, :, ok], whole[:, :, i[ok]])


def alone(**fields: Any) -> Meeting:
    span = Span(Layout(1), LENGTH, LENGTH)
    return Meeting(AttentionSpec(**fields), span, span)


def test_the_log_sum_exp_of_scores() -> None:
    out, lse = kernels.attend(Operands(Q, K, V), alone(), [0])
    scores = Q @ K.transpose(-1, -2) / math.sqrt(6)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(out, scores.softmax(-1) @ V)


def test_a_query_without_a_key_has_zeros() -> None:
    mask = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)
    mask[:, :, 3] = False
    for x in (Operands(Q, K, V, mask), Operands(Q, K, V[..., :NARROW], mask)):
        out, lse = kernels.attend(x, alone(), [0])
        assert not out[:, :, 3].any() and not lse[:, :, 3].any() and out[:, :, 4].any()


@pytest.mark.parametrize("rows", [LENGTH, 1])
def test_the_gradient_of_an_added_mask(rows: int) -> None:
    mask = draw(1, 1, rows, LENGTH)
    leaves = [x.clone().requires_grad_() for x in (Q, K[:, :2], V[:, :2], mask)]
    wanted = whole_attention(*leaves[:3], leaves[3], grouped=True)
    g = torch.randn_like(wanted)
    grads = torch.autograd.grad(wanted, leaves, g)
    m, x = alone(grouped=True), Operands(Q, K[:, :2], V[:, :2], mask)
    done = kernels.attend(x, m, [0])
    for a, b in zip(kernels.attend_backward(g, x, done, m, [0], True), grads, strict=True):
        torch.testing.assert_close(a, b)
