"""Weight shards on their way to the tokens, and their gradients on the way back, under ring,
broadcast and gather."""

from __future__ import annotations

import torch
from tspc.runtime.requests import AllGather, Broadcast, Handle, Reduce, ReduceScatter, Shift, Steps
from tspc.runtime.step import Call, Values, joined

from tspc.cost import BROADCAST, GATHER, RING

Tensor = torch.Tensor


class Weights:
    """The shards in time: `j, shards = yield from next()`; the next one is in flight while the
    caller computes."""

    def __init__(self, call: Call):
        self.call, self.turn = call, 0
        self.handle: Handle | None = None
        self.blocks: Tensor | None = None

    def next(self) -> Steps:
        """-> (j, the shards j by name)."""
        call, axis, turn = self.call, self.call.axis, self.turn
        self.turn += 1
        if call.schedule == GATHER:
            if self.blocks is None:
                handle = yield AllGather(call.flat(), "weights")
                self.blocks = handle.wait()
            assert self.blocks is not None
            return turn, call.unpack(self.blocks[turn])
        if call.schedule == RING:
            flat = call.flat() if self.handle is None else self.handle.wait()
            if turn + 1 < axis.size:
                self.handle = yield Shift(flat, "weights")
            return (axis.rank - turn) % axis.size, call.unpack(flat) if turn else call.own()
        if self.handle is None:
            self.handle = yield self.broadcast(0)
        flat = self.handle.wait()
        if turn + 1 < axis.size:
            self.handle = yield self.broadcast(turn + 1)
        return turn, call.own() if turn == axis.rank else call.unpack(flat)

    def broadcast(self, j: int) -> Broadcast:
        call = self.call
        if j == call.axis.rank:
            return Broadcast(call.flat(), "weights", source=j)
        length = sum(s.numel() for s in call.shards)
        return Broadcast(call.shards[0].new_empty(length), "weights", source=j)


class Gradients:
    """Weight gradients on their way to their owner: with the shard (ring), by reduce, or by
    reduce-scatter."""

    def __init__(self, call: Call):
        self.call = call
        self.names = [n for n in call.body.shards if call.body.values[n].requires_grad]
        self.handle: Handle | None = None
        self.pending: list[Handle] = []
        self.mine: Tensor | None = None
        self.blocks: list[Tensor] = []

    def pack(self, grads: Values) -> Tensor:
        parts = []
        for n, s in zip(self.call.body.shards, self.call.shards):
            if n in self.names:
                g = grads.get(n)
                wide = torch.promote_types(s.dtype, torch.float32)
                parts.append(
                    s.new_zeros(s.numel(), dtype=wide) if g is None else g.reshape(-1).to(wide)
                )
        return joined(parts)

    def put(self, j: int, grads: Values) -> Steps:
        call = self.call
        if not self.names:
            return
        flat = self.pack(grads)
        if call.schedule == RING:
            if self.handle is not None:
                flat = self.handle.wait().add_(flat)
            self.handle = yield Shift(flat, "weights")
        elif call.schedule == BROADCAST:
            handle = yield Reduce(flat, "weights", target=j)
            self.pending.append(handle)
            if len(self.pending) == 2:
                self.take(self.pending.pop(0))
        else:
            self.blocks.append(flat)

    def take(self, handle: Handle) -> None:
        got = handle.wait()
        self.mine = self.mine if got is None else got

    def done(self) -> Steps:
        """Gradient of each of this rank's shards."""
        if not self.names:
            return {}
        if self.call.schedule == RING:
            assert self.handle is not None
            self.mine = self.handle.wait()
        for handle in self.pending:
            self.take(handle)
        if self.blocks:
            handle = yield ReduceScatter(torch.stack(self.blocks), "weights")
            self.mine = handle.wait()
        assert self.mine is not None
        shards = dict(zip(self.call.body.shards, self.call.shards))
        parts = self.mine.split([shards[n].numel() for n in self.names])
        return {n: p.view(shards[n].shape) for n, p in zip(self.names, parts)}
