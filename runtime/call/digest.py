"""64 bits that tell one tensor's contents from another's: the sum of its words, each mixed and
times a weight of its place; a bit that flips, and two words that change places, change it.

On an accelerator it is computed there and nothing waits for it.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

import numpy as np
import torch

BLOCK = 1 << 15  # words that are mixed at a time: they stay in a core's cache
ARRAYS = (torch.int64, torch.int32, torch.float32, torch.float64, torch.bool)
SMALL = 1 << 14  # bytes that are hashed by the library: it starts sooner than our sum
GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def digest(x: torch.Tensor) -> int:
    """Of a tensor on the CPU."""
    if x.nbytes <= SMALL:
        small = blake2b(_numpy(x).tobytes(), digest_size=8)
        return int.from_bytes(small.digest(), "little", signed=True)
    data = _numpy(x).reshape(-1).view(np.uint8)
    whole = len(data) & ~7
    value = int.from_bytes(data[whole:].tobytes(), "little") * GOLDEN
    words, weights, mixed = data[:whole].view(np.uint64), *_tables()
    for start in range(0, len(words), BLOCK):
        block = words[start : start + BLOCK]
        out = mixed[: len(block)]
        np.right_shift(block, np.uint64(32), out=out)
        np.bitwise_xor(block, out, out=out)
        value = value * GOLDEN + int(out.dot(weights[: len(block)]))
    return (value & _MASK) - (1 << 63)


def digest_there(x: torch.Tensor) -> torch.Tensor:
    """Of a tensor anywhere, as int64[] on its device; another number than `digest`'s."""
    data = _bytes(x)
    missing = -data.numel() % 8
    if missing or data.storage_offset() % 8:
        data = torch.cat([data, data.new_zeros(missing)])
    words = data.view(torch.int64)
    at = torch.arange(1, words.numel() + 1, device=x.device) * (GOLDEN - (1 << 64))
    weights = at ^ (at >> 29)
    weights = (weights * (0xBF58476D1CE4E5B9 - (1 << 64))) | 1
    return ((words ^ ((words >> 32) & 0xFFFFFFFF)) * weights).sum()


def is_plain(x: torch.Tensor) -> bool:
    """Its contents are there to be read, the same on all ranks."""
    return type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout == torch.strided


def _numpy(x: torch.Tensor) -> np.ndarray:
    """An array of the same bytes."""
    if x.dtype in ARRAYS and x.is_contiguous() and not x.is_neg():
        return (x.detach() if x.requires_grad else x).numpy()
    return _bytes(x).numpy()


def _bytes(x: torch.Tensor) -> torch.Tensor:
    x = x.detach().resolve_conj().resolve_neg()
    return x.contiguous().view(-1).view(torch.uint8)


@lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """The weight of each place in a block, all odd; room for a block."""
    at = np.arange(1, BLOCK + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    at ^= at >> np.uint64(29)
    weights = (at * np.uint64(0xBF58476D1CE4E5B9)) | np.uint64(1)
    return weights, np.empty(BLOCK, dtype=np.uint64)
