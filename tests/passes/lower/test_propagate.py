"""Where each value lives, and the conversions between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.goldens import cases, check
from tests.support.programs import Tensor, mlp, mlp_program, program_of, unit_of
from tspc.passes.lower import propagate


@cases("propagate")
def test_from_text_to_text(path: Path, request: pytest.FixtureRequest) -> None:
    check(path, request)


def test_placements() -> None:
    def fn(x: Tensor, scale: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
        return [(mlp(x * scale, up, down)[0].sum(), scale.sum())[0]]

    params = {"scale": torch.zeros(6), "m.up": torch.zeros(6, 5), "m.down": torch.zeros(5, 6)}
    typed = unit_of(program_of(fn, torch.zeros(2, 7, 6), params=params), "propagate").typed
    places = {n: p for (n, _), p in typed.places.items()}
    assert places["x0"] == "R" and places["fold_0"] == "S" and places["scale.vary"] == "V"
    assert places["sum_1.partial"] == "P" and places["sum_1"] == "R"


def test_an_op_that_falls_back() -> None:
    def fn(x: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
        return [mlp(x, up, down)[0].cumprod(1)]

    params = {"m.up": torch.zeros(6, 5), "m.down": torch.zeros(5, 6)}
    typed = unit_of(program_of(fn, torch.zeros(2, 7, 6), params=params), "propagate").typed
    assert typed.places["cumprod", 0] == "R"


def test_the_mask_of_an_attention() -> None:
    def fn(x: Tensor, mask: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
        y = torch.nn.functional.scaled_dot_product_attention(x, x, x, mask)
        return mlp(y, up, down)

    params = {"m.up": torch.zeros(6, 5), "m.down": torch.zeros(5, 6)}
    program = program_of(fn, torch.zeros(2, 7, 6), torch.zeros(2, 7, 7), params=params)
    typed = unit_of(program, "propagate").typed
    (n,) = [n for n in typed.program.nodes if "attention" in str(n.op)]
    assert propagate.mask_of(n) is not None
    plain = unit_of(mlp_program(), "propagate").typed.program
    assert len(plain.nodes) == 6
