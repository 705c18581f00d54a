"""Six architectures of the zoo on simulated ranks (`make zoo` runs all): equal to one device, and
folded as expected."""

from __future__ import annotations

import pytest

import tspc
from tests.widen import Widen
from tests.zoo import KV, LAYERS, build

pytestmark = pytest.mark.slow

# model -> (folds of a layer beside the head, what may run replicated)
EXPECTED: dict[str, tuple[int, set[str]]] = {
    "mistral": (2, set()),  # hands out the last rows of K and V
    "olmo2": (3, set()),  # a norm over all heads: two folds
    "bloom": (2, set()),  # a bias that differs by head, added to products written out
    "deepseek_v3": (3, {"topk", "scatter"}),  # queries written in ranges; experts are gathered
    "falcon": (2, set()),  # one product of unequal parts
    "padded_left": (2, set()),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_equals_one_device(name: str) -> None:
    folds, replicated = EXPECTED[name]
    model, kwargs = build(name, 17)
    with Widen():
        found = tspc.verify(model, (), kwargs, KV + 1, {}, 1e-9)
    (graph,) = found.graphs
    rewritten = graph.rewritten
    assert len(rewritten.folds) == folds * LAYERS + 1, rewritten.choice.refused
    fallbacks = {f.op for f in rewritten.typed.fallbacks}
    fallbacks |= {op for _, op in rewritten.analysis.fallbacks}
    assert {op.split(".")[1] for op in fallbacks} == replicated
