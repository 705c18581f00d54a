"""The facts of `tests.support.zoo_facts` as the text of docs/models.md."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tests.support.zoo_facts import EXACT, SHARES, folds_all, short

COMMAND = "make zoo"
Facts = dict[str, Any]
HEAD = """# Models

Made by `{command}` (`python -m tests.support.run_zoo NAME...` measures some anew). {versions}.

- *parity*: the worst relative error of loss, outputs and every gradient against one device, in
  float64 on simulated ranks: D = 2, 3, 4 on 24 tokens, D = 4 on 23. Exact: at most {exact}.
- *folds*: regions folded; *all*: every attention, every MLP and the vocabulary. Gathered at use
  all the same: experts of mixtures with their router, and a single matrix between two norms.
- *gathered*: floats gathered along the sequence other than K, V and scalars.
- *compiles*: of the graph compiled most often over calls of 5 lengths (of a model that has one
  length: 5 batches), by default and with `dynamic=True`, every call compared with one device.
- *state*: parameters, gradients and Adam state per rank at D = 4, as a share of one device's
  (at most {state}); *alive*: what the forward leaves for the backward (at most {alive}). 4 layers,
  hidden 256, ffn 1024, heads 8/4, vocabulary 2048, batch 2 of 512 tokens, Inductor, gloo.
"""


def error(facts: Facts) -> str:
    return facts["error"].split(":")[0]


def exactness(parity: Facts) -> str:
    if not parity:
        return "-"
    failed = [f"{k}: {error(v)}" for k, v in parity.items() if "error" in v]
    if failed:
        return "; ".join(failed)
    worst = max(v["worst"] for v in parity.values())
    return f"{worst:.0e}" if worst <= EXACT else f"**{worst:.0e}**"


def compiled(compiles: Facts) -> str:
    def one(mode: Facts) -> str:
        if "error" in mode:
            return error(mode)
        most = max(mode["compiles"])
        wrong = "" if mode["worst"] <= 1e-5 else f" (error {mode['worst']:.0e})"
        return (f"{most}" if most <= 2 else f"**{most}**") + wrong

    return " / ".join(map(one, compiles.values())) if compiles else "-"


def share(memory: Facts | None, kind: str) -> str:
    if memory is None:
        return "-"
    if "error" in memory:
        return error(memory)
    return f"{memory[kind]:.3f}" if memory[kind] <= SHARES[kind] else f"**{memory[kind]:.3f}**"


def holds(facts: Facts) -> dict[str, bool]:
    """Which of the promises this model keeps."""
    made, memory = facts.get("decisions", {}), facts.get("memory", {})
    parity, compiles = facts.get("parity", {}), facts.get("compiles", {})
    cases = [*parity.values()]
    return {
        "exact": bool(cases) and all(c.get("worst", 1.0) <= EXACT for c in cases),
        "folded": "folds" in made and folds_all(made),
        "nothing gathered": "gathered" in made and not made["gathered"],
        "two compiles": bool(compiles)
        and all(max(c.get("compiles", [9])) <= 2 and c["worst"] <= 1e-5 for c in compiles.values()),
        "memory": all(memory.get(k, 1.0) <= v for k, v in SHARES.items()),
    }


def row(name: str, facts: Facts) -> str:
    made = facts.get("decisions", {})
    folds = error(made) if "error" in made else "-"
    gathered = "-"
    if "folds" in made:
        folds = f"{len(made['folds'])}" + (", all" if folds_all(made) else "")
        total = sum(n for _, n, _ in made["gathered"])
        gathered = f"{len(made['gathered'])} ({total / 1024:.0f} KiB)" if total else "none"
    memory = facts.get("memory")
    cells = [
        name,
        exactness(facts.get("parity", {})),
        folds,
        gathered,
        compiled(facts.get("compiles", {})),
        share(memory, "state"),
        share(memory, "alive"),
    ]
    if "gloo" in facts:
        cells.append(
            error(facts["gloo"]) if "error" in facts["gloo"] else f"{facts['gloo']['worst']:.0e}"
        )
    else:
        cells.append("-")
    return f"| {' | '.join(cells)} |"


def details(name: str, facts: Facts) -> list[str]:
    """What is not as promised, in full."""
    made, out = facts.get("decisions", {}), []
    out += [f"`{short(w)}` not folded: {why}" for w, why in made.get("refused", ())]
    told = {w for ws, _ in made.get("refused", ()) for w in ws.split(", ")}
    rest = [w for w in made.get("unfolded", ()) if w not in told]
    out += [f"`{short(w)}` gathered at use" for w in rest]
    out += [f"attention outside of folds: {x}" for x in made.get("attentions", ()) if x != "folded"]
    out += [
        f"`{x}` gathered along the sequence: {n} bytes, {at}"
        for x, n, at in made.get("gathered", ())
    ]
    out += [f"replicated: {line}" for line in made.get("replicated", ())]
    parts = {"decisions": made, "memory": facts.get("memory", {}), "gloo": facts.get("gloo", {})}
    for part in ("parity", "compiles"):
        parts |= {f"{part} {k}": v for k, v in facts.get(part, {}).items()}
    out += [f"{k}: {v['error']}" for k, v in parts.items() if "error" in v]
    lines = [f"- {line}" + (f" ({n} times)" if n > 1 else "") for line, n in Counter(out).items()]
    return [f"### {name}", "", *lines, ""] if lines else []


def table(found: Facts) -> str:
    """The document."""
    made = {tuple(v["versions"].values()) for v in found.values()}
    dates = "; ".join(f"{d}, torch {t}, transformers {h}" for d, t, h in sorted(made))
    head = HEAD.format(command=COMMAND, versions=dates, exact=EXACT, **SHARES)
    kept = {n: holds(v) for n, v in found.items()}
    counts = {p: sum(k[p] for k in kept.values()) for p in next(iter(kept.values()), {})}
    every = sum(all(k.values()) for k in kept.values())
    counted = ", ".join(f"{p} {n}" for p, n in counts.items())
    lines = [head, f"Of {len(found)} models: {counted}; all of these {every}.", ""]
    lines.append("| model | parity | folds | gathered | compiles | state | alive | gloo, fp32 |")
    lines.append("|---|---|---|---|---|---|---|---|")
    lines += [row(n, v) for n, v in found.items()]
    lines += ["", "## What is not folded, gathered or replicated", ""]
    for n, v in found.items():
        lines += details(n, v)
    return "\n".join(lines).rstrip() + "\n"
