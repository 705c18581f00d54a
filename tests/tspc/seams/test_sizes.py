"""torch's sympy functions of sizes mean what Python's operators do."""

from __future__ import annotations

import sympy
import torch

from tspc.seams.sizes import (
    FloorDiv,
    PythonMod,
    PythonReferenceAnalysis,
    SymT,
    TensorReferenceAnalysis,
    symbol_is_type,
    sympy_functions,
    sympy_interp,
)

A, B = sympy.symbols("a b", integer=True)


def test_division_and_remainder_are_pythons() -> None:
    for n in range(-7, 8):
        assert FloorDiv(sympy.Integer(n), sympy.Integer(3)) == n // 3
        assert PythonMod(sympy.Integer(n), sympy.Integer(3)) == n % 3
    assert sympy_functions.FloorDiv is FloorDiv


def test_expressions_are_computed_on_numbers_and_tensors() -> None:
    e = FloorDiv(A + 2 * B, 3)
    assert sympy_interp(PythonReferenceAnalysis, {A: 4, B: 5}, e) == 14 // 3
    values = {A: torch.tensor(1.5), B: torch.tensor(2.0)}
    assert sympy_interp(TensorReferenceAnalysis, values, A * B).item() == 3.0


def test_symbols_of_floats_have_their_prefix() -> None:
    assert symbol_is_type(sympy.Symbol("zf0"), SymT.FLOAT)
    assert not symbol_is_type(sympy.Symbol("s0"), SymT.FLOAT)
