"""The structural key of a body: equal for layers of one structure, and for nothing else."""

from __future__ import annotations

import pytest
import sympy
import torch

from tests.support.programs import mlp_program, program_of, unit_of
from tspc.base.options import parse
from tspc.ir.body import Out, Token
from tspc.ir.program import Ref, Type
from tspc.passes.lower.body_key import structural_key
from tspc.passes.lower.run_piece import Table
from tspc.passes.lower.unit import Unit

Tensor = torch.Tensor


def keys(unit: Unit) -> list[str]:
    return [b.key for b in unit.bodies.values()]


def test_layers_of_one_structure_share_their_pieces() -> None:
    def layers(x: Tensor, *w: Tensor) -> list[Tensor]:
        for up, down in zip(w[::2], w[1::2]):
            x = x + torch.tanh(x @ up) @ down
        return [x]

    shapes = {"a.up": (6, 5), "a.down": (5, 6), "b.up": (6, 5), "b.down": (5, 6)}
    shapes |= {"c.up": (6, 4), "c.down": (4, 6)}
    params = {n: torch.zeros(s) for n, s in shapes.items()}
    a, b, c = keys(unit_of(program_of(layers, torch.zeros(2, 7, 6), params=params), "pieces"))
    assert a == b != c and len(a) == 20


def test_what_a_key_tells_apart() -> None:
    def key(units: int = 5, length: int = 7, ranks: int = 2, **options: object) -> str:
        (one,) = keys(unit_of(mlp_program(units, length), "pieces", ranks, options=parse(options)))
        return one

    assert key() == key()
    others = key(4), key(5, 8), key(ranks=3), key(schedule="ring"), key(layout="zigzag")
    others += (key(reduce_dtype=torch.float32), key(memory_budget="min"))
    assert key() not in others[:5] and len({*others[:5]}) == 5


N = sympy.Symbol("n")
TOKEN = Token("token0", 1, 1, True)
OUT = Out("v", "sum", 1, 1, True)
VALUES = {"v": Type((2, N), torch.float32)}
TABLES = {Ref("b"): Table(0, [[0, 1]])}


@pytest.mark.parametrize(
    "changed",
    [
        {"extents": [(N, "zigzag")]},
        {"values": {"v": Type((2, N), torch.float64)}},
        {"values": {"v": Type((2, N), torch.float32, True)}},
        {"values": {"v": Type((3, N), torch.float32)}},
        {"tables": {Ref("b"): Table(1, [[0, 1]])}},
        {"tables": {Ref("b"): Table(0, [[0, 2]])}},
        {"symbols": [sympy.Symbol("n", positive=True)]},
        {"others": ([TOKEN], [OUT], 3)},
        {"others": ([Token("token0", 1, 1, False)], [OUT], 2)},
        {"others": ([TOKEN], [Out("v", "stack", 1, 1, True)], 2)},
    ],
)
def test_what_is_told_beside_the_ops(changed: dict[str, object]) -> None:
    (node,) = unit_of(mlp_program(), "fold").folds
    fold = node.kwargs["fold"]
    refs = [Ref("b"), *fold.tokens, *map(Ref, fold.weights)]
    refs += [Ref(n.name) for n in fold.body]
    names = {r: f"v{i}" for i, r in enumerate(refs)}
    told = {
        "extents": [(N, "contiguous")],
        "values": VALUES,
        "tables": TABLES,
        "symbols": [N],
        "others": ([TOKEN], [OUT], 2),
    }
    same = structural_key(fold, names=names, **told)  # type: ignore[arg-type]
    assert same == structural_key(fold, names=names, **told)  # type: ignore[arg-type]
    assert same != structural_key(fold, names=names, **{**told, **changed})  # type: ignore[arg-type]
