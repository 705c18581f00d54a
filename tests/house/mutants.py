"""make mutants: change every rule a little; the samples must notice.

`python -m tests.house.mutants` prints what survived and fails where more than 5 % did. A mutant is
caught by the parser, by pieces that do not rejoin, by a factor that can no longer be cut, or by a
role that a sample needs. Rules that are computed count too, as the texts that they return.
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

import tests.behaviour.test_samples as samples
import tspc.factors.notation as language
import tspc.passes.analyse.factorize as factorize
import tspc.rules as rules
from tspc.backend.brute import check, check_meaning, traced
from tspc.base.errors import RuleError
from tspc.factors.notation import ROLES, Op, Rule
from tspc.factors.registry import ONCE
from tspc.ir.program import OUTPUT, SDPA
from tspc.ops.attention import ATTENTION

APPLIED = (factorize, language, *(getattr(rules, m) for m in rules.__all__))
Samples = list[tuple[Any, samples.Sample, int]]
Read = frozenset[int]  # which operands of a rule are given


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
    a, env = traced(sample[0], *sample[1])
    samples.vanished(a)
    check_meaning(a, env)
    return check(a, env).get(op, 0)


def observed() -> dict[tuple[Any, Rule, Read], Samples]:
    """The samples that apply each rule, and the cuts of its op there."""
    found: dict[tuple[Any, Rule, Read], Samples] = defaultdict(list)
    for group in samples.GROUPS.values():
        for sample in group():
            seen: set[tuple[Any, Rule, Read]] = set()

            def note(r: Rule, op: Op, seen: set = seen) -> Rule:
                read = frozenset(i for i, x in enumerate(op.refs) if x is not None)
                seen.add((op.node.op, r, read))  # type: ignore[attr-defined]
                return r

            with applying(note):
                a, env = traced(sample[0], *sample[1])
            tried = check(a, env) if seen else {}
            for op, r, read in seen:
                found[op, r, read].append((op, sample, tried.get(op, 0)))
    return found


def swapped(tensors: tuple, i: int, j: int, k: int) -> tuple:
    tokens = list(tensors[i])
    tokens[j], tokens[k] = tokens[k], tokens[j]
    return (*tensors[:i], tuple(tokens), *tensors[i + 1 :])


def renamed(rule: Rule) -> Any:
    """The rule but for the names of its letters."""
    names: dict[str, int] = {}

    def token(t: Any) -> Any:
        return t if isinstance(t, str) else tuple(names.setdefault(l, len(names)) for l in t)

    tensors = [[tuple(map(token, t)) for t in side] for side in (rule.ins, rule.outs)]
    return tensors, {(names.setdefault(l, len(names)), role) for l, role in rule.roles}


def exchanged(rule: Rule, read: Read) -> Iterator[Rule]:
    """Two letters of a tensor, or two operands, take each other's place."""
    for side in ("ins", "outs"):
        tensors = getattr(rule, side)
        for i, tensor in enumerate(tensors):
            for j, k in itertools.combinations(range(len(tensor)), 2):
                if side == "outs" or i in read:
                    yield replace(rule, **{side: swapped(tensors, i, j, k)})
    for i, j in itertools.combinations(sorted(read & set(range(len(rule.ins)))), 2):
        if len(rule.ins[i]) == len(rule.ins[j]):
            other = {i: rule.ins[j], j: rule.ins[i]}
            yield replace(rule, ins=tuple(other.get(n, x) for n, x in enumerate(rule.ins)))


def mutations(op: Any, rule: Rule, read: Read) -> Iterator[Mutant]:
    """Drop a role, change a role, swap two letters, drop `once`, name another operand."""
    for letter, role in rule.roles:
        rest = tuple(x for x in rule.roles if x != (letter, role))
        yield Mutant(op, rule, replace(rule, roles=rest), f"no {role} {letter}")
        for other in ROLES:
            if (letter, other) not in rule.roles:
                made = replace(rule, roles=(*rest, (letter, other)))
                yield Mutant(op, rule, made, f"{other} {letter} for {role}")
    for m in exchanged(rule, read):
        if renamed(m) != renamed(rule):
            yield Mutant(op, rule, m, str(m))
    if ONCE.get(op) in read:
        yield Mutant(op, rule, rule, "no once", ())
        for i in range(len(rule.ins)):
            if i != ONCE[op]:
                yield Mutant(op, rule, rule, f"once={i}", (i,))


def needed(op: Any, needs: list[tuple[str, samples.Sample, set[Any]]]) -> bool:
    """Every role that a sample needs of this op is still there, and attention has those it must."""
    for role, (fn, tensors), ops in needs:
        if op in ops:
            records = [r for r in traced(fn, *tensors)[0].records if r.node.op == op]
            if not any(role == x[0] for r in records for roles in r.roles.values() for x in roles):
                return False
    attentions = samples.attentions() if op in (SDPA, ATTENTION) else []
    return all(samples.roles_of(sample, [op]) in (set(), roles) for sample, roles in attentions)


def readable(rule: Rule) -> bool:
    """The parser takes the rule."""
    lost = Rule.letters(rule.ins) - Rule.letters(rule.outs) - {l for l, _ in rule.roles}
    try:
        rule.check_roles(str(rule))
    except RuleError:
        return False
    return not lost and lawful(rule)


def lawful(rule: Rule) -> bool:
    """What is exchanged meets the first operand, which stays where it is."""
    exchanged = {l for l, role in rule.roles if role == "exchange"}
    return not exchanged & Rule.letters(rule.ins[:1])


def caught(m: Mutant, given: Samples, needs: list) -> str:
    """What notices the mutant; empty: nothing."""
    if not readable(m.made):
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
ALL_WHOLE = "both letters are whole in every operand: what they are joined with cuts nothing"
EQUIVALENT: tuple[tuple[str, str], ...] = (
    ("whole=c | b y c x, o c k l, o -> b o p q", ALL_WHOLE),
    ("whole=c | b x y c, o c k l, o -> b o p q", ALL_WHOLE),
    ("whole=c | b c y x, o k c l, o -> b o p q", ALL_WHOLE),
    ("whole=c | b c y x, o l k c, o -> b o p q", ALL_WHOLE),
    ("b c y x, i o k l, o -> b o p q", "in a convolution in groups " + ALL_WHOLE),
)


def equivalent(m: Mutant) -> bool:
    return any(part in str(m) for part, _ in EQUIVALENT)


def survivors(found: dict, every: int = 1, start: int = 0) -> tuple[Counter[str], list[Mutant]]:
    """Of each `every`-th mutant of the rules: how many were caught by what, and which were not."""
    needs = requirements()
    all_of = [(m, given) for (k, given) in found.items() for m in mutations(*k)]
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
    counts, left = survivors(observed())
    print(f"{len(EQUIVALENT)} changes are known to be equivalent")
    for m in left:
        print("survives:", m)
    total = sum(n for by, n in counts.items() if by != "equivalent")
    share = 1 - counts["nothing"] / total
    print(dict(counts), f"{share:.1%} of {total} caught")
    return share < 0.95


if __name__ == "__main__":
    sys.exit(main())
