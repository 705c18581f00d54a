"""Run passes one after the other. The runner alone checks what a pass made, times it, writes it
down, and says in errors in which pass and at which node they arose."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tspc.ir.program import Node
from tspc.passes.ladder import at_hand
from tspc.passes.lower.unit import Unit
from tspc.passes.verify import check_program, check_typed


@dataclass(frozen=True)
class Pass:
    """A step from one unit to the next, under a name."""

    name: str
    run: Callable[[Unit], Unit]


def run(passes: Sequence[Pass], unit: Unit) -> Unit:
    """The unit after all of the passes. TSPC_DEBUG=1 prints nodes and seconds, TSPC_DEBUG=2 the
    texts too; TSPC_DUMP=dir writes each text as dir/NN_name.txt, NN: the place in `passes`."""
    debug, folder = os.environ.get("TSPC_DEBUG"), os.environ.get("TSPC_DUMP")
    for place, step in enumerate(passes):
        start = time.perf_counter()
        with _during(step.name):
            after = step.run(unit)
            _check(unit, after, step.name)
        if debug:
            seconds = time.perf_counter() - start
            nodes = len(after.program.nodes)
            print(f"tspc: {step.name}: {nodes} nodes, {seconds:.3f} s", file=sys.stderr)
        if debug == "2":
            print(after, file=sys.stderr)
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            Path(folder, f"{place:02}_{step.name}.txt").write_text(f"{after}\n")
        unit = after
    return unit


def _check(before: Unit, after: Unit, name: str) -> None:
    """What the pass changed."""
    if after.typed is not before.typed:
        check_typed(after.typed)
    elif after.program is not before.program:
        check_program(after.program, name)


@contextmanager
def _during(name: str) -> Iterator[None]:
    """Say in which pass an error arose, and at which node."""
    try:
        yield
    except Exception as e:
        node = next((x for x in at_hand(e) if isinstance(x, Node)), None)
        at = f", at %{node.name} = {node.op}, {node.source}" if node is not None else ""
        e.add_note(f"in pass {name} of tspc{at}")
        raise
