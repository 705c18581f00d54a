"""What is refused, and why: nodes, regions by their weights, or everything."""

from __future__ import annotations

from tspc.passes.analyse.refused import NOTHING, Refused


def test_nodes_by_name() -> None:
    r = Refused({"a": "no form"})
    assert "a" in r and "b" not in r and r and r.why("a") == "no form" and r.why("b") == ""


def test_regions_by_the_weights_that_they_hold() -> None:
    r = Refused(regions={frozenset({"w", "v"}): "no pieces"})
    assert r.region({"u", "v", "w"}) == "no pieces" and r.region(["w"]) == "" and r
    assert "a" not in r and r.told == {"v, w": "no pieces"}


def test_everything() -> None:
    r = Refused({"a": "one"}, everything="all", source="m.py:1")
    assert "b" in r and r.why("b") == "all" and r.why("a") == "one"
    assert r.told == {"a": "one", "the whole graph": "all"}


def test_nothing() -> None:
    assert not NOTHING and "a" not in NOTHING and NOTHING.told == {}
