"""make mutants: change every rule a little; the samples must notice.

`python -m tests.mutants` prints what survived and fails where more than 5 % did. A mutant is caught
by the parser, by pieces that do not rejoin, by a factor that can no longer be cut, or by a role
that a sample needs. Rules that are computed count too, as the texts that they return.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import tspc.passes.factorize as factorize

import tests.test_samples as samples
import tspc.rule as language
import tspc.rules as rules
from tests.brute import check, traced
from tspc.program import OUTPUT
from tspc.rule import ONCE, ROLES, Op, Rule

APPLIED = (factorize, language, *(getattr(rules, m) for m in rules.__all__))
Samples = list[tuple[Any, samples.Sample, int]]


@dataclass(frozen=True)
class Mutant:
    """rule: as the op's rule says; made: what stands in its place. once: None: not of `once`."""

    op: Any
    rule: Rule
    made: Rule
    change: str
    once: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"{self.op} {self.rule} | {self.change}"


@contextlib.contextmanager
def applying(fn: Callable[[Rule, Op], Rule]) -> Iterator[None]:
    """Every rule that is applied to an op is what fn makes of it."""
    real = language.apply
    with contextlib.ExitStack() as stack:
        for module in APPLIED:
            if hasattr(module, "apply"):
                changed = lambda r, op: real(fn(r, op), op)  # noqa: E731
                stack.enter_context(mock.patch.object(module, "apply", changed))
        yield


def cuts(sample: samples.Sample, op: Any) -> int:
    """Cuts of this op that were tried; raises where pieces do not rejoin."""
    a, env = traced(*((sample[0], *sample[1])))
    samples.vanished(a)
    return check(a, env).get(op, 0)


def observed() -> dict[tuple[Any, Rule], Samples]:
    """The samples that apply each rule, and the cuts of its op there."""
    found: dict[tuple[Any, Rule], Samples] = defaultdict(list)
    for group in samples.GROUPS.values():
        for sample in group():
            seen: set[tuple[Any, Rule]] = set()

            def note(r: Rule, op: Op, seen: set = seen) -> Rule:
                seen.add((op.node.op, r))  # type: ignore[attr-defined]
                return r

            with applying(note):
                a, env = traced(sample[0], *sample[1])
            tried = check(a, env) if seen else {}
            for op, r in seen:
                found[op, r].append((op, sample, tried.get(op, 0)))
    return found


def swapped(tensors: tuple, i: int, j: int, k: int) -> tuple:
    tokens = list(tensors[i])
    tokens[j], tokens[k] = tokens[k], tokens[j]
    return (*tensors[:i], tuple(tokens), *tensors[i + 1 :])


def mutations(op: Any, rule: Rule) -> Iterator[Mutant]:
    """Drop a role, change a role, swap two letters, drop `once`, name another operand."""
    for letter, role in rule.roles:
        rest = tuple(x for x in rule.roles if x != (letter, role))
        yield Mutant(op, rule, replace(rule, roles=rest), f"no {role} {letter}")
        for other in ROLES:
            if (letter, other) not in rule.roles:
                made = replace(rule, roles=(*rest, (letter, other)))
                yield Mutant(op, rule, made, f"{other} {letter} for {role}")
    for side in ("ins", "outs"):
        tensors = getattr(rule, side)
        for i, tensor in enumerate(tensors):
            for j, k in itertools.combinations(range(len(tensor)), 2):
                if tensor[j] != tensor[k]:
                    made = replace(rule, **{side: swapped(tensors, i, j, k)})
                    yield Mutant(op, rule, made, str(made))
    for i, j in itertools.combinations(range(len(rule.ins)), 2):
        a, b = rule.ins[i], rule.ins[j]
        if len(a) == len(b) and a != b:
            made = replace(rule, ins=tuple({i: b, j: a}.get(n, x) for n, x in enumerate(rule.ins)))
            yield Mutant(op, rule, made, str(made))
    if op in ONCE:
        yield Mutant(op, rule, rule, "no once", ())
        for i in range(len(rule.ins)):
            if i != ONCE[op]:
                yield Mutant(op, rule, rule, f"once={i}", (i,))


def needed(op: Any, needs: list[tuple[str, samples.Sample, set[Any]]]) -> bool:
    """Every role that a sample needs of this op is still there."""
    for role, (fn, tensors), ops in needs:
        if op in ops:
            records = [r for r in traced(fn, *tensors)[0].records if r.node.op == op]
            if not any(role == x[0] for r in records for roles in r.roles.values() for x in roles):
                return False
    return True


def caught(m: Mutant, given: Samples, needs: list) -> str:
    """What notices the mutant; empty: nothing."""
    lost = Rule.letters(m.made.ins) - Rule.letters(m.made.outs) - {l for l, _ in m.made.roles}
    if lost:
        return "parser"
    once = {k: v for k, v in ONCE.items() if k != m.op} if m.once is not None else dict(ONCE)
    if m.once:
        once[m.op] = m.once[0]

    def changed(r: Rule, op: Op) -> Rule:
        return m.made if op.node.op == m.op and r == m.rule else r  # type: ignore[attr-defined]

    with applying(changed), mock.patch.dict(ONCE, once, clear=True):
        for op, sample, tried in given:
            try:
                if cuts(sample, op) < tried:
                    return "fewer cuts"
            except Exception:  # whatever the mutant breaks
                return "pieces"
        try:
            return "" if needed(m.op, needs) else "roles"
        except Exception:
            return "roles"


def requirements() -> list[tuple[str, samples.Sample, set[Any]]]:
    """(role, sample, the ops that have the role there)."""
    out = []
    for role, sample in samples.forbidden():
        records = traced(sample[0], *sample[1])[0].records
        has = {r.node.op for r in records for x in r.roles.values() if role in {y[0] for y in x}}
        out.append((role, sample, has - {OUTPUT}))
    return out


# (part of a mutant's text, why nothing can notice it)
EQUIVALENT: tuple[tuple[str, str], ...] = ()


def equivalent(m: Mutant) -> bool:
    return any(part in str(m) for part, _ in EQUIVALENT)


def survivors(every: int = 1, start: int = 0) -> tuple[Counter[str], list[Mutant]]:
    """Of each `every`-th mutant: how many were caught by what, and which were not."""
    found, needs = observed(), requirements()
    all_of = [(m, given) for (op, r), given in found.items() for m in mutations(op, r)]
    counts, left = Counter[str](), list[Mutant]()
    for m, given in all_of[start::every]:
        if equivalent(m):
            counts["equivalent"] += 1
            continue
        by = caught(m, given, needs)
        counts[by or "nothing"] += 1
        if not by:
            left.append(m)
    return counts, left


def main() -> int:
    torch.set_num_threads(1)
    counts, left = survivors()
    for m in left:
        print("survives:", m)
    total = sum(n for by, n in counts.items() if by != "equivalent")
    share = 1 - counts["nothing"] / total
    print(dict(counts), f"{share:.1%} of {total} caught")
    return share < 0.95


if __name__ == "__main__":
    sys.exit(main())
