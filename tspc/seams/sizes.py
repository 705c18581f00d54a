"""Private symbols of torch: sympy expressions of sizes."""

from torch.utils._sympy import functions as sympy_functions
from torch.utils._sympy.functions import FloorDiv, PythonMod
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis, TensorReferenceAnalysis
from torch.utils._sympy.symbol import SymT, symbol_is_type

__all__ = [
    "FloorDiv",
    "PythonMod",
    "PythonReferenceAnalysis",
    "SymT",
    "TensorReferenceAnalysis",
    "symbol_is_type",
    "sympy_functions",
    "sympy_interp",
]
