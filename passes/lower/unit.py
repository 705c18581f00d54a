"""What the passes hand on: a program, what it is compiled for, and what each pass has decided.

It never changes: a pass returns another one with the fields that it fills.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy

from tspc.base.hardware import HARDWARE, Hardware
from tspc.base.options import Options
from tspc.cost.budget import Keeping
from tspc.ir.body import Body, chunk_of
from tspc.ir.program import FOLD, PARAM, SEED, Node, Program, Ref, Type
from tspc.ops.lookup import Lookups
from tspc.passes.analyse.factorize import Analysis
from tspc.passes.analyse.outputs import Range, Result
from tspc.passes.analyse.refused import NOTHING, Refused
from tspc.passes.analyse.typed import Typed
from tspc.passes.lower.choose import Choice

LATER: Any = None  # no pass has filled it yet


@dataclass(frozen=True)
class Unit:
    """A program on its way through the passes.

    program: as the last pass left it. writes: how many of the last outputs are new values of
    inputs. refused: what is left alone. graph_break: where the graph ends in one. The others are
    named after the pass that fills them or what it decides. analysis: of the program before it was
    folded. leaving: output -> how it is handed out where it lies, if it is cut. bodies: by region
    name, in order. keepings: of the regions with matrix products to keep.
    """

    program: Program
    symbols: tuple[sympy.Symbol, ...] = ()
    ranks: int = 1
    axis: str = "tsp"
    options: Options = field(default_factory=Options)
    hardware: Hardware = HARDWARE["cpu"]
    writes: int = 0
    refused: Refused = NOTHING
    graph_break: str = ""
    lookups: Lookups = field(default=Lookups(), repr=False)
    analysis: Analysis = LATER
    ranges: Mapping[int, tuple[Range, ...]] = field(default_factory=dict)
    choice: Choice = LATER
    leaving: Mapping[int, str] = field(default_factory=dict)
    typed: Typed = LATER
    bodies: Mapping[str, Body] = field(default_factory=dict)
    keepings: tuple[Keeping, ...] = ()
    local: Program = LATER
    results: tuple[Result | None, ...] = ()

    def __str__(self) -> str:
        """The program, and in comments what is decided beside it: all of it parses as a program.

        While nothing is placed, of each value the factors of its dims; then where it lives.
        """
        program = self.program if self.local is None else self.local
        lines = [f"// {line}".rstrip() for note in self._decided() for line in note.split("\n")]
        return "\n".join([str(program), *lines, *(b.text() for b in self.bodies.values())])

    def stored(self, n: Node) -> Type:
        """A placeholder as one rank has it."""
        storage = self.choice.storages.get(n.name) if n.op == PARAM else None
        if storage is None or storage.map is None:
            return n.type
        shape = list(n.type.shape)
        shape[storage.map.dim] = storage.map.length
        return replace(n.type, shape=tuple(shape))

    def _decided(self) -> list[str]:
        lines = [f"{x.index}: {x.op} in {x.table}" for x in self.lookups.listed]
        if self.typed is not None:
            lines += [f"{Ref(n, i)}: {place}" for (n, i), place in self.typed.places.items()]
        elif self.analysis is not None:
            F = self.analysis.F
            lines += [
                f"{Ref(n, i)}: {list(map(F.show, d))}" for (n, i), d in self.analysis.env.items()
            ]
        if self.choice is not None:
            lines += [f"sequence {f}: {order}" for f, order in self.choice.leaves.items()]
            lines += [f"region {name}: {schedule}" for name, _, schedule in self.choice.regions]
            lines += [f"no region {sorted(g.weights)}: {why}" for g, why in self.choice.refused]
            stored = self.choice.storages.items()
            lines += [f"{Ref(n)}: {s.kind}{f' {s.map.dim}' if s.map else ''}" for n, s in stored]
        lines += [f"output {i}: {kind}" for i, kind in self.leaving.items()]
        lines += [f"body of {name}: {b.key}" for name, b in self.bodies.items()]
        return lines

    @property
    def chunks(self) -> tuple[sympy.Symbol, ...]:
        """c of each sequence."""
        return tuple(chunk_of(i) for i in range(len(self.choice.extents)))

    @property
    def draws(self) -> bool:
        """Its last placeholder is the seed of its random ops."""
        return any(n.name == SEED for n in self.program.nodes)

    @property
    def folds(self) -> tuple[Node, ...]:
        """The fold nodes, in order."""
        return tuple(n for n in self.program.nodes if n.op == FOLD)
