"""Weight shards on their way to the tokens, and their gradients on the way back, under ring,
broadcast and gather."""

from __future__ import annotations

import torch

from tspc.cost.model import BROADCAST, GATHER, RING
from tspc.runtime.comm.exchange import summing
from tspc.runtime.comm.requests import (
    AllGather,
    Broadcast,
    Handle,
    Reduce,
    ReduceScatter,
    Shift,
    Steps,
)
from tspc.runtime.fold.step import Call, Values

Tensor = torch.Tensor


class Weights:
    """The shards in time: `j, shards = yield from next()`; the next one is in flight while the
    caller computes."""

    def __init__(self, call: Call):
        self.call, self.turn = call, 0
        self.handle: Handle | None = None
        self.blocks: Tensor | None = None

    def next(self) -> Steps[tuple[int, Values]]:
        """-> (j, the shards j by name)."""
        call, axis, turn = self.call, self.call.axis, self.turn
        self.turn += 1
        call.turn = self.turn
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
        flat = call.flat() if j == call.axis.rank else call.buffer()
        return Broadcast(flat, "weights", source=j)


class Gradients:
    """Weight gradients on their way to their owner: with the shard (ring), by reduce, or by
    reduce-scatter."""

    def __init__(self, call: Call):
        self.call = call
        self.names = [n for n in call.body.shards if call.body.values[n].requires_grad]
        self.handle: Handle | None = None
        self.mine: Tensor | None = None
        self.blocks: list[Tensor] = []

    def pack(self, grads: Values) -> Tensor:
        parts = []
        for n, s in zip(self.call.body.shards, self.call.shards):
            if n in self.names:
                g = grads.get(n)
                wide = summing(self.call.body.values[n].dtype, self.call.body.reduce)
                parts.append(
                    s.new_zeros(s.numel(), dtype=wide) if g is None else g.reshape(-1).to(wide)
                )
        return torch.cat(parts)

    def add(self, flat: Tensor, grads: Values) -> Tensor:
        """What arrived and this rank's part, in place: no third buffer."""
        shards = dict(zip(self.call.body.shards, self.call.shards))
        for n, p in zip(self.names, flat.split([shards[n].numel() for n in self.names])):
            if n in grads:
                p += grads[n].reshape(-1)
        return flat

    def put(self, j: int, grads: Values) -> Steps[None]:
        call = self.call
        if not self.names:
            return
        if call.schedule == RING:
            flat = self.pack(grads) if self.handle is None else self.add(self.arrived(), grads)
            self.handle = yield Shift(flat, "weights")
        elif call.schedule == BROADCAST:
            flat = self.pack(grads)
            if self.handle is not None:
                self.take(self.arrived())
            self.handle = yield Reduce(flat, "weights", target=j)
        else:
            self.blocks.append(self.pack(grads))

    def arrived(self) -> Tensor:
        assert self.handle is not None
        handle, self.handle = self.handle, None
        return handle.wait()

    def take(self, got: Tensor | None) -> None:
        self.mine = self.mine if got is None else got

    def done(self) -> Steps[Values]:
        """Gradient of each of this rank's shards."""
        if not self.names:
            return {}
        if self.handle is not None:
            self.take(self.arrived())
        if self.blocks:
            handle = yield ReduceScatter(torch.stack(self.blocks), "weights")
            self.mine = handle.wait()
        assert self.mine is not None
        shards = dict(zip(self.call.body.shards, self.call.shards))
        parts = self.mine.split([shards[n].numel() for n in self.names])
        return {n: p.view(shards[n].shape) for n, p in zip(self.names, parts)}
