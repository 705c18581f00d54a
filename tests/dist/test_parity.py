"""Real gloo processes through Inductor: losses, gradients and optimizer steps equal one
device's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.support.models import call, loss_of, make, strided, tokens_of, whole
from tspc.backend.simulated import relative_errors

pytestmark = pytest.mark.dist


def steps(model: str, adam: bool) -> float:
    """Worst error of the updates of three clipped steps on DTensors, in float64.

    The optimizer is made before the first call; its parameters are exchanged when the model is
    sharded.
    """
    ends = []
    for tsp in (False, True):
        m = make(model, layers=1)
        start = {n: p.detach().clone() for n, p in m.named_parameters()}
        fn = torch.compile(m, backend="tsp", dynamic=True) if tsp else m
        kind = torch.optim.AdamW if adam else torch.optim.SGD
        optimizer = kind(m.parameters(), lr=1e-2, **({"eps": 1e-5} if adam else {}))
        for i in range(3):
            optimizer.zero_grad()
            loss_of(fn(**call(model, tokens_of(11 + i, seed=i), True))).backward()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            optimizer.step()
        ends.append({n: whole(p.detach()) - start[n] for n, p in m.named_parameters()})
        if tsp:
            assert all(isinstance(p, DTensor) for p in m.parameters())
    return max(relative_errors(ends[1], ends[0]).values())


@pytest.mark.parametrize("model", ["llama_like", "gpt2_like"])
@pytest.mark.parametrize("adam", [False, True])
def test_optimizers_on_shards_equal_one_device(world: Any, model: str, adam: bool) -> None:
    assert max(world(2).run(steps, model=model, adam=adam)) <= 1e-9


def gradients(
    model: str, options: dict, lengths: list[int], heads: int, kv: int, batch: int
) -> float:
    """Worst relative error of losses and gradients in float32 over calls of several lengths.

    The inputs are not contiguous. Without options as a user would; else with all sizes symbolic,
    which compiles less.
    """
    one = make(model, heads, kv, layers=1).float()
    mine = make(model, heads, kv, layers=1).float()
    dynamic = True if options else None
    compiled = torch.compile(mine, backend="tsp", options=options, dynamic=dynamic)
    worst = 0.0
    for length in lengths:
        kwargs = call(model, strided(tokens_of(length, batch)), True)
        ends = []
        for fn, owner in ((one, one), (compiled, mine)):
            owner.zero_grad()
            loss = loss_of(fn(**kwargs))
            loss.backward()
            grads = {n: whole(p.grad) for n, p in owner.named_parameters()}
            ends.append((loss.detach(), grads))
        worst = max(worst, *relative_errors(ends[1][1], ends[0][1]).values())
        worst = max(worst, *relative_errors({"": ends[1][0]}, {"": ends[0][0]}).values())
    return worst


# ranks, model, options, lengths, heads, K/V heads, batch; of 2 tokens only one key is ever scored,
# the gradients of q and k are exactly zero and float32 has nothing to compare but their rounding
CASES = [
    (2, "llama_like", {}, [12, 13], 4, 2, 2),
    (2, "llama_like", {"schedule": "stationary"}, [7, 12], 4, 2, 3),
    (2, "llama_like", {"schedule": "ring", "layout": "contiguous"}, [3, 9], 4, 2, 1),
    (2, "gpt2_like", {"schedule": "ring"}, [3, 10], 4, 4, 3),
    (2, "gpt2_like", {"schedule": "gather"}, [9], 4, 4, 2),
    (2, "hf_qwen3", {"schedule": "broadcast"}, [11, 8], 4, 2, 2),
    (2, "hf_llama", {}, [10], 4, 1, 2),
    (4, "hf_llama", {}, [11], 6, 3, 2),
    (4, "gpt2_like", {"schedule": "gather"}, [9, 3], 6, 6, 2),
    (4, "llama_like", {"schedule": "broadcast"}, [3, 14], 4, 1, 3),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("ranks,model,options,lengths,heads,kv,batch", CASES)
def test_inductor_equals_one_device(
    world: Any,
    ranks: int,
    model: str,
    options: dict,
    lengths: list[int],
    heads: int,
    kv: int,
    batch: int,
) -> None:
    case = {"options": options, "lengths": lengths, "heads": heads, "kv": kv, "batch": batch}
    assert max(world(ranks).run(gradients, model=model, **case)) <= 1e-5
