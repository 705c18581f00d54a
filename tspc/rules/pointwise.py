"""Rules of ops that work element by element, where torch does not tag them so."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tspc.factors.factor import Dims
from tspc.factors.notation import Op, pointwise
from tspc.factors.registry import computed

aten = torch.ops.aten

computed(
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.contiguous.default,
    aten.clone.default,
    aten.dropout.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.type_as.default,
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten._to_copy.default,
    aten.copy.default,
    aten.log_sigmoid.default,
)(pointwise)


@computed(
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
)
def same(op: Op) -> Sequence[Dims]:
    return [list(op.ins[0])]
