"""Run what a fold's factor does not touch: on this rank's rows, with this rank's own shard.

The rows without the factor are whole in every shard; their gradients add up over the ranks where
shards become stored chunks again. Of the others it makes those of one shard, which nothing reads.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tspc.factors.placement import indices
from tspc.ir.program import Node, Ref, refs_in
from tspc.passes.analyse.fold import Fold
from tspc.passes.analyse.sizes import Sizes
from tspc.passes.lower.run_op import Get, call


def run_apart(n: Node, sizes: Sizes, get: Get) -> list[torch.Tensor]:
    """The values that leave, in order."""
    fold: Fold = n.kwargs["fold"]
    sizes_of_rank = replace(sizes, cut={**sizes.cut, fold.factor: fold.units})
    names = (*fold.tokens, *fold.invariants, *fold.sliced, *map(Ref, fold.weights))
    env = {old: get(new) for old, new in zip(names, refs_in(n.args))}
    for ref in fold.sliced:
        env[ref] = _first_units(fold, ref, env[ref], sizes_of_rank)
    for w, dtype in fold.casts.items():
        env[Ref(w)] = env[Ref(w)].to(dtype)
    for m in fold.body:
        record = fold.records[m.name]
        results = call(m, record.ins, record.outs, sizes_of_rank, lambda r: env[r])
        for item, value in enumerate(results if isinstance(results, (list, tuple)) else [results]):
            env[Ref(m.name, item)] = value
            env.setdefault(Ref(m.name), value)
    return [env[e.ref] for e in fold.exits]


def _first_units(fold: Fold, ref: Ref, x: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """As many units as a shard has: which ones is of no consequence, and so equal on all ranks."""
    for k, d in enumerate(fold.dims[ref]):
        if fold.factor in sizes.factors.leaves(d):
            at = indices(sizes.factors, d, fold.factor, range(fold.units))
            starts = [i for i, a in enumerate(at) if not i or at[i - 1] != a - 1]
            runs = [x.narrow(k, at[i], j - i) for i, j in zip(starts, (*starts[1:], len(at)))]
            x = torch.cat(runs, k)  # no table: a constant would keep the graph out of caches
    return x
