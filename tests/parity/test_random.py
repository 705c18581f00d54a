"""Random ops: ranks, schedules and policies see the mask of one device, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import tspc
from examples.gpt2_like import GPT2Like
from tests.support.models import whole
from tests.support.widen import Widen
from tspc.backend.reference import reference_backend
from tspc.backend.simulated import Simulated, relative_errors, simulated_backend
from tspc.base.options import parse
from tspc.ops import counter

pytestmark = [pytest.mark.slow, pytest.mark.sampled(5)]

SCHEDULES = ("ring", "broadcast", "gather", "stationary")
POLICIES = ("min", "max-speed")


class Block(nn.Module):
    """Dropout in attention and the MLP, around them, and every other kind of draw."""

    def __init__(self, heads: int = 4, kv_heads: int = 2, width: int = 4, ffn: int = 21):
        super().__init__()
        hidden = heads * width
        self.width, self.norm = width, nn.LayerNorm(hidden)
        self.q, self.o = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.k = nn.Linear(hidden, kv_heads * width, bias=False)
        self.v = nn.Linear(hidden, kv_heads * width, bias=False)
        self.up, self.down = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = self.norm(x)
        qkv = [self.heads(m(y)) for m in (self.q, self.k, self.v)]
        causal = mask is None
        y = F.scaled_dot_product_attention(*qkv, mask, 0.4, causal, enable_gqa=True)
        x = x + F.dropout(self.o(F.dropout(y.transpose(1, 2).flatten(2), 0.2)), 0.3)
        y = F.dropout(F.gelu(self.up(self.norm(x))), 0.5)
        y = y * torch.rand_like(y) * torch.bernoulli(y, 0.9) + 0.1 * torch.randn_like(y)
        y = F.dropout1d(self.down(y), 0.2) * torch.rand(x.shape[1], 1, dtype=x.dtype)
        y = y + torch.empty_like(y).exponential_(2.0) + torch.empty_like(y).uniform_(-1.0, 2.0)
        return x + F.alpha_dropout(y, 0.1, True) + torch.normal(y.detach(), 0.5)


class Model(nn.Module):
    """-> loss, and numbers that no token had a part in."""

    def __init__(self, layers: int = 1):
        super().__init__()
        self.embedding, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(
        self, tokens: torch.Tensor, keep: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.dropout(self.embedding(tokens), 0.1)
        mask = None if keep is None else keep[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        loss = F.cross_entropy(F.dropout(self.head(x), 0.1).flatten(0, 1), tokens.flatten())
        return loss, torch.rand(3) + torch.randint(0, 9, (3,)) + torch.randperm(3)


def model_of(layers: int = 1) -> Model:
    torch.manual_seed(0)
    return Model(layers)


def inputs(masked: bool) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 32, (3, 11), generator=generator)
    keep = torch.rand(3, 11, generator=generator) > 0.3
    keep[:, 0] = True
    return (tokens, keep) if masked else (tokens,)


CASES = [
    ("ring", 2, "min", True),
    ("broadcast", 3, "max-speed", False),
    ("gather", 4, "min", False),
    ("stationary", 3, "max-speed", True),
    ("stationary", 4, "min", False),
    ("auto", 2, "max-speed", False),
]


@pytest.mark.parametrize("schedule,ranks,policy,masked", CASES)
def test_ranks_draw_what_one_device_draws(
    schedule: str, ranks: int, policy: str, masked: bool
) -> None:
    options = {"schedule": schedule, "memory_budget": policy}
    found = tspc.verify(model_of().double(), inputs(masked), {}, ranks, options, 1e-9)
    (graph,) = found.graphs
    assert graph.rewritten.draws and len(graph.rewritten.folds) == 3
    assert not graph.rewritten.typed.fallbacks and not graph.rewritten.analysis.fallbacks


class Linear(nn.Module):
    """(attention, MLP), the first linear in v and o, the second in up and down."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Embedding(32, 16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.dropout(self.x(tokens), 0.5)
        q, k, v = (m(x).unflatten(-1, (4, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True)
        attended = F.dropout(self.o(F.dropout(y.transpose(1, 2).flatten(2))), 0.5)
        return attended, F.dropout(self.down(F.dropout(self.up(x), 0.5)), 0.5)


def check_adjoint(schedule: str, policy: str, again: bool) -> None:
    """<dW, W> = <y, cotangent> for every W in which y is linear; again: the model runs again in the
    backward."""
    torch.manual_seed(0)
    model, (tokens,) = Linear().double(), inputs(False)
    options = parse({"schedule": schedule, "memory_budget": policy})
    fn = torch.compile(model, backend=simulated_backend(3, options))
    outs = checkpoint(fn, tokens, use_reentrant=False) if again else fn(tokens)
    cotangents = [torch.randn_like(y) for y in outs]
    torch.autograd.backward(outs, cotangents)
    names = (("v", "o"), ("up", "down"))
    for y, g, weights in zip(outs, cotangents, names):
        expected = (y * g).sum().item()
        for w in (model.get_submodule(n).weight for n in weights):
            assert (w.grad * w).sum().item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_backward_sees_the_mask_of_forward(schedule: str, policy: str) -> None:
    check_adjoint(schedule, policy, again=False)


def test_a_checkpoint_around_the_model_sees_one_mask() -> None:
    check_adjoint("auto", "max-speed", again=True)


class Masks(nn.Module):
    """The factors of dropout on every token."""

    def __init__(self, p: float = 0.3):
        super().__init__()
        self.p, self.ones, self.same = p, nn.Embedding(2, 4), nn.Linear(4, 4, bias=False)
        nn.init.ones_(self.ones.weight)
        nn.init.eye_(self.same.weight)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.same(self.ones(tokens))
        return F.dropout(x, self.p), F.dropout(x, self.p)


def test_the_mask_has_the_right_distribution() -> None:
    p, calls = 0.3, 1000
    made: list[Simulated] = []
    fn = torch.compile(Masks(p), backend=simulated_backend(2, None, made))
    torch.manual_seed(0)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    both = [fn(tokens) for _ in range(calls)]
    first = torch.stack([a[0].detach() for a, _ in both])
    second = torch.stack([b[0].detach() for _, b in both])
    assert made[0].rewritten.typed.leaf is not None and len(made) == 1
    variance = p / (1 - p)
    bound = 5 * (variance / calls) ** 0.5
    assert float((first.mean(0) - 1).abs().max()) < bound
    assert float(first.var()) == pytest.approx(variance, rel=0.05)
    a, b = first.flatten(1) - 1, second.flatten(1) - 1
    for x, y in ((a, a), (a, b), (a[1:], a[:-1])):  # places, ops, calls
        together = x.T @ y / len(x) / variance
        if x is y:
            together.fill_diagonal_(0)
        assert float(together.abs().max()) < 6 / calls**0.5
    assert len({tuple(row.flatten().tolist()) for row in first[:, :4]}) > 900  # rank 0's shard
    assert not torch.equal(first[:, :4], first[:, 4:])


def test_manual_seed_repeats_a_run() -> None:
    fn = torch.compile(model_of(), backend=simulated_backend(2))

    def run(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return [x.detach() for _ in range(2) for x in fn(*inputs(False))]

    one, again, other = run(1), run(1), run(2)
    assert all(map(torch.equal, one, again))
    for a, b in ((one[0], other[0]), (one[1], other[1]), (one[0], one[2]), (one[1], one[3])):
        assert not torch.equal(a, b)


def test_layers_share_their_pieces() -> None:
    plan = tspc.plan(model_of(2), inputs(False), ranks=2)
    assert len(plan.rewritten.bodies) == 5 and len(set(plan.rewritten.bodies.values())) == 3


def test_evaluation_draws_nothing() -> None:
    model = GPT2Like(layers=1, dropout=0.5).double().eval()
    found = tspc.verify(model, (inputs(False)[0],), ranks=3, tolerance=1e-9)
    assert not found.graphs[0].rewritten.draws


def test_a_training_of_a_library_model() -> None:
    """Three steps at the library's own dropout of 0.1."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=3, n_positions=16)
    tokens = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(0))
    ends = []
    for backend in (reference_backend, simulated_backend(2)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).double()
        model.loss_type = "ForCausalLM"  # else a log call breaks the graph before the loss
        fn = torch.compile(model, backend=backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        losses = {}
        for step in range(3):
            with Widen():
                losses[str(step)] = fn(input_ids=tokens, labels=tokens).loss
            losses[str(step)].backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append({k: x.detach() for k, x in losses.items()})
        ends.append({n: p.detach() for n, p in model.named_parameters()})
    assert ends[0]["2"] < ends[0]["0"]
    for mine, one in ((ends[2], ends[0]), (ends[3], ends[1])):
        assert max(relative_errors(mine, one).values()) <= 1e-9


def test_numbers_are_uniform_and_normal() -> None:
    state = torch.ops.tspc.instance(torch.tensor(5), 1)
    at = [torch.arange(40) * 500, torch.arange(500)]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        u = counter.uniform(None, state, at, dtype=dtype)
        assert u.dtype == dtype and float(u.min()) >= 0 and float(u.max()) < 1
        wide = u.double()
        assert float(wide.mean()) == pytest.approx(0.5, abs=0.01)
        assert float(wide.var()) == pytest.approx(1 / 12, rel=0.02)
        z = counter.normal(None, state, at, dtype=dtype).double()
        assert float(z.mean()) == pytest.approx(0, abs=0.03)
        moments = [float((z**k).mean()) for k in (2, 3, 4)]
        assert moments == pytest.approx([1, 0, 3], abs=0.15)
        assert float((z[1:] * z[:-1]).mean()) == pytest.approx(0, abs=0.03)


def trained() -> tuple[float, list[float], list[float]]:
    """Worst error of losses and gradients beside the reference, in fp32 through Inductor; what no
    token had a part in; the losses."""
    rank = torch.distributed.get_rank()
    ends, drawn, losses = [], [], []
    for backend in (reference_backend, "tsp"):
        torch._dynamo.reset()
        model = model_of()
        fn: Any = torch.compile(model, backend=backend)
        torch.manual_seed(7 + (rank if backend == "tsp" else 0))  # the first rank's is taken
        found = {}
        for step in range(2):
            loss, numbers = fn(*inputs(False))
            loss.backward()
            drawn += numbers.tolist() if backend == "tsp" else []
            found[f"loss {step}"] = loss.detach()
        losses = [x.item() for x in found.values()]
        ends.append({**found, **{n: whole(p.grad) for n, p in model.named_parameters()}})
    return max(relative_errors(ends[1], ends[0]).values()), drawn, losses


@pytest.mark.dist
@pytest.mark.wide
def test_inductor_draws_what_one_device_draws(world: Any) -> None:
    (error, drawn, losses), other = world(2).run(trained)
    assert max(error, other[0]) <= 1e-5
    assert (drawn, losses) == other[1:]
    assert len(set(drawn)) == len(drawn) and losses[0] != losses[1]
