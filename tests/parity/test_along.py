"""What runs along the sequence stays cut along it: convolutions in the forms in which they are
written, shifts, running sums; alone, and in blocks of a small model. All equal one device."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import tspc
from tspc.backend.simulated import Simulated, simulated_backend
from tspc.ir.kinds import WHOLE
from tspc.passes.lower.unit import Unit

pytestmark = [pytest.mark.slow, pytest.mark.sampled(3)]

VOCABULARY, WIDTH = 23, 12


def turned(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal, self.into, self.out = (
            causal,
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.into(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(turned(y).flatten(2))


class Model(nn.Module):
    """A mixer under test in a small language model, behind causal attention (the layout is zigzag
    then) or alone."""

    def __init__(self, mixer: nn.Module, attention: bool = False) -> None:
        super().__init__()
        self.embedding, self.mixer = nn.Embedding(VOCABULARY, WIDTH), mixer
        self.attention = Attention(True) if attention else None
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.attention is not None:
            x = x + self.attention(x)
        x = x + self.mixer(x)
        x = F.rms_norm(x + self.down(F.silu(self.up(x))), (WIDTH,))
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Conv(nn.Module):
    """form: what is done with a convolution and [B, C, S]."""

    def __init__(self, form: Callable[[nn.Conv1d, Tensor], Tensor], size: int = 4, **given) -> None:
        super().__init__()
        self.form, self.conv = form, nn.Conv1d(WIDTH, WIDTH, size, **given)

    def forward(self, x: Tensor) -> Tensor:
        return turned(self.form(self.conv, turned(x))).tanh()


class Does(nn.Module):
    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)


def plain(conv: nn.Conv1d, x: Tensor) -> Tensor:
    return conv(x)


def sliced(conv: nn.Conv1d, x: Tensor) -> Tensor:
    return conv(x)[..., : x.shape[-1]]


def shortened(conv: nn.Conv1d, x: Tensor) -> Tensor:
    return conv(x)[:, :, : -conv.padding[0]]


def padded(conv: nn.Conv1d, x: Tensor) -> Tensor:
    return conv(F.pad(x, (conv.dilation[0] * (conv.kernel_size[0] - 1), 0)))


def flat(fn: Callable[[Tensor], Tensor], first: int, last: int) -> nn.Module:
    return Does(lambda x: fn(x.flatten(first, last)).view(x.shape))


def after_zeros(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :2]), x[:, :-2]], 1)


MIXERS: dict[str, Callable[[], nn.Module]] = {
    "same": lambda: Conv(plain, 5, padding=2),
    "same_dilated": lambda: Conv(plain, 3, padding="same", dilation=3, bias=False),
    "sliced": lambda: Conv(sliced, padding=3, groups=WIDTH),
    "shortened": lambda: Conv(shortened, padding=3, groups=3),
    "padded": lambda: Conv(padded, dilation=2),
    "padded_long": lambda: Conv(padded, 9, groups=WIDTH, bias=False),
    "one_row": lambda: Conv(plain, 1),
    "cumsum_over_the_batch": lambda: flat(lambda x: x.cumsum(0), 0, 1),
    "cumsum_of_all": lambda: flat(lambda x: x.cumsum(0).tanh(), 0, 2),
    "roll": lambda: Does(lambda x: x.roll((-5, 2), (1, 2))),
    "roll_over_the_batch": lambda: flat(lambda x: x.roll(3, 0), 0, 1),
    "flip": lambda: Does(lambda x: x.flip(1, 2)),
    "flip_of_all": lambda: flat(lambda x: x.flip(0), 0, 2),
    "after_zeros": lambda: Does(after_zeros),
    "moved_elements": lambda: flat(lambda x: F.pad(x, (-7, 7)), 1, 2),
}
SIZES = ((2, 12), (3, 13), (4, 3))  # (ranks, length): divides, has pads, is shorter


def run(model: nn.Module, ranks: int, length: int, batch: int = 2) -> Unit:
    """Verified against one device; nothing runs replicated, no float of the sequence is whole."""
    tokens = torch.randint(0, VOCABULARY, (batch, length))
    (graph,) = tspc.verify(model.double(), (tokens,), {}, ranks, {}, 1e-9).graphs
    rewritten = graph.rewritten
    assert not rewritten.typed.fallbacks
    gathered = [n for n in rewritten.typed.program.nodes if n.op == WHOLE]
    assert not gathered
    return rewritten


@pytest.mark.parametrize("name,case", list(zip(MIXERS, itertools.cycle(range(6)))))
def test_equals_one_device(name: str, case: int) -> None:
    torch.manual_seed(0)
    attention = bool(case % 2)
    rewritten = run(Model(MIXERS[name](), attention), *SIZES[case // 2])
    assert list(rewritten.choice.leaves.values()) == ["zigzag" if attention else "contiguous"]


class Conformer(nn.Module):
    """Attention both ways, then a gated convolution between two of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = Attention(False), nn.LayerNorm(WIDTH)
        self.into, self.out = nn.Conv1d(WIDTH, 2 * WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 1)
        self.deep = nn.Conv1d(WIDTH, WIDTH, 5, padding=2, groups=WIDTH)
        self.inner = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        y = self.deep(F.glu(self.into(turned(self.norm(x))), 1))
        return x + turned(self.out(F.silu(turned(self.inner(turned(y))))))


