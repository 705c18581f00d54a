"""What a fold costs under each schedule: elements moved, FLOPs, transient memory, and from these
the time of a training step.

Closed forms (docs/design.md, "Cost model") over a body's shapes, f = (D-1)/D included; with sympy
sizes they are sympy expressions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy

from tspc.base.hardware import Hardware
from tspc.ir.body import Body, evaluate, numel, symbol_values
from tspc.ir.program import Size

RING, BROADCAST, GATHER, STATIONARY = "ring", "broadcast", "gather", "stationary"
SAME = 1.03  # times that differ by less are a tie; ties go to the least transient memory
Quantity = float | sympy.Expr
KEPT = 4096  # sizes of calls whose schedule is kept


@dataclass(frozen=True)
class Cost:
    """Of one rank, elements on average over the ranks.

    exposed: moved while nothing is computed. behind: moved behind the steps' computation, all steps
    together. calls: communications that are waited for. flops: of matrix products and attention.
    calls_behind: communications of the steps, hidden as far as moving is.
    """

    exposed: Quantity
    behind: Quantity
    calls: Quantity
    flops: Quantity
    calls_behind: Quantity = 0

    @property
    def elements(self) -> Quantity:
        """All that moves."""
        return self.exposed + self.behind

    def seconds(self, on: Hardware, itemsize: int) -> Quantity:
        """Steps overlap: the greater of computing and moving, then what is exposed."""
        computing = self.flops * itemsize / 2 / on.flops
        moving = self.behind * itemsize / on.bandwidth
        calls = self.calls + (1 - on.overlap) * self.calls_behind
        exposed = self.exposed * itemsize / on.bandwidth + calls * on.latency
        exposed += (1 - on.overlap) * moving
        return sympy.Max(computing, on.overlap * moving) + exposed


@dataclass(frozen=True)
class Sizes:
    """Elements of a region, whole: weights (pads and duplicates included), tokens with a gradient,
    summed outputs, K and V, what the pieces of one shard make inside.

    flops: of one forward on all ranks together.
    """

    weights: Quantity
    tokens: Quantity
    sums: Quantity
    keys: Quantity
    inner: Quantity
    flops: Quantity
    steps: int
    saved: bool


def sizes(body: Body, symbols: Mapping[sympy.Symbol, Size], *rows: Size) -> Sizes:
    """rows: of all ranks together, each sequence with its pads."""
    values = symbol_values(body, [symbols[s] for s in body.symbols], rows)
    steps = body.real_steps()

    def total(names: list[str]) -> Size:
        return sum((numel(body.values[n].shape, values) for n in names), 0)

    keys = flops = 0
    for a in body.attentions:
        q, k, v = a.operands.q, a.operands.k, a.operands.v
        once = k in {t.name for t in body.tokens}
        keys += total([k, v]) * (1 if once else steps)
        width = body.values[k].shape[-1] + body.values[v].shape[-1]
        flops += 2 * numel(body.values[q].shape[:-1], values) * rows[a.keys] * width * steps
        flops = flops / 2 if a.spec.causal else flops
    flops += evaluate(body.flops, values) * steps
    live = [t.name for t in body.tokens if body.values[t.name].requires_grad]
    return Sizes(
        body.weight_elements * body.ranks,
        total(live),
        total([o.name for o in body.outs if o.kind == "sum"]),
        keys,
        evaluate(body.inner, values),
        flops,
        steps,
        any(p.saves for p in body.pieces),
    )


def forward(s: Sizes, schedule: str, ranks: int) -> Cost:
    """Elements moved: ring and broadcast w (+ k), stationary n in and n out (docs/design.md, "Cost
    model")."""
    f = sympy.Rational(ranks - 1, ranks)
    flops, waits = s.flops / ranks, s.steps if s.keys != 0 else 0
    if schedule == STATIONARY:
        return Cost(f * (s.tokens + s.sums), 0, 2, flops)
    if schedule == GATHER:
        return Cost(f * (s.weights + s.keys), 0, 1 + waits, flops)
    return Cost(f * s.keys, f * s.weights, 1 + waits, flops, ranks - 1)


def backward(s: Sizes, schedule: str, ranks: int) -> Cost:
    """Tokens and cotangents come in and gradients go out (3n), or weights come and go (2w).

    What the forward saved is not computed again.
    """
    f = sympy.Rational(ranks - 1, ranks)
    flops, waits = (2 if s.saved else 3) * s.flops / ranks, 2 * s.steps if s.keys != 0 else 0
    if schedule == STATIONARY:
        return Cost(f * (2 * s.tokens + s.sums), 0, 3, flops)
    if schedule == GATHER:
        return Cost(2 * f * (s.weights + s.keys), 0, 2 + waits, flops)
    moved = s.weights if schedule == RING else f * s.weights  # the gradient goes home, one hop more
    return Cost(2 * f * s.keys, f * s.weights + moved, 2 + waits, flops, 2 * (ranks - 1))


def transient(s: Sizes, schedule: str, ranks: int) -> Quantity:
    """Elements beside storage and saved values at the worst time, the gradients of all included."""
    if schedule == STATIONARY:
        return 2 * (s.tokens + s.sums + s.keys / ranks + s.inner)
    within = 2 * (s.keys / s.steps + s.inner / ranks)
    if schedule == GATHER:
        return 2 * s.weights + within
    return 4 * s.weights / ranks + within  # two shards and two gradients in flight


def folded(body: Body) -> str:
    """The published schedule: broadcast where something is exchanged inside, else ring."""
    return BROADCAST if body.attentions else RING


def seconds(body: Body, values: Sequence[int], *rows: int) -> dict[str, float]:
    """Schedule -> time of a training step by the model, of those that "auto" chooses from."""
    s = sizes(body, dict(zip(body.symbols, values)), *rows)
    itemsize = body.values[body.shards[0]].dtype.itemsize
    return {
        name: float(
            sum(
                way(s, name, body.ranks).seconds(body.hardware, itemsize)
                for way in (forward, backward)
            )
        )
        for name in (folded(body), STATIONARY)
    }


def fastest(body: Body, values: tuple[int, ...], *rows: int) -> str:
    """The schedule of least time for a training step; of those within 3% the one of least transient
    memory.

    values: of body.symbols. rows: of all ranks together. Rank-independent sizes only.
    """
    cache = body.compiled.setdefault("fastest", {})  # with the body: nothing else holds it
    key = values, rows
    if key not in cache:
        if len(cache) >= KEPT:
            cache.clear()
        cache[key] = _fastest(body, values, *rows)
    return cache[key]


def _fastest(body: Body, values: tuple[int, ...], *rows: int) -> str:
    s = sizes(body, dict(zip(body.symbols, values)), *rows)
    times = seconds(body, values, *rows)
    least = min(times.values())
    close = [n for n, t in times.items() if t <= SAME * least]
    return min(close, key=lambda n: float(transient(s, n, body.ranks)))
