"""FlexAttention: its mask functions become predicates, what it adds to the scores stays added."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as flex

import tspc
from tests.parity.test_predicates import Model, attentions, inputs, squares
from tests.support.widen import Widen
from tests.support.zoo import build
from tspc.backend.simulated import Simulated, relative_errors, simulated_backend
from tspc.frontend.flex_attention import _prune

pytestmark = pytest.mark.sampled(2)

Tensor = torch.Tensor


class Flex(Model):
    """The mask function of a batch; `score` modifies the scores."""

    def __init__(self, mod: Callable[..., Any] | None, score: Callable[..., Tensor] | None = None):
        super().__init__(lambda x, pad: pad, layers=1)
        self.mod, self.score = mod, score

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        block = None
        if self.mod is not None:
            n = q.shape[2]
            block = flex.create_block_mask(self.mod(mask), q.shape[0], None, n, n, device="cpu")
        return flex.flex_attention(q, k, v, score_mod=self.score, block_mask=block)


class Plain(Flex):
    """The same with tensors over queries and keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        at = [
            torch.arange(n).view([-1 if d == e else 1 for e in range(4)])
            for d, n in enumerate((*q.shape[:3], q.shape[2]))
        ]
        scores = q @ k.mT * q.shape[-1] ** -0.5
        scores = self.score(scores, *at) if self.score is not None else scores
        if self.mod is not None:
            scores = scores.masked_fill(~self.mod(mask)(*at), -torch.inf)
        return torch.nan_to_num(torch.softmax(scores, -1)) @ v


def window(pad: Tensor) -> Any:
    return lambda b, h, q, k: (q >= k) & (q - k < 4)


def packed(pad: Tensor) -> Any:
    document = (pad == 0).cumsum(-1)
    return lambda b, h, q, k: (q >= k) & (document[b, q] == document[b, k])


def far(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return s - (q - k).abs() * (h + 1)


def capped(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return 2 * torch.tanh(s / 2)


def capped_then_far(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return far(capped(s, b, h, q, k), b, h, q, k)


def by_head(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Not of constants alone: written out."""
    return torch.tanh(s / (h + 1))


@pytest.mark.parametrize(
    "mod,score,text",
    [
        (window, None, "(k + 3 >= q)"),
        (packed, None, "(d0[k] == d0[q])"),
        (None, None, ""),
        (window, far, None),
        (packed, capped, "(d0[k] == d0[q])"),
        (window, capped_then_far, None),
        (window, by_head, None),
    ],
)
def test_equals_one_device(
    mod: Any, score: Any, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward of one device; no CPU has its backward, but that of the same in tensors."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    torch.manual_seed(0)
    mine, plain = Flex(mod, score).double(), Plain(mod, score).double()
    plain.load_state_dict(mine.state_dict())
    made: list[Simulated] = []
    torch._dynamo.reset()
    compiled = torch.compile(mine, backend=simulated_backend(3, graphs=made))
    with Widen():
        got, expected = compiled(*inputs()), plain(*inputs())
    with torch.no_grad():
        torch.testing.assert_close(got.detach(), mine(*inputs()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    got.square().mean().backward()
    expected.square().mean().backward()
    for (n, p), q in zip(mine.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=n: n + m)
    if text is not None:
        (graph,) = (g for g in made if g.rewritten.folds)
        assert {a.spec.predicate for a in attentions(graph)} == {text} and not squares(graph)


def test_its_log_sum_exp_is_refused() -> None:
    class Both(Flex):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            out, lse = flex.flex_attention(q, k, v, return_lse=True)
            return out * lse.unsqueeze(-1)

    with (
        torch.no_grad(),
        pytest.raises(Exception, match="log-sum-exp is used"),
    ):
        tspc.verify(Both(None), inputs(), {}, 2)


class Writing(Flex):
    """Keys in a buffer that is written before the mask, and a mask's data that is written."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        keys, seen = torch.empty_like(k), torch.zeros_like(mask)
        keys[..., :3].copy_(k[..., :3])
        keys[..., 3:] = k[..., 3:]
        seen[:, 2:] = 1
        seen.add_(mask)
        n = q.shape[2]

        def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & (seen[b, k] > 0)

        block = flex.create_block_mask(mod, q.shape[0], None, n, n, device="cpu")
        return flex.flex_attention(q, keys, v, block_mask=block) * seen[:, None, :, None]


def test_what_is_written_in_place_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the block mask goes."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    torch.manual_seed(0)
    model = Writing(None).double()
    torch._dynamo.reset()
    got = torch.compile(model, backend=simulated_backend(3))(*inputs())
    with torch.no_grad():
        torch.testing.assert_close(got.detach(), model(*inputs()), rtol=1e-9, atol=1e-12)


def test_a_write_that_others_see_stays() -> None:
    """Erased is what serves the block mask alone: not a write into memory that is read besides,
    through a view or not."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    seen = graph.call_function(torch.zeros_like, (x,))
    row = graph.call_function(operator.getitem, (seen, 0))
    graph.call_function(operator.setitem, (row, 1, 5.0))
    shifted = graph.call_method("add_", (row, 1))
    own = graph.call_method("clone", (seen,))
    graph.call_function(operator.setitem, (own, 0, 7.0))
    block = graph.call_function(torch.add, (own, shifted))
    graph.output(seen)
    _prune(graph, {block})
    assert [n.name for n in graph.nodes if n.op.startswith("call")] == [
        *("zeros_like", "getitem", "setitem", "add_")
    ]


@pytest.mark.wide
@pytest.mark.parametrize("name", ["gemma3", "packed", "deepseek_v3"])
def test_library_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their block masks are made under vmap, in graphs of their own where torch breaks them off."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    torch.manual_seed(0)
    mine, call = build(name, 19, 2)
    plain, _ = build(name, 19, 2)
    plain.load_state_dict(mine.state_dict())
    mine.set_attn_implementation("flex_attention")
    plain.set_attn_implementation("eager")
    made: list[Simulated] = []
    torch._dynamo.reset()
    with Widen():
        losses = [
            fn(**call).loss
            for fn in (torch.compile(mine, backend=simulated_backend(3, graphs=made)), plain)
        ]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)
    grads = [{n: p.grad for n, p in m.named_parameters()} for m in (mine, plain)]
    assert max(relative_errors(*grads).values()) < 1e-9
    found = [a for g in made for a in attentions(g)]
    documents = "((d0[k] == d0[q]) & (d1[q] >= d1[k]))"
    texts = {"gemma3": ["(k + 6 >= q)", ""], "packed": [documents] * 2, "deepseek_v3": ["", ""]}
    assert [a.spec.predicate for a in found] == texts[name]
    assert all(a.operands.mask is None for a in found) and not any(
        squares(g) for g in made if g.rewritten.folds
    )
    regions = sum(len(g.rewritten.choice.regions) for g in made)
    assert regions == (7 if name == "deepseek_v3" else 5)
