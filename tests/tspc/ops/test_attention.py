"""Attention on one device: by its definition, with every field, and its form as a node."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tspc.ir.program import SDPA, Node, Ref
from tspc.ir.spec import AttentionSpec, Operands
from tspc.ops.attention import ATTENTION, attention, bound, sinks_gradient, spelled, sunk
from tspc.ops.counter import kept_keys

Tensor = torch.Tensor
N, M = 5, 7


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


Q, K, V = draw(2, 4, N, 6), draw(2, 4, M, 6), draw(2, 4, M, 3)
AT_Q, AT_K = torch.arange(N)[:, None], torch.arange(M)[None, :]


def weights(scores: Tensor, keep: Tensor) -> Tensor:
    """A softmax of what is kept; zeros where nothing is."""
    e = torch.where(keep, scores.exp(), 0.0)
    return e / e.sum(-1, keepdim=True).clamp(min=1e-300)


SCORES = (Q @ K.transpose(-1, -2)) / math.sqrt(6)
ALL = torch.ones(N, M, dtype=torch.bool)


def test_plain_and_masked_attention_are_torchs() -> None:
    mask = draw(2, 4, N, M)
    for others, plain in (((), ()), ((mask,), (mask,))):
        torch.testing.assert_close(attention(Q, K, V, *others), SDPA(Q, K, V, *plain))
    wanted = SDPA(Q, K, V, None, 0.0, True, scale=0.3)
    torch.testing.assert_close(attention(Q, K, V, causal=True, scale=0.3), wanted)


@pytest.mark.parametrize(
    "settings,others,keep",
    [
        ({"causal": True}, (torch.arange(M) > 0,), (AT_Q >= AT_K) & (AT_K > 0)),
        ({"predicate": "(k + s0 >= q)", "sizes": (2,)}, (), AT_K + 2 >= AT_Q),
        ({"causal": True, "predicate": "(k > 1)"}, (), (AT_Q >= AT_K) & (AT_K > 1)),
    ],
    ids=["mask", "predicate", "both"],
)
def test_keys_that_are_hidden(settings: dict[str, Any], others: tuple, keep: Tensor) -> None:
    """A query that sees no key has zeros."""
    others = tuple(m.expand(2, 1, N, M) for m in others)
    got = attention(Q, K, V, *others, **settings)
    torch.testing.assert_close(got, weights(SCORES, keep) @ V)


def test_data_of_a_predicate() -> None:
    data = torch.tensor([[[0, 0, 1, 1, 1, 2, 2]], [[0, 1, 1, 1, 2, 2, 2]]])
    got = attention(Q, K, V, None, None, data, predicate="(d0[q] == d0[k])")
    keep = (data[:, 0, :N, None] == data[:, 0, None, :])[:, None]
    torch.testing.assert_close(got, weights(SCORES, keep) @ V)


def test_a_low_fill_shares_out_where_nothing_is_seen() -> None:
    got = attention(Q, K, V, predicate="(k > q + 3)", fill=-1e30)
    wanted = torch.softmax(SCORES.masked_fill(~(AT_K > AT_Q + 3), -1e30), -1) @ V
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(got[:, :, -1], V.mean(-2))


def test_a_modified_score_and_fewer_heads_of_keys() -> None:
    k, v = K[:, :2], V[:, :2]
    got = attention(Q, k, v, score="aten.tanh(s)", grouped=True)
    wide_k, wide_v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = torch.tanh(Q @ wide_k.transpose(-1, -2) / math.sqrt(6))
    torch.testing.assert_close(got, torch.softmax(scores, -1) @ wide_v)


def test_dropped_keys_are_those_of_the_states() -> None:
    states = torch.randint(0, 2**62, (2, 4, N))
    got = attention(Q, K, V, None, states, dropout=0.5)
    keep = kept_keys(states, 0, M, 0.5)
    torch.testing.assert_close(got, (torch.softmax(SCORES, -1) * keep * 2) @ V)
    with pytest.raises(AssertionError, match="keys are dropped by the states"):
        attention(Q, K, V, dropout=0.5, score="aten.tanh(s)")


def test_a_sink_takes_its_share() -> None:
    sinks = draw(4)
    got = attention(Q, K, V, None, None, None, sinks)
    total = SCORES.exp().sum(-1, keepdim=True) + sinks.exp()[:, None, None]
    torch.testing.assert_close(got, (SCORES.exp() / total) @ V)


def test_a_sink_after_attention_and_its_gradient() -> None:
    sinks = draw(4).requires_grad_()
    lse = SCORES.logsumexp(-1)
    out, both = sunk(SDPA(Q, K, V), lse, sinks)
    wanted = attention(Q, K, V, None, None, None, sinks)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(both, torch.logaddexp(lse, sinks[:, None]))
    g = draw(*out.shape)
    (gradient,) = torch.autograd.grad(wanted, sinks, g)
    torch.testing.assert_close(sinks_gradient(g, out, both, sinks), gradient)


def test_the_op_is_the_function() -> None:
    mask = torch.ones(N, M, dtype=torch.bool).tril()
    got = ATTENTION(Q, K, V, mask, predicate="(k > 0)")
    assert torch.equal(got, attention(Q, K, V, mask, predicate="(k > 0)"))


def test_a_node_of_torchs_op_or_of_ours() -> None:
    q, k, v, m = map(Ref, "qkvm")
    torchs = Node("y", SDPA, (q, k, v, m, 0.5, True), {"scale": 2.0, "enable_gqa": True})
    x, a = bound(torchs)
    assert x == Operands(q, k, v, m)
    assert a == AttentionSpec(causal=True, scale=2.0, dropout=0.5, grouped=True)
    ours = spelled(torchs, x, a)
    assert ours.op is ATTENTION and ours.args == (q, k, v, m) and ours.kwargs == a.kwargs
    assert bound(ours) == (x, a)
