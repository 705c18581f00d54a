"""docs/rules.md: every op that has a rule, its rule, where it is written and how it was checked."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tspc.rules as rules
from tspc.factors.notation import pointwise
from tspc.factors.registry import COMPUTED, ONCE, RULES
from tspc.passes.analyse.factorize import EXTRA_POINTWISE

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "rules.md"
HEAD = """# Rules

Made by `make rules`; a test compares. Letters are factors; the notation stands in
`tspc/factors/notation.py`. An op that torch tags as pointwise needs none; an op without a rule runs
replicated and is reported.

*Checked*: the group of samples (`tests/behaviour/test_samples.py`) that runs the op on pieces of
every factor its rule leaves cuttable, joins them and compares with the whole, and how many such
cuts; *needs*: roles without which a sample gives another value. `make mutants` tells what all this
notices.

| op | rule | source | checked |
|---|---|---|---|
"""


def place(function: Any) -> str:
    file = Path(inspect.getsourcefile(function) or "")
    return f"{file.relative_to(ROOT)}:{inspect.getsourcelines(function)[1]}"


def declared() -> dict[str, str]:
    """Op's name -> where its one-line rule is."""
    out = {}
    for module in rules.__all__:
        file = Path(getattr(rules, module).__file__)
        for i, line in enumerate(file.read_text().splitlines(), 1):
            found = re.match(r"rule\((?:torch\.ops\.)?([\w.]+),", line)
            if found:
                out[found[1]] = f"{file.relative_to(ROOT)}:{i}"
    return out


def told(function: Any) -> str:
    """A computed rule: its name, and what its docstring's first sentence says."""
    doc = inspect.getdoc(function)
    first = " ".join(doc.split("\n\n")[0].split()) if doc else ""
    return f"computed: {function.__name__}" + (f". {first}" if first else "")


def table(
    reached: Mapping[str, Mapping[Any, int]],
    untried: Mapping[Any, str],
    needed: Mapping[Any, set[str]],
) -> str:
    """Reached: group -> op -> cuts tried. needed: op -> roles."""
    lines, at = [], declared()
    for op in sorted({*RULES, *COMPUTED, *EXTRA_POINTWISE}, key=str):
        if op in RULES:
            text, source = f"`{RULES[op]}`", at[str(op)]
        elif op in EXTRA_POINTWISE or COMPUTED[op] is pointwise:
            text, source = "pointwise", place(pointwise)
        else:
            text, source = told(COMPUTED[op]), place(COMPUTED[op])
        if op in ONCE:
            text += f", once={ONCE[op]}"
        groups = ", ".join(
            f"{g} ({ops[op]} cuts)" for g, ops in sorted(reached.items()) if op in ops
        )
        checked = groups or f"no: {untried[op]}"
        if op in needed:
            checked += f"; needs {', '.join(sorted(needed[op]))}"
        lines.append(f"| {op} | {text} | {source} | {checked} |".replace("->", "→"))
    return HEAD + "\n".join(lines) + "\n"
