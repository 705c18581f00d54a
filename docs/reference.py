"""docs/api.md from the public docstrings: `python -m docs.reference`."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import FunctionType
from typing import Any

import tspc
import tspc.base.errors
import tspc.trainer
from tspc.base.options import Options

PAGE = Path(__file__).parent / "api.md"
HEAD = """# API

Made from the docstrings by `make docs`. All but the trainer and the options are names of `tspc`.
How it is used: [README](../README.md). The terms: [glossary](glossary.md).
"""


def parameter(p: inspect.Parameter) -> str:
    """As it is written, the annotation without quotes."""
    stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
    kind = f": {p.annotation}" if p.annotation is not p.empty else ""
    return stars + p.name + kind + (f" = {p.default!r}" if p.default is not p.empty else "")


def signature(name: str, item: Any) -> str:
    """As it is called, one argument a line where it is long."""
    found = inspect.signature(item)
    parts, after_star = [], False
    for p in found.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not after_star:
            parts.append("*")
        after_star = after_star or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        if p.name != "self":
            parts.append(parameter(p))
    after = f" -> {found.return_annotation}"
    line = f"{name}({', '.join(parts)}){after}"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(parts) + f",\n){after}"


def entry(name: str, item: Any, level: int = 3) -> str:
    """One name: heading, signature, docstring; of a class its public methods too."""
    lines = [f"{'#' * level} {name}", ""]
    if isinstance(item, property):
        lines += ["A property.", ""]
    if inspect.isfunction(item):
        lines += ["```python", signature(name, item).replace("'", '"'), "```", ""]
    lines += ["```text", inspect.getdoc(item) or "", "```", ""]
    if inspect.isclass(item) and not issubclass(item, Exception):
        for member, value in vars(item).items():
            if not member.startswith("_") and isinstance(value, (property, FunctionType)):
                lines.append(entry(f"{name}.{member}", value, level + 1))
    return "\n".join(lines)


def error(item: type[Exception]) -> str:
    """One line of the table."""
    bases = ", ".join(f"`{b.__name__}`" for b in item.__bases__)
    return f"| `{item.__name__}` | {bases} | {' '.join((item.__doc__ or '').split())} |"


def text() -> str:
    """The page."""
    public = {n: getattr(tspc, n) for n in tspc.__all__}
    errors = [x for x in public.values() if inspect.isclass(x) and issubclass(x, Exception)]
    others = {n: x for n, x in public.items() if x not in errors}
    parts = [HEAD, "## Functions and classes\n"]
    parts += [entry(n, x) for n, x in others.items() if not isinstance(x, str)]
    parts += ["## Trainer\n", entry("tspc.trainer.register", tspc.trainer.register)]
    parts += ['## Options\n\nOf `torch.compile(model, backend="tsp", options={...})`.\n']
    parts += [entry("Options", Options)]
    parts += ["## Errors\n\n" + (tspc.base.errors.__doc__ or "")]
    parts += ["| error | is a | when |\n| --- | --- | --- |\n" + "\n".join(map(error, errors))]
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(text())
