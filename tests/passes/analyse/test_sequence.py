"""Which factors are sequences: what attention exchanges, else the last token dim."""

from __future__ import annotations

import torch

from tests.support.programs import analysis_of, program_of
from tests.support.samples import ids, x
from tspc.passes.analyse.factorize import Analysis, factorize
from tspc.passes.analyse.sequence import attends, masks_by_key, sequences

aten, tspc = torch.ops.aten, torch.ops.tspc
Tensor = torch.Tensor
ATTEND = tspc.scaled_dot_product_attention.default


def sizes(a: Analysis) -> list[int]:
    return [int(f.size) for f in sequences(a)]


def test_what_attention_exchanges() -> None:
    a = analysis_of(lambda q: ATTEND(q, q, q, causal=True), x(2, 3, 5, 4))
    assert sizes(a) == [5]


def test_encoder_and_decoder_have_one_each() -> None:
    def fn(q: Tensor, m: Tensor) -> Tensor:
        return ATTEND(ATTEND(q, q, q, causal=True), m, m) + 0 * ATTEND(m, m, m).sum()

    a = analysis_of(fn, x(2, 3, 5, 4), x(2, 3, 7, 4))
    assert sorted(sizes(a)) == [5, 7]


def test_queries_that_nothing_attends_to_come_last() -> None:
    a = analysis_of(lambda q, m: ATTEND(q, m, m), x(2, 3, 5, 4), x(2, 3, 7, 4))
    assert sizes(a) == [7, 5]


def test_without_attention_the_last_token_dim() -> None:
    a = analysis_of(aten.linear.default, x(2, 5, 4), params={"w": x(6, 4)})
    assert sizes(a) == [5]


def test_a_dim_of_a_parameter_is_none_where_another_is() -> None:
    def fn(i: Tensor, w: Tensor, table: Tensor) -> Tensor:
        return aten.linear.default(aten.embedding.default(table, i), w)

    a = analysis_of(fn, ids(11, 2, 5), params={"w": x(6, 4), "table": x(11, 4)})
    assert sizes(a) == [5]
    none = analysis_of(lambda t: t.sin(), x(2, 5))
    assert sequences(none) == ()


def test_a_refused_program_has_none() -> None:
    program = program_of(lambda q: ATTEND(q, q, q), x(2, 3, 5, 4))
    names = {n.name for n in program.nodes}
    assert sequences(factorize(program, refused=names)) == ()


def attention(a: Analysis) -> tuple:
    return next(r for r in a.records if r.node.op == ATTEND), set(sequences(a))


def test_attention_along_sequences_as_a_whole() -> None:
    a = analysis_of(lambda q: ATTEND(q, q, q, causal=True), x(2, 3, 5, 4))
    record, leaves = attention(a)
    assert attends(a, record, leaves) and not attends(a, record, set())
    across = analysis_of(lambda q, m: ATTEND(q, m, m, causal=True), x(2, 3, 5, 4), x(2, 3, 7, 4))
    assert not attends(across, *attention(across))
    flat = analysis_of(lambda q: ATTEND(q, q, q), x(3, 5, 4))
    assert not attends(flat, *attention(flat))


def test_a_mask_of_values_along_the_keys() -> None:
    def fn(q: Tensor) -> Tensor:
        return ATTEND(q, q, q, aten.sum.dim_IntList(q, [3]).unsqueeze(2))

    a = analysis_of(fn, x(2, 3, 5, 4))
    record, leaves = attention(a)
    assert masks_by_key(a, record, set(a.F.leaves(tuple(record.ins[3][-1]))))
    assert not masks_by_key(a, record, set()) and leaves
