"""Random numbers of seed, op and place: the same for any cut, even, and apart from each other."""

from __future__ import annotations

import pytest
import torch

from tspc.ops import counter

SEED = torch.tensor(0x123456789ABCDEF)
STATE = counter.instance(SEED, 3)
SHAPE = (3, 500, 7)
AT = [counter._positions(SEED, n, s) for n, s in zip(SHAPE, (3500, 7, 1))]


def uniform(at: list[torch.Tensor], state: torch.Tensor = STATE) -> torch.Tensor:
    return counter.uniform(None, state, at, dtype=torch.float64)


def test_mixing_is_a_bijection_with_known_values() -> None:
    """hash-prospector's function, in plain integers."""

    def plain(x: int) -> int:
        for shift, factor in counter.MIX:
            x ^= x >> shift
            x = x if factor is None else (x * factor) & 0xFFFFFFFF
        return x

    words = torch.randint(0, 2**32, (1000,))
    assert counter.mix(words).tolist() == [plain(x) for x in words.tolist()]
    assert counter.mixed(12345) == plain(12345)
    assert len(set(counter.mix(torch.arange(5000)).tolist())) == 5000


def test_a_state_depends_on_seed_and_op() -> None:
    states = {tuple(counter.instance(s, n).tolist()) for s in (SEED, SEED + 1) for n in range(4)}
    assert len(states) == 8 and all(0 <= w < 2**32 for s in states for w in s)
    a, b = counter.absorb((STATE[0], STATE[1]), 7)
    assert a.item() == counter.mix(STATE[0] ^ 7).item()
    assert b.item() == counter.mix(a ^ STATE[1]).item()


def test_positions_are_places_in_the_whole() -> None:
    assert counter._positions(SEED, 4, 5).tolist() == [0, 5, 10, 15]
    state = torch.tensor([1, 2])
    a, _ = counter.spread(state, [torch.tensor([0, 1]) * 3, torch.arange(3)])
    flat, _ = counter.spread(state, [torch.arange(6)])
    assert torch.equal(a.flatten(), flat)


def test_a_part_draws_what_the_whole_draws() -> None:
    whole = uniform(AT)
    rows = torch.tensor([4, 1, 77])
    assert whole.shape == SHAPE
    assert torch.equal(uniform([AT[0], AT[1][rows], AT[2]]), whole[:, rows])


def test_uniform_numbers_are_even() -> None:
    x = uniform(AT).flatten()
    assert x.min() >= 0 and x.max() < 1 and x.unique().numel() == x.numel()
    counts = torch.histc(x, 10, 0, 1)
    assert (counts - x.numel() / 10).abs().max() < 5 * (x.numel() / 10) ** 0.5


@pytest.mark.parametrize(
    "dtype,bits", [(torch.float32, 24), (torch.float16, 11), (torch.bfloat16, 8)], ids=str
)
def test_as_many_bits_as_a_type_tells_apart(dtype: torch.dtype, bits: int) -> None:
    x = counter.uniform(None, STATE, AT, dtype=dtype)
    assert x.dtype == dtype and x.max() < 1
    assert torch.equal(x.double() * 2**bits, (x.double() * 2**bits).round())


def test_normal_numbers() -> None:
    x = counter.normal(None, STATE, AT, dtype=torch.float64)
    n = x.numel()
    assert abs(x.mean()) < 4 / n**0.5 and abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    share = (x.abs() < 1.0).double().mean().item()
    assert share == pytest.approx(0.6827, abs=0.02)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_zeroes_a_share_and_scales_the_others(p: float) -> None:
    x = torch.full(SHAPE, 2.0, dtype=torch.float64)
    y = counter.dropout(x, STATE, AT, p)
    kept = y != 0
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=0.02)
    assert torch.all(y[kept] == 2.0 / (1 - p) if p < 1 else y[kept] == 0)


def test_keys_that_a_query_keeps() -> None:
    """By its state and the key's position; any range of keys alike."""
    q = torch.zeros(3, 500, 8)
    states = counter.query_states(q, STATE, [AT[0], AT[1]])
    assert states.shape == (3, 500) and states.min() >= 0
    kept = counter.kept_keys(states, 0, 40, 0.25)
    assert torch.equal(counter.kept_keys(states, 10, 30, 0.25), kept[..., 10:30])
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.01)
    assert not torch.equal(kept[0, 0], kept[0, 1])
    assert torch.equal(counter.keeps((states, states), 0.5), states >= 2**31)


def test_ops_are_these_functions() -> None:
    tspc = torch.ops.tspc
    assert torch.equal(tspc.instance(SEED, 3), STATE)
    assert torch.equal(tspc.uniform(None, STATE, AT, dtype=torch.float64), uniform(AT))
    assert tspc.positions(SEED, 4, 5).tolist() == [0, 5, 10, 15]
