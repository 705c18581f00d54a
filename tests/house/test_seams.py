"""Private symbols of torch: all of them stand in `tspc/seams/`, and torch has each.

Nothing of tspc is imported: where torch has dropped a symbol, this names it.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.house.test_imports import FILES, ROOT, name

SEAMS = sorted((ROOT / "tspc" / "seams").glob("*.py"))
PUBLIC = ("torch.ops.", "torch._dynamo.config", "torch.__version__")


def is_private(symbol: str) -> bool:
    parts = symbol.split(".")
    hidden = any(p.startswith("_") for p in parts)
    return parts[0] == "torch" and hidden and not symbol.startswith(PUBLIC)


def symbols(path: Path) -> Iterator[str]:
    """Of torch, as "torch.module.name": what is imported, and what is reached from `torch`."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    inner = {id(n.value) for n in nodes if isinstance(n, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            text = ast.unparse(node)
            if text.startswith("torch.") and "(" not in text:
                yield text


def reached(symbol: str) -> object:
    """Imports the modules in front."""
    parts = symbol.split(".")
    value: object = importlib.import_module(parts[0])
    for k, part in enumerate(parts[1:], 2):
        if not hasattr(value, part):
            importlib.import_module(".".join(parts[:k]))
        value = getattr(value, part)
    return value


USED = sorted({s for path in SEAMS for s in symbols(path) if is_private(s)})


@pytest.mark.parametrize("symbol", USED)
def test_torch_has_it(symbol: str) -> None:
    reached(symbol)


def test_a_symbol_that_is_gone_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match="torch._ops.no_such"):
        reached("torch._ops.no_such")


@pytest.mark.parametrize("path", [p for p in FILES if p not in SEAMS], ids=name)
def test_they_stand_in_one_folder(path: Path) -> None:
    assert not [s for s in symbols(path) if is_private(s)]


def test_there_are_some() -> None:
    assert len(USED) > 60 and torch.__version__
