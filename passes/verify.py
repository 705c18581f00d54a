"""What must hold after each pass: programs are well formed, placements and cotangents fit
(docs/design.md, "Types on the axis")."""

from __future__ import annotations

from tspc.base.errors import InternalError
from tspc.ir.kinds import (
    ALL_REDUCE,
    CLEAR,
    EMBED,
    GATHER_WEIGHT,
    LOCAL,
    VARY,
    WHOLE,
)
from tspc.ir.program import APART, FOLD, OUTPUT, PLACEHOLDERS, Node, Program
from tspc.passes.analyse.typed import Typed

# conversion -> the placement that its operand must have
OPERAND = {LOCAL: "R", WHOLE: "S", CLEAR: "S", ALL_REDUCE: "P", VARY: "R"}
# read a parameter as it is stored
OF_SHARDS = (APART, EMBED, FOLD, GATHER_WEIGHT, f"{GATHER_WEIGHT}_r")


def check_program(program: Program, after: str) -> None:
    """Names are unique, placeholders come first, the output last, operands before their users.

    Raises `InternalError` naming the pass and the node.
    """
    seen: dict[str, Node] = {}
    calls = False
    for n in program.nodes:
        if n.name in seen:
            raise _error(after, n, "its name is taken")
        if n.op in PLACEHOLDERS and calls:
            raise _error(after, n, "a placeholder stands after an op")
        calls = calls or n.op not in PLACEHOLDERS
        for r in n.refs():
            if r.name not in seen:
                raise _error(after, n, f"{r} is used before it is made")
            if (r.item or 0) >= len(seen[r.name].types):
                raise _error(after, n, f"{r} does not exist")
        seen[n.name] = n
    if program.output.op != OUTPUT:
        raise _error(after, program.output, "the program has no output at its end")


def check_typed(typed: Typed) -> None:
    """No varying or partial value where an equal one is required, none equal where cotangents
    differ by rank."""
    after = "propagate"
    check_program(typed.program, after)
    for n in typed.program.nodes:
        places = {r: typed.places[r.name, r.item or 0] for r in n.refs()}
        if n.op in OPERAND:
            (place,) = places.values()
            if place != OPERAND[n.op]:
                raise _error(after, n, f"its operand is {place}, not {OPERAND[n.op]}")
            continue
        if "P" in places.values():
            raise _error(after, n, "it reads a partial sum")
        if n.op in (OUTPUT, *OF_SHARDS) or n.op in PLACEHOLDERS:
            continue
        here = typed.places[n.name, 0]
        if here == "R" and set(places.values()) - {"R"}:
            raise _error(after, n, f"it is equal on all ranks but reads {sorted(places.values())}")
        if here in ("S", "P"):
            for r, place in places.items():
                if place == "R" and typed.program.type_of(r).requires_grad:
                    raise _error(after, n, f"{r} is equal on all ranks, its cotangent is not")


def _error(after: str, node: Node, why: str) -> InternalError:
    return InternalError(f"after {after}: {node.source} %{node.name} = {node.op}: {why}")
