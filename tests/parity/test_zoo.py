"""Six architectures of the zoo on simulated ranks (`make zoo` runs all): equal to one device, and
folded as expected."""

from __future__ import annotations

import pytest

import tspc
from tests.support.widen import Widen
from tests.support.zoo import KV, LAYERS, build

pytestmark = [pytest.mark.slow, pytest.mark.sampled(3)]

# model -> folds of a layer beside the head
EXPECTED = {
    "mistral": 2,  # hands out the last rows of K and V
    "olmo2": 3,  # a norm over all heads: two folds
    "bloom": 2,  # a bias that differs by head, added to products written out
    "deepseek_v3": 3,  # queries written in ranges; experts are gathered
    "falcon": 2,  # one product of unequal parts
    "padded_left": 2,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_equals_one_device(name: str) -> None:
    model, kwargs = build(name, 17)
    with Widen():
        found = tspc.verify(model, (), kwargs, KV + 1, {}, 1e-9)
    (graph,) = found.graphs
    rewritten = graph.rewritten
    assert len(rewritten.folds) == EXPECTED[name] * LAYERS + 1, rewritten.choice.refused
    assert not rewritten.typed.fallbacks and not rewritten.analysis.fallbacks
