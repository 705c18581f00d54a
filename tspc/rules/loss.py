"""Rules of losses (`normalize` has decomposed the cross-entropy)."""

from __future__ import annotations

import torch

from tspc.factors.registry import rule
from tspc.ops import library as ops  # noqa: F401  defines tspc::pick

# the label's logit is in one shard, zero in the others
rule(torch.ops.tspc.pick.default, "... v, ... -> ...", reduce="v")
rule(torch.ops.tspc.in_range.default, "... -> ...")
