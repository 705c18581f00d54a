"""One call of a fold on one rank, and the backward of one of its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tspc.runtime import attention as attn
from tspc.runtime.exchange import take
from tspc.runtime.requests import Axis, Steps

from tspc.body import Attention, Body, Piece, evaluate, symbol_values
from tspc.layout import Layout

Tensor = torch.Tensor
Values = dict[str, Tensor]
RING, BROADCAST, GATHER, STATIONARY = "ring", "broadcast", "gather", "stationary"


class Pieces(Protocol):
    """Runs the pieces of a body, eagerly or compiled."""

    def forward(
        self, index: int, symbols: Mapping[Any, Any], step: Tensor, values: Values
    ) -> Values: ...

    def backward(
        self,
        index: int,
        symbols: Mapping[Any, Any],
        step: Tensor,
        values: Values,
        cotangents: Values,
    ) -> Values: ...


@dataclass
class Call:
    """One call of a fold on one rank."""

    axis: Axis
    body: Body
    pieces: Pieces
    schedule: str
    tokens: Sequence[Tensor]
    invariants: Sequence[Tensor]
    shards: Sequence[Tensor]
    sizes: Sequence[int]
    rows: int  # c
    length: int

    @property
    def layout(self) -> Layout:
        return Layout(self.axis.size, self.body.order)

    @property
    def local_rows(self) -> int:
        return self.layout.chunks * self.rows

    @property
    def dtype(self) -> torch.dtype:
        return self.shards[0].dtype

    def symbols(self, rows: int) -> dict[Any, Any]:
        return symbol_values(self.body, self.sizes, rows)

    def lead(self, size: Any) -> int:
        return evaluate(size, self.symbols(self.local_rows))

    def spec(self, a: Attention) -> attn.Spec:
        return attn.Spec(a.causal, a.scale, self.rows, self.length)

    def step(self, j: int) -> Tensor:
        return torch.tensor(j, device=self.shards[0].device)

    def local_tokens(self) -> Values:
        """This rank's rows of every token; a mask stays whole."""
        masks = {a.mask for a in self.body.attentions}
        out: Values = {}
        for spec, t in zip(self.body.tokens, self.tokens):
            if spec.whole and spec.name not in masks:
                lead = self.lead(spec.lead)
                t = take(self.layout, self.axis.rank, t, spec.dim, lead, self.rows, self.length)
            out[spec.name] = t
        return out

    def flat(self) -> Tensor:
        """This rank's shards in one buffer."""
        return torch.cat([s.reshape(-1) for s in self.shards])

    def unpack(self, flat: Tensor) -> Values:
        parts = flat.split([s.numel() for s in self.shards])
        return {n: p.view(s.shape) for n, p, s in zip(self.body.shards, parts, self.shards)}

    def invariant_values(self) -> Values:
        return dict(zip(self.body.invariants, self.invariants))

    def shape(self, name: str, rows: int) -> list[int]:
        symbols = self.symbols(rows)
        return [evaluate(s, symbols) for s in self.body.values[name].shape]


def attention_operands(
    s: Attention, values: Values
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return values[s.q], values[s.k], values[s.v], values[s.mask] if s.mask else None


def add_up(total: Values, name: str, x: Tensor) -> None:
    """Sums in fp32 or wider."""
    if name in total:
        total[name] += x
    else:
        total[name] = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def step_backward(
    call: Call, symbols: dict[Any, Any], j: int, values: Values, given: Values, resident: bool
) -> Steps:
    """Gradients of all operands of one step; pieces before the last are recomputed.

    resident: tokens of all ranks.
    """
    body, step = call.body, call.step(j)
    last = max(i for i, s in enumerate(body.steps) if isinstance(s, Piece))
    for index, s in enumerate(body.steps):
        if isinstance(s, Piece) and index < last:
            kept = {a.out for a in body.attentions}
            made = call.pieces.forward(index, symbols, step, values)
            values.update({n: t for n, t in made.items() if n not in kept})
    grads: Values = {}
    for n, g in given.items():
        add_up(grads, n, g)
    for index in reversed(range(len(body.steps))):
        s = body.steps[index]
        if isinstance(s, Piece):
            mine = {n: grads.pop(n) for n in s.writes if n in grads}
            if mine:
                for n, g in call.pieces.backward(index, symbols, step, values, mine).items():
                    add_up(grads, n, g)
            continue
        g = grads.pop(s.out, None)
        out, lse = values[s.out], values[s.lse]
        g = torch.zeros_like(out) if g is None else g.to(out.dtype)
        q, k, v, mask = attention_operands(s, values)
        if resident:
            dq, dk, dv = _whole_attention_backward(call, s, g, q, k, v, mask, out, lse)
        else:
            dq, dk, dv = yield from attn.attention_backward(
                call.axis, call.layout, g, q, k, v, mask, out, lse, call.spec(s)
            )
        for n, d in ((s.q, dq), (s.k, dk), (s.v, dv)):
            add_up(grads, n, d)
    return grads


def in_operand_order(call: Call, total: Values, shards: Values) -> tuple[list, list, list]:
    """In operand order, in the operands' dtypes."""
    body = call.body

    def of(names: Sequence[str], source: Values, like: Sequence[Tensor]) -> list[Tensor | None]:
        out: list[Tensor | None] = []
        for n, x in zip(names, like):
            if not body.values[n].requires_grad:
                out.append(None)
            elif n in source:
                out.append(source[n].to(x.dtype))
            else:
                out.append(torch.zeros_like(x))
        return out

    return (
        of([t.name for t in body.tokens], total, call.tokens),
        of(body.invariants, total, call.invariants),
        of(body.shards, shards, call.shards),
    )


def _whole_attention_backward(
    call: Call,
    s: Attention,
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = (x[:, :, : call.length] for x in (k, v))
    dq, dk, dv = attn.attend_backward(
        g, q, keys, values, out, lse, all_chunks(call), call.spec(s), mask
    )
    missing = k.shape[2] - call.length
    if missing:
        dk, dv = (torch.nn.functional.pad(d, (0, 0, 0, missing)) for d in (dk, dv))
    return dq, dk, dv


def all_chunks(call: Call) -> list[int]:
    """All chunks of the sequence, in order."""
    return list(range(call.axis.size * call.layout.chunks))
