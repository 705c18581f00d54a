"""Real gloo processes: half precision, outputs, plans, evaluation, weights that come from rank
0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import tspc
from tests.support.models import call, loss_of, make, tokens_of, whole
from tspc.backend.simulated import relative_errors
from tspc.base.options import parse
from tspc.runtime.call.deferred import DeferredTensor
from tspc.runtime.mesh import resolve
from tspc.runtime.params.convert import convert

pytestmark = pytest.mark.dist


def half(model: str) -> tuple[float, float]:
    """Error of bfloat16 gradients against float32: (one device's, ours), over all parameters."""
    kwargs = call(model, tokens_of(24), True)
    ends = []
    for kind, tsp in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        m = make(model).to(kind)
        fn = torch.compile(m, backend="tsp", options={"schedule": "broadcast"}) if tsp else m
        loss_of(fn(**kwargs)).backward()
        ends.append(torch.cat([whole(p.grad).float().reshape(-1) for p in m.parameters()]))
    scale = ends[0].norm()
    return float((ends[1] - ends[0]).norm() / scale), float((ends[2] - ends[0]).norm() / scale)


@pytest.mark.wide
@pytest.mark.parametrize("model", ["llama_like", "hf_qwen3"])
def test_bfloat16_is_as_exact_as_on_one_device(world: Any, model: str) -> None:
    for one, mine in world(2).run(half, model=model):
        assert mine <= 1.5 * one + 2e-3


def outputs() -> tuple[bool, float, bool]:
    """Logits beside a loss are deferred, equal when read, and not differentiable."""
    m = make("hf_llama").float()
    tokens = tokens_of(9)
    expected = m(tokens, labels=tokens).logits.detach()
    fn = torch.compile(m, backend="tsp", options={"compiler": "eager"})
    logits = fn(tokens, labels=tokens).logits
    deferred = isinstance(logits, DeferredTensor)
    error = float((logits.detach() + 0 - expected).norm() / expected.norm())
    try:
        (logits * 2).sum().backward()
    except tspc.UnsupportedError as e:
        return deferred, error, "outputs" in str(e)
    return deferred, error, False


def test_outputs_beside_a_loss_are_deferred(world: Any) -> None:
    for deferred, error, told in world(2).run(outputs):
        assert deferred and error < 1e-5 and told


def stale() -> str:
    m = make("llama_like").float()
    reference = m.head.weight
    fn = torch.compile(m, backend="tsp", options={"compiler": "eager"})
    fn(tokens_of(8))
    try:
        reference + 1
    except tspc.ShardedParameterError as e:
        return str(e)
    return ""


def test_a_stale_parameter_is_told(world: Any) -> None:
    assert all("module.parameters()" in text for text in world(2).run(stale))


def explained() -> str:
    m = make("hf_qwen3").float()
    fn = torch.compile(m, backend="tsp", options={"compiler": "eager", "schedule": "broadcast"})
    tokens = tokens_of(9)
    fn(tokens, labels=tokens)
    return tspc.explain(fn)


def test_explain_names_the_folds(world: Any) -> None:
    for text in world(2).run(explained):
        assert text.count("fold[broadcast]") == 5
        assert "{model.layers.1.self_attn}" in text and "modeling_qwen3.py:" in text


def planned() -> tuple[int, float]:
    """A plan made without running, applied before the first call."""
    m = make("gpt2_like").float()
    tokens = tokens_of(9)
    expected = m(tokens, tokens).detach()
    plan = tspc.plan(m, (tokens, tokens), ranks=dist.get_world_size())
    plan.apply(m)
    local = sum(p.to_local().numel() for p in m.parameters())
    fn = torch.compile(m, backend="tsp", options={"compiler": "eager"})
    return local, float((fn(tokens, tokens) - expected).abs())


def test_a_plan_applies(world: Any) -> None:
    total = sum(p.numel() for p in make("gpt2_like").parameters())
    for local, error in world(2).run(planned):
        assert local < 0.6 * total and error < 1e-5


def evaluated() -> tuple[float, float]:
    """Without gradients, and training again: relative errors of the logits and of the loss."""
    m = make("llama_like").float()
    tokens = tokens_of(11)
    logits, loss = m(tokens).detach(), m(tokens, tokens).detach()
    fn = torch.compile(m, backend="tsp", options={"compiler": "eager"})
    with torch.no_grad():
        first = float((fn(tokens) - logits).norm() / logits.norm())
    again = fn(tokens, tokens)
    again.backward()
    return first, float((again.detach() - loss).abs() / loss)


def test_evaluation_without_gradients(world: Any) -> None:
    for errors in world(2).run(evaluated):
        assert max(errors) < 1e-5


def seeded() -> dict[str, tuple[float, float]]:
    """(rank 0's sum before, the sum after sharding) of each parameter and buffer, when every rank
    had drawn others."""
    m = make("llama_like", seed=dist.get_rank()).float()
    m.frequencies.mul_(1 + dist.get_rank())
    before = {n: float(x.detach().sum()) for n, x in m.state_dict().items()}
    first = [before]
    dist.broadcast_object_list(first)
    fn = torch.compile(m, backend="tsp", options={"compiler": "eager"})
    fn(tokens_of(8))
    kept = dict(m.named_parameters()) | dict(m.named_buffers())
    return {n: (s, float(whole(kept[n].detach()).sum())) for n, s in first[0].items()}


def test_weights_and_buffers_come_from_rank_0(world: Any) -> None:
    for sums in world(2).run(seeded):
        assert len(sums) > 10 and "frequencies" in sums
        for name, (first, mine) in sums.items():
            assert mine == pytest.approx(first, rel=1e-5, abs=1e-5), name


def stored_otherwise() -> tuple[float, list[str]]:
    """Worst error of gradients when every matrix is stored along the dim that its graph does not
    cut, and how the parameters are stored afterwards."""
    one, m = (make("gpt2_like", layers=1) for _ in range(2))
    tokens = tokens_of(9)
    one(tokens, tokens).backward()
    plan = tspc.plan(m, (tokens, tokens), ranks=dist.get_world_size())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    place, _ = resolve(parse({"mesh": mesh}), torch.device("cpu"))
    dims = {id(p): 1 - (plan.dims()[n] or 0) for n, p in m.named_parameters() if p.dim() == 2}
    convert(m, mesh, place.axis.name, dims)
    before = [str(p.placements) for p in m.parameters()]
    torch.compile(m, backend="tsp", options={"compiler": "eager", "mesh": mesh})(
        tokens, tokens
    ).backward()
    assert before == [str(p.grad.placements) for p in m.parameters()]
    wanted = {n: p.grad for n, p in one.named_parameters()}
    return max(
        relative_errors({n: whole(p.grad) for n, p in m.named_parameters()}, wanted).values()
    ), before


def test_weights_stored_along_another_dim(world: Any) -> None:
    for error, placements in world(2).run(stored_otherwise):
        assert error < 1e-12
        assert any("dim=1" in p for p in placements) and any("dim=0" in p for p in placements)


class Broken(torch.nn.Module):
    """A first graph that takes nothing of the model that is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make("gpt2_like", layers=1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = (tokens + 1) % 100
        scale = self.model.norm.weight.sum()
        torch._dynamo.graph_break()
        return self.model(tokens, tokens) * scale


def broken() -> tuple[float, bool, list[Any]]:
    """Worst error of gradients; whether each is stored as a plan of the whole says; how often a
    graph was traced, after one call and after two."""
    one, m = Broken(), Broken()
    tokens = tokens_of(9)
    one(tokens).backward()
    plan = tspc.plan(m.model, (tokens, tokens), ranks=dist.get_world_size())
    optimizer = torch.optim.SGD(m.parameters(), lr=0.0)
    fn = torch.compile(m, backend="tsp", options={"compiler": "eager"})
    fn(tokens).backward()
    stored = {n: p.placements[0] for n, p in m.model.named_parameters()}
    wanted = {n: Replicate() if d is None else Shard(d) for n, d in plan.dims().items()}
    as_planned = all(stored[n] == p for n, p in wanted.items())
    optimizer.step()
    counts = [counters["stats"]["unique_graphs"]]
    fn(tokens)
    grads = {n: p.grad for n, p in one.named_parameters()}
    mine = {n: whole(p.grad) for n, p in m.named_parameters()}
    counts.append(counters["stats"]["unique_graphs"])
    return max(relative_errors(mine, grads).values()), as_planned, counts


def test_a_later_graph_says_how_its_weights_are_stored(world: Any) -> None:
    for error, as_planned, (first, second) in world(2).run(broken):
        assert error < 1e-12 and as_planned and first == second


def test_world_reports_errors(world: Any) -> None:
    with pytest.raises(RuntimeError, match="rank 0: KeyError: 'none'"):
        world(2).run(half, model="none")
