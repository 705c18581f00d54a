"""The plain call: parameters become shards, optimizers made before go on, stale
references raise."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from tests.support.group import alone, stored
from tspc.base.errors import ShardedParameterError, UnsupportedError
from tspc.base.options import parse
from tspc.runtime.mesh import resolve
from tspc.runtime.params import convert as module
from tspc.runtime.params.convert import convert, rebind, settle
from tspc.runtime.params.modules import prepare


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 4).double()


def test_an_optimizer_made_before_goes_on() -> None:
    plain, sharded = model(), model()
    x = torch.randn(2, 3, dtype=torch.float64)
    optimizers = [torch.optim.Adam(m.parameters(), 0.1) for m in (plain, sharded)]
    for m, o in zip((plain, sharded), optimizers):
        m(x).square().sum().backward()
        o.step()
        m(x).sum().backward()
    with stored(sharded) as (m, _):
        state = optimizers[1].state[m.weight]
        assert isinstance(state["exp_avg"], DTensor) and not isinstance(state["step"], DTensor)
        assert optimizers[1].param_groups[0]["params"][0] is m.weight
        torch.testing.assert_close(m.weight.grad.full_tensor(), plain.weight.grad)
        for o in optimizers:
            o.step()
        torch.testing.assert_close(m.weight.full_tensor(), plain.weight)


def test_one_that_holds_the_old_ones_is_rebound() -> None:
    sharded = model()
    old = sharded.weight
    with stored(sharded) as (m, _):
        other = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
        other.param_groups[0]["params"] = [old]
        rebind(other)
        assert other.param_groups[0]["params"][0] is m.weight


def test_a_stale_reference_raises() -> None:
    sharded = model()
    old = sharded.weight
    with stored(sharded), pytest.raises(ShardedParameterError, match="take it from module.param"):
        old + 1
    assert repr(old) == "ShardedParameter()"


def test_sparse_adam_is_refused() -> None:
    table = nn.Embedding(4, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters())
    with pytest.raises(UnsupportedError, match="SparseAdam takes sparse gradients"), stored(table):
        pass
    assert optimizer.param_groups


def test_parameters_that_no_graph_took_are_cut_anew() -> None:
    with stored(model()) as (m, _):
        w = m.weight
        settle([(w, w.placements[0])], False)
        settle([(w, Shard(1))], False)  # taken before: stays
        assert w.placements == (Shard(0),)
    with stored(model()) as (m, _):
        w, values = m.weight, m.weight.full_tensor().clone()
        settle([(w, Shard(1)), (m.bias, Replicate())], False)
        assert m.weight is w and w.placements == (Shard(1),)
        assert torch.equal(w.full_tensor(), values)


@pytest.mark.parametrize("ready", [True, False])
def test_a_compile_shards(ready: bool) -> None:
    """What the backend calls for a graph with whole parameters: Dynamo traces again where the
    modules were not ready."""
    m, traced = model(), list[bool]()
    if ready:
        prepare([m])
    with alone():
        place, mesh = resolve(parse(None), torch.device("cpu"))
        assert mesh is not None

        def backend(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
            whole = any(isinstance(x, nn.Parameter) and not isinstance(x, DTensor) for x in inputs)
            traced.append(whole)
            if whole:
                shards = module.store(gm, mesh, place.axis.name, {}, False)
                assert set(shards.values()) == set(m.parameters())
            return gm.forward

        x = torch.randn(2, 3, dtype=torch.float64)
        wanted = m(x).detach()
        fn = torch.compile(m, backend=backend)
        out = fn(x).detach()
        assert torch.equal(out.full_tensor() if isinstance(out, DTensor) else out, wanted)
        fn(x)
        assert traced == ([True] if ready else [True, False])
        assert isinstance(m.weight, DTensor)
        stray = nn.Parameter(torch.ones(3, dtype=torch.float64))
        torch._dynamo.reset()
        with pytest.raises(Exception, match="a parameter that no compiled module owns"):
            torch.compile(lambda y: y * stray, backend=backend)(x)


def test_dims_are_as_asked_for() -> None:
    m = model()
    with alone():
        place, mesh = resolve(parse(None), torch.device("cpu"))
        assert mesh is not None
        convert(m, mesh, place.axis.name, {id(m.weight): 1, id(m.bias): 0})
        assert m.weight.placements == (Shard(1),) and m.bias.placements == (Shard(0),)
