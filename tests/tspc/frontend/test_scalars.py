"""Python floats that change from call to call: one graph for all values where torch.compile has
one, exact values and gradients on simulated ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from tspc.backend.simulated import Simulated, relative_errors, simulated_backend
from tspc.frontend import scalars


class Base(nn.Module):
    """A table, an MLP, a head; `t` is a float of the module that changes too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)
        self.t = 1.0

    def mlp(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.narrow(F.gelu(self.wide(x) * scale))

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mlp(self.table(ids)))


class Weights(Base):
    """An annealed weight of a loss, a temperature, an average over a length; in a region, in a
    checkpoint and in autocast; arithmetic of two floats."""

    def forward(self, ids: torch.Tensor, w: float) -> torch.Tensor:
        x = self.table(ids)
        x = x + self.mlp(x, w) * self.t + self.t * w
        x = x + torch.utils.checkpoint.checkpoint(self.mlp, x, w, use_reentrant=False)
        z = self.head(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = (x * w).sum() / ids.shape[1]
        loss = F.cross_entropy((z / w).flatten(0, 1), ids.flatten())
        return loss + w * z.square().mean() + (w * 2 + self.t**2) * z.mean() + low * (w / 3)


class Numbers(Base):
    """Bounds, fills, powers, comparisons, `alpha`, a float first."""

    def forward(self, ids: torch.Tensor, w: float) -> torch.Tensor:
        z = self.logits(ids)
        with torch.no_grad():
            k = z.softmax(-1) ** w
        total = z.clamp(-w, w).mean() + z.clamp(max=w).sum() + (z * k).sum() + (ids * w).sum()
        total = total + torch.where(z > w, z, w).mean() + z.masked_fill(z < 0, w).mean()
        total = total + torch.add(z, z, alpha=w).square().mean() + torch.lerp(z, z * z, w).mean()
        return (
            total + (w - z).square().mean() + (w / (z * z + 1)).mean() + torch.full((3,), w).sum()
        )


class Branch(Base):
    def forward(self, ids: torch.Tensor, w: float) -> torch.Tensor:
        z = self.logits(ids) * w
        return z.square().mean() if w > 0.6 else z.exp().mean()


class Fixed(Base):
    """A size: a graph for each value, as in torch.compile."""

    def forward(self, ids: torch.Tensor, w: float) -> torch.Tensor:
        return self.logits(ids)[:, : int(w * 8)].square().mean() * w


# how many graphs four values make; the first call's is of one value
CASES = [(Weights, 2), (Numbers, 2), (Branch, 3), (Fixed, 4)]


@pytest.mark.parametrize(("kind", "graphs"), CASES)
def test_floats_stay_symbols(kind: type[Base], graphs: int) -> None:
    ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = kind().double()
    made: list[Simulated] = []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=simulated_backend(2, graphs=made))
    for k, w in enumerate((0.3, 0.5, 0.75, 0.9)):
        model.t = 1 - k / 10
        ends = []
        for fn in (compiled, model):
            model.zero_grad()
            loss: Any = fn(ids, w)
            loss.backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            ends.append({"loss": loss.detach(), **grads})
        assert max(relative_errors(*ends).values()) <= 1e-9
        assert ends[0]["loss"].dtype == ends[1]["loss"].dtype
    assert len(made) == graphs
    assert all(g.rewritten.folds for g in made)


class Halves(Base):
    def forward(self, ids: torch.Tensor, w: float) -> tuple[torch.Tensor, ...]:
        z = self.logits(ids).bfloat16()
        return z * w, z.mean() * w, z > w, (z + w).float(), torch.ones_like(ids) * w


def test_types_are_those_of_numbers() -> None:
    """A float widens no half, and makes an integer the default type."""
    ids, model = torch.randint(0, 64, (2, 8)), Halves()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=simulated_backend(2))
    with torch.no_grad():
        for w in (0.3, 0.7):
            mine, one = compiled(ids, w), model(ids, w)
        assert [x.dtype for x in mine] == [x.dtype for x in one]
        # float32 products are summed in another order before they are halved
        assert all(torch.allclose(a.float(), b.float(), atol=2e-2) for a, b in zip(mine, one))


def test_a_graph_without_floats_is_itself() -> None:
    g = torch.fx.Graph()
    g.output(g.call_function(torch.tanh, (g.placeholder("x"),)))
    gm = torch.fx.GraphModule({}, g)
    nodes = [*gm.graph.nodes]
    scalars.as_tensors(gm)
    scalars.fixed_inside(gm)
    assert [*gm.graph.nodes] == nodes
    assert not any(scalars._floats(n) for n in gm.graph.nodes)
    assert scalars._fixed(3) == 3