class Hyena(nn.Module):
    """A short convolution of three projections, gates around a convolution longer than a chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.short = nn.Conv1d(3 * WIDTH, 3 * WIDTH, 3, groups=3 * WIDTH, padding=2)
        self.filter = nn.Parameter(torch.randn(WIDTH, 1, 9) / 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b, v = self.short(turned(self.into(x)))[..., : x.shape[1]].chunk(3, 1)
        y = F.conv1d(F.pad(a * v, (8, 0)), self.filter, groups=WIDTH)
        return self.out(turned(y * b))


class Shifted(nn.Module):
    """Each token mixed with the one before, a mean over all before that is weighed by keys."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.mix = nn.Parameter(torch.rand(3, WIDTH))
        self.r, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        r, k, v = (x * m + self.shift(x) * (1 - m) for m in self.mix)
        weight = self.k(k).tanh().exp()
        mean = (weight * self.v(v)).cumsum(1) / weight.cumsum(1)
        return self.out(self.r(r).sigmoid() * mean)


@pytest.mark.parametrize(
    "block,attention,ranks,length",
    [(Conformer, False, 2, 7), (Hyena, True, 4, 13), (Shifted, False, 3, 13)],
)
def test_blocks(block: type[nn.Module], attention: bool, ranks: int, length: int) -> None:
    torch.manual_seed(0)
    folds = {n.kwargs["fold"].name for n in run(Model(block(), attention), ranks, length).folds}
    assert {"head", "attention" if attention else "head"} <= folds


def test_products_of_one_row_fold() -> None:
    torch.manual_seed(0)
    model = Model(Does(lambda x: x))
    model.up, model.down = nn.Conv1d(WIDTH, 20, 1), nn.Conv1d(20, WIDTH, 1)  # type: ignore[assignment]
    up, down = model.up.forward, model.down.forward
    model.up.forward = lambda x: up(turned(x))  # type: ignore[method-assign]
    model.down.forward = lambda x: turned(down(x))  # type: ignore[method-assign]
    folds = [n.kwargs["fold"] for n in run(model, 3, 13).folds]
    assert {"up.weight", "down.weight"} in [set(f.weights) for f in folds]


def test_one_graph_serves_lengths_below_the_reach() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, made = Model(Hyena(), True).double(), list[Simulated]()
    fn = torch.compile(model, backend=simulated_backend(3, None, made), dynamic=True)
    for length in (40, 3):
        tokens = torch.randint(0, VOCABULARY, (2, length))
        torch.testing.assert_close(fn(tokens), model(tokens), rtol=1e-9, atol=0)
    assert len(made) == 1


@pytest.mark.parametrize(
    "form,given,op",
    [
        (
            lambda c, x: c(x).repeat_interleave(2, 2)[..., : x.shape[2]],
            {"stride": 2, "padding": 3},
            "conv1d",
        ),
        (lambda c, x: c(F.pad(x, (3, 0), "reflect")), {}, "pad"),
        (lambda c, x: c(F.pad(x, (3, 0), value=1.0)), {}, "conv1d"),
    ],
)
def test_other_forms_run_whole(form: Callable, given: dict, op: str) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (2, 13))
    model = Model(Conv(form, **given)).double()
    (graph,) = tspc.verify(model, (tokens,), {}, 3, {}, 1e-9).graphs
    assert op in {f.op.split(".")[1] for f in graph.rewritten.typed.fallbacks}
