"""A sample of `make mutants`: of changes to the rules, the samples notice nearly all."""

from __future__ import annotations

from tests.house.mutants import lawful, observed, survivors


def test_most_mutants_are_caught() -> None:
    found = observed()
    rules = {r for _, r, _ in found}
    assert len(rules) > 50 and all(map(lawful, rules))
    counts, left = survivors(found, every=40, start=7)
    total = sum(counts.values()) - counts["equivalent"]
    assert total > 30
    assert len(left) <= 0.05 * total, [str(m) for m in left]
