"""Random numbers as pure functions of (seed, op, global position), so that ranks, schedules, blocks
and whatever runs again see the same ones.

In: the seed of a call, the number of the op, and for every dim the share of its indices in the
place in the whole tensor. A state is two 32-bit words in int64 tensors. Integers only, and no
product exceeds 63 bits: every device and compiler gives the same bits.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from tspc.ops.library import LIB

Tensor = torch.Tensor
State = tuple[Tensor, Tensor]

_WORD = 0xFFFFFFFF
MIX = ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, None))  # (shift, factor)
_BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}

# [size]: 0, stride, 2 * stride, ...: how far the places of a dim are from its first, in elements
LIB.define("positions(Tensor seed, SymInt size, SymInt stride) -> Tensor")
# the state [2] of one op of the program
LIB.define("instance(Tensor seed, int number) -> Tensor")
# in [0, 1) and standard normal; `like` tells the dims, its values are not read
LIB.define("uniform(Tensor? like, Tensor state, Tensor[] at, *, ScalarType dtype) -> Tensor")
LIB.define("normal(Tensor? like, Tensor state, Tensor[] at, *, ScalarType dtype) -> Tensor")
LIB.define("dropout(Tensor x, Tensor state, Tensor[] at, float p) -> Tensor")
# [*lead, n, d] -> [*lead, n]: the state of every query, from which attention draws for its keys
LIB.define("query_states(Tensor query, Tensor state, Tensor[] at) -> Tensor")


# One op for Inductor, which writes an expression out anew for each of its uses; not in tspc's
# namespace, whose ops communicate
_MIXERS = torch.library.Library("tspc_counter", "FRAGMENT")
_MIXERS.define("mix(Tensor x) -> Tensor")
mix = torch.ops.tspc_counter.mix.default


def mixed(x: Any, ops: Any = operator, constant: Any = int) -> Any:
    """A bijection of 32-bit words in which every bit depends on every other (hash-prospector's
    [15 2c1b3c6d 12 297a2d39 15]); ops: what computes, as Python's operators."""
    for shift, factor in MIX:
        x = ops.xor(x, ops.rshift(x, constant(shift)))
        if factor is not None:
            x = ops.and_(ops.mul(x, constant(factor)), constant(_WORD))
    return x


_MIXERS.impl("mix", mixed, "CompositeExplicitAutograd")
torch.library.register_fake("tspc_counter::mix", torch.empty_like, lib=_MIXERS)


def absorb(state: State, index: Tensor | int) -> State:
    """Mix an index in [0, 2**32) in."""
    a = mix(state[0] ^ index)
    return a, mix(a ^ state[1])


def instance(seed: Tensor, number: int) -> Tensor:
    state = (seed & _WORD, (seed >> 32) & _WORD)
    return torch.stack(absorb(absorb(state, number), 0x9E3779B9))


def spread(state: Tensor, at: Sequence[Tensor]) -> State:
    """The state at every place of the tensor whose dims have these positions."""
    place = state.new_zeros(())
    for index in at:
        place = place.unsqueeze(-1) + index
    a = mix((place & _WORD) ^ state[0])
    return a, mix(a ^ (place >> 32) ^ state[1])


def _unit(words: State, dtype: torch.dtype) -> Tensor:
    """[0, 1) in as many bits as the dtype can tell apart."""
    a, b = words
    bits = _BITS[dtype]
    whole = b >> (32 - bits) if bits <= 32 else (b << (bits - 32)) | (a >> (64 - bits))
    return whole.to(dtype) * 2.0**-bits


def uniform(like: Tensor | None, state: Tensor, at: Sequence[Tensor], *, dtype: torch.dtype):
    return _unit(spread(state, at), dtype)


def normal(like: Tensor | None, state: Tensor, at: Sequence[Tensor], *, dtype: torch.dtype):
    """By Box and Muller, in fp32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    a, b = spread(state, at)
    radius = torch.sqrt(-2.0 * torch.log1p(-_unit((a, b), wide)))
    angle = _unit(absorb((a, b), 1), wide)
    return (radius * torch.cos(angle * (2 * torch.pi))).to(dtype)


def keeps(words: State, p: float) -> Tensor:
    """True with probability 1 - p, to 2**-32."""
    return words[1] >= round(p * 2**32)


def dropout(x: Tensor, state: Tensor, at: Sequence[Tensor], p: float) -> Tensor:
    """Zero with probability p, else x / (1 - p)."""
    scale = 1.0 / (1.0 - p) if p < 1 else 0.0
    return torch.where(keeps(spread(state, at), p), x * scale, 0.0)


def query_states(query: Tensor, state: Tensor, at: Sequence[Tensor]) -> Tensor:
    """Both words in one: 32 bits and 31."""
    a, b = spread(state, at)
    return a | ((b & (_WORD >> 1)) << 32)


def kept_keys(states: Tensor, first: int, last: int, p: float) -> Tensor:
    """[*, n] states of queries -> [*, n, last - first]: the keys [first, last) that each keeps."""
    words = ((states & _WORD).unsqueeze(-1), (states >> 32).unsqueeze(-1))
    return keeps(absorb(words, torch.arange(first, last, device=states.device)), p)


def _positions(seed: Tensor, size: int, stride: int) -> Tensor:
    return torch.arange(size, device=seed.device) * stride


for _name, _fn in (
    ("positions", _positions),
    ("instance", instance),
    ("uniform", uniform),
    ("normal", normal),
    ("dropout", dropout),
    ("query_states", query_states),
):
    LIB.impl(_name, _fn, "CompositeImplicitAutograd")
