"""What `make test` tries of a product of cases: every value once; the rest is for `make wide`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def each_once(*axes: Sequence[Any]) -> list[Any]:
    """All combinations, flat where a value is a tuple; those beyond one for each value are wide."""
    turns = range(max(map(len, axes)))
    chosen = {tuple(i % len(a) for a in axes) for i in turns}
    out = []
    for at in itertools.product(*(range(len(a)) for a in axes)):
        values = [a[i] for a, i in zip(axes, at)]
        flat = [x for v in values for x in (v if isinstance(v, tuple) else (v,))]
        out.append(pytest.param(*flat, marks=() if at in chosen else pytest.mark.wide))
    return out
