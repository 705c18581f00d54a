"""Real gloo processes: training equals one device, lengths do not recompile, ranks that differ are
told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from tspc.runtime.deferred import DeferredTensor
from tspc.runtime.drivers import record

import tspc
from tests.models import VOCABULARY, call, make
from tests.world import World
from tspc.check import relative_errors
from tspc.errors import RankMismatchError

pytestmark = pytest.mark.dist


def _tokens(length: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def _loss(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out.loss


def _whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(
    model: str, dtype: str, options: dict, lengths: list[int], heads: int = 4, kv: int = 2
) -> float:
    """Worst relative error of losses and gradients over calls of several lengths."""
    one = make(model, heads, kv).to(getattr(torch, dtype))
    mine = make(model, heads, kv).to(getattr(torch, dtype))
    compiled = torch.compile(mine, backend="tsp", options=options)
    worst = 0.0
    for length in lengths:
        kwargs = call(model, _tokens(length), True)
        ends = []
        for fn, owner in ((one, one), (compiled, mine)):
            owner.zero_grad()
            loss = _loss(fn(**kwargs))
            loss.backward()
            grads = {n: _whole(p.grad) for n, p in owner.named_parameters()}
            ends.append((loss.detach(), grads))
        worst = max(worst, *relative_errors(ends[1][1], ends[0][1]).values())
        worst = max(worst, *relative_errors({"": ends[1][0]}, {"": ends[0][0]}).values())
    return worst


CASES = [
    (2, "llama_like", {}, [12, 13], 4, 2),
    (2, "gpt2_like", {"schedule": "ring"}, [10, 7], 4, 4),
    (2, "hf_qwen3", {"schedule": "broadcast"}, [12], 4, 2),
    (4, "hf_llama", {}, [16, 11], 6, 3),
    (4, "gpt2_like", {"schedule": "gather"}, [9], 6, 6),
]


@pytest.mark.parametrize("ranks,model,options,lengths,heads,kv", CASES)
def test_inductor_equals_one_device(
    world: Any, ranks: int, model: str, options: dict, lengths: list[int], heads: int, kv: int
) -> None:
    found = world(ranks).run(
        gradients,
        model=model,
        dtype="float32",
        options=options,
        lengths=lengths,
        heads=heads,
        kv=kv,
    )
    assert max(found) <= 1e-5


def half(model: str) -> tuple[float, float]:
    """Error of bfloat16 gradients against float32: (one device's, ours), over all parameters."""
    kwargs = call(model, _tokens(24), True)
    ends = []
    for kind, tsp in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        m = make(model).to(kind)
        fn = torch.compile(m, backend="tsp", options={"schedule": "broadcast"}) if tsp else m
        _loss(fn(**kwargs)).backward()
        ends.append(torch.cat([_whole(p.grad).float().reshape(-1) for p in m.parameters()]))
    scale = ends[0].norm()
    return float((ends[1] - ends[0]).norm() / scale), float((ends[2] - ends[0]).norm() / scale)


@pytest.mark.parametrize("model", ["llama_like", "hf_qwen3"])
def test_bfloat16_is_as_exact_as_on_one_device(world: Any, model: str) -> None:
    for one, mine in world(2).run(half, model=model):
        assert mine <= 1.5 * one + 2e-3


def steps(model: str, adam: bool) -> float:
    """Worst error of the updates of three clipped steps on DTensors, in float64.

    The optimizer is made before the first call; its parameters are exchanged when the model is
    sharded.
    """
    ends = []
    for tsp in (False, True):
        m = make(model)
        start = {n: p.detach().clone() for n, p in m.named_parameters()}
        fn = torch.compile(m, backend="tsp", options={"compiler": "eager"}) if tsp else m
        kind = torch.optim.AdamW if adam else torch.optim.SGD
        optimizer = kind(m.parameters(), lr=1e-2, **({"eps": 1e-5} if adam else {}))
        for i in range(3):
            optimizer.zero_grad()
            _loss(fn(**call(model, _tokens(11 + i, seed=i), True))).backward()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            optimizer.step()
        ends.append({n: _whole(p.detach()) - start[n] for n, p in m.named_parameters()})
        if tsp:
            assert all(isinstance(p, DTensor) for p in m.parameters())
    return max(relative_errors(ends[1], ends[0]).values())


@pytest.mark.parametrize("model", ["llama_like", "gpt2_like"])
@pytest.mark.parametrize("adam", [False, True])
def test_optimizers_on_shards_equal_one_device(world: Any, model: str, adam: bool) -> None:
    assert max(world(2).run(steps, model=model, adam=adam)) <= 1e-9


def compiles(model: str, lengths: list[int]) -> list[int]:
    """How many graphs the backend has compiled after each length."""
    m = make(model).float()
    graphs = []
    from tspc.backend import tsp

    def backend(gm: Any, inputs: Any) -> Any:
        made = tsp(gm, inputs, options={"compiler": "eager"})
        graphs.append(gm)
        return made

    fn = torch.compile(m, backend=backend)
    out = []
    for length in lengths:
        _loss(fn(**call(model, _tokens(length), True))).backward()
        out.append(len(graphs))
    return out


def test_twelve_lengths_compile_twice(world: Any) -> None:
    lengths = [16, 9, 2, 3, 64, 31, 5, 100, 12, 7, 48, 33]
    for counts in world(2).run(compiles, model="hf_llama", lengths=lengths):
        assert counts[1] <= 2 and counts[-1] == counts[1]


def traffic(model: str, length: int) -> list[tuple]:
    """What this rank issued in one step under Inductor, second call."""
    m = make(model).float()
    fn = torch.compile(m, backend="tsp", options={"schedule": "broadcast"})
    for _ in range(2):
        with record() as sent:
            _loss(fn(**call(model, _tokens(length), True))).backward()
    return [(s.kind, s.link, s.shape, str(s.dtype)) for s in sent]


def test_ranks_issue_the_same_communications(world: Any) -> None:
    first, *others = world(2).run(traffic, model="hf_qwen3", length=12)
    assert len(first) > 20
    assert all(o == first for o in others)


def outputs() -> tuple[bool, float, bool]:
    """Logits beside a loss are deferred, equal when read, and not differentiable."""
    m = make("hf_llama").float()
    tokens = _tokens(9)
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


def other_tokens() -> str:
    m = make("llama_like").float()
    fn = torch.compile(m, backend="tsp", options={"compiler": "eager"})
    try:
        fn(_tokens(8, seed=dist.get_rank()))
    except RankMismatchError as e:
        return str(e)
    return ""


def test_ranks_with_other_tokens_are_told(world: Any) -> None:
    assert all("sampler" in text for text in world(2).run(other_tokens))


def stale() -> str:
    m = make("llama_like").float()
    reference = m.head.weight
    fn = torch.compile(m, backend="tsp", options={"compiler": "eager"})
    fn(_tokens(8))
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
    tokens = _tokens(9)
    fn(tokens, labels=tokens)
    return tspc.explain(fn)


def test_explain_names_the_folds(world: Any) -> None:
    for text in world(2).run(explained):
        assert text.count("fold[broadcast]") == 5
        assert "{model.layers.1.self_attn}" in text and "modeling_qwen3.py:" in text


def planned() -> tuple[int, float]:
    """A plan made without running, applied before the first call."""
    m = make("gpt2_like").float()
    tokens = _tokens(9)
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
    tokens = _tokens(11)
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


def wrong_mesh() -> list[str]:
    """What a mesh or plan that does not fit is told."""
    from torch.distributed.device_mesh import init_device_mesh

    ranks = dist.get_world_size()
    flat = init_device_mesh("cpu", (ranks,), mesh_dim_names=("x",))
    other = tspc.plan(make("llama_like").float(), (_tokens(8),), ranks=ranks + 1)
    said = []
    for options in ({"mesh": flat, "axis": "tsp"}, {"plan": other}):
        fn = torch.compile(make("llama_like").float(), backend="tsp", options=options)
        try:
            fn(_tokens(8))
        except Exception as e:
            said.append(str(e))
    return said


def test_a_mesh_or_plan_that_does_not_fit(world: Any) -> None:
    for mesh, plan in world(2).run(wrong_mesh):
        assert "the mesh has no axis 'tsp'; its axes are x" in mesh
        assert "the plan is for 3 ranks, the axis has 2" in plan


def test_world_reports_errors() -> None:
    small = World(1)
    with pytest.raises(RuntimeError, match="rank 0"):
        small.run(gradients, model="none", dtype="float32", options={}, lengths=[4])
    small.close()
