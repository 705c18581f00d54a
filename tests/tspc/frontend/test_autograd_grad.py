"""Which parameters have a gradient, by Dynamo's trace."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from tspc.frontend.autograd_grad import reached


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.kept, self.cut = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> Any:
        h = checkpoint(self.kept, self.used(x), use_reentrant=False)
        with torch.no_grad():
            scale = self.cut(h)
        return (self.frozen(h) * scale).sum(), self.cut(x)


def test_reached() -> None:
    found = {}

    def backend(gm: torch.fx.GraphModule, given: Any) -> Any:
        names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
        for outputs in ((0,), (0, 1), ()):
            found[outputs] = {names[i].split("_modules_")[-1][:4] for i in reached(gm, outputs)}
        return gm

    torch.compile(Model(), backend=backend)(torch.randn(2, 4))
    assert found == {(0,): {"used", "kept"}, (0, 1): {"used", "kept", "cut_"}, (): set()}
