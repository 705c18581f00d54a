"""What hung on a whole parameter goes over to its shard: hooks, gradients of graphs made before."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

from tests.support.group import stored
from tspc.runtime.params import handover
from tspc.seams.tensors import DisableTorchFunctionSubclass


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 4).double()


def held(p: nn.Parameter) -> int:
    """Bytes; all else that a stale parameter is asked raises."""
    with DisableTorchFunctionSubclass():
        return p.untyped_storage().nbytes()


X = torch.randn(2, 3, dtype=torch.float64)


def test_hooks_and_their_handles_go_over() -> None:
    m, seen = model(), list[str]()
    handle = m.weight.register_hook(lambda g: seen.append(f"hook {type(g).__name__}"))
    m.weight.register_post_accumulate_grad_hook(lambda p: seen.append("after"))
    with stored(m):
        m(X).sum().backward()
        assert seen == ["hook DTensor", "after"]
        handle.remove()
        m(X).sum().backward()
        assert seen == ["hook DTensor", "after", "after"]


def test_gradients_of_a_graph_made_before_arrive_and_memory_goes() -> None:
    m, plain = model(), model()
    loss, other = m(X).square().sum(), plain(X).square().sum()
    old = m.weight
    with stored(m):
        assert handover._READ and held(old) > 0
        loss.backward()
        other.backward()
        assert isinstance(m.weight.grad, DTensor)
        torch.testing.assert_close(m.weight.grad.full_tensor(), plain.weight.grad)
        del loss
        handover.release()
        assert not handover._READ and held(old) == 0


def test_without_a_graph_memory_goes_at_once() -> None:
    m = model()
    old = m.weight
    with stored(m):
        assert held(old) == 0 and not handover._READ


def test_a_whole_gradient_is_cut_like_the_shard() -> None:
    with stored(model()) as (m, place):
        g = torch.randn(4, 3, dtype=torch.float64)
        for grad in (g, g.to_sparse()):
            got = handover.shard_of_gradient(m.weight, grad, place.axis.name)
            assert got.placements == m.weight.placements and torch.equal(got.to_local(), g)
        bias = handover.shard_of_gradient(m.bias, g[:, 0].contiguous(), place.axis.name)
        assert torch.equal(bias.to_local(), g[:, 0])
