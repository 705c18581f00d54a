"""make zoo: measure each model of the zoo (`tests.support.zoo_facts`), write the table
docs/models.md.

`python -m tests.support.run_zoo NAME... [--parts decisions parity compiles memory] [--gloo]`. The
results of single models and parts are merged into the JSON, from which the table is printed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch

from tests.support import zoo_facts as facts
from tests.support.zoo import ZOO
from tests.support.zoo_table import table

ROOT = Path(__file__).parents[2]
PARTS = ("decisions", "parity", "compiles", "memory")


def measured(name: str, part: str, worlds: facts.Worlds) -> Any:
    """One part of a model's facts."""
    if part == "decisions":
        return facts.attempt(lambda: facts.decided(name))
    if part == "parity":
        return {
            f"D={d} S={n}": facts.attempt(lambda d=d, n=n: facts.parity(name, d, n))
            for d, n in facts.CASES
        }
    if part == "compiles":
        modes = {"default": None, "dynamic": True}
        return {k: facts.attempt(lambda v=v: facts.compiles(name, v)) for k, v in modes.items()}
    run = facts.memory if part == "memory" else facts.gloo
    return facts.attempt(lambda: run(name, worlds))


def versions() -> dict[str, str]:
    import transformers

    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"date": today, "torch": torch.__version__, "transformers": transformers.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=[])
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--gloo", action="store_true", help="two gloo processes under Inductor")
    parser.add_argument("--out", default=str(ROOT / "bench" / "results" / "zoo.json"))
    parser.add_argument("--doc", default=str(ROOT / "docs" / "models.md"))
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    out, worlds = Path(args.out), facts.Worlds()
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    out.parent.mkdir(exist_ok=True)
    for name in args.models or ZOO:
        for part in [*args.parts, *["gloo"][: args.gloo]]:
            row = measured(name, part, worlds)
            found.setdefault(name, {}).update({part: row, "versions": versions()})
            print(name, part, json.dumps(row)[:600], flush=True)
            out.write_text(json.dumps(found, indent=1))
    worlds.close()
    doc = Path(args.doc)
    doc.parent.mkdir(exist_ok=True)
    doc.write_text(table({n: found[n] for n in ZOO if n in found}))


if __name__ == "__main__":
    sys.exit(main())
