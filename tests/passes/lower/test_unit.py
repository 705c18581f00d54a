"""What the passes hand on: its text, and what it tells of placeholders and folds."""

from __future__ import annotations

import torch

from tests.support.programs import mlp_program, program_of, unit_of
from tspc.ir.program import Program, parts
from tspc.ir.text import fields_of
from tspc.passes.lower.unit import Unit


def test_the_text_is_a_program_with_comments() -> None:
    for stage in ("lookups", "factorize", "choose", "propagate", "pieces", "localize"):
        text = str(unit_of(mlp_program(), stage))
        assert str(Program.parse(text)) == text.partition("\n//")[0]


def test_its_bodies_are_read_back() -> None:
    unit = unit_of(mlp_program(), "localize")
    program, bodies = parts(str(unit))
    assert program == unit.local
    assert [fields_of(b) for b in bodies.values()] == [fields_of(b) for b in unit.bodies.values()]
    assert [*bodies] == ["m"] and bodies["m"].key == unit.bodies["m"].key  # type: ignore[attr-defined]


def test_the_text_says_what_is_decided() -> None:
    placed = str(unit_of(mlp_program(), "localize"))
    for line in (
        "symbol rows positive integer",
        "%m.up: f32[6, 3] grad = param()",  # as it is stored
        "// %x0.local[0]: S",
        "// sequence f1:7: contiguous",
        "// region m: auto",
        "// %m.up: fold 1",
        "  %v2: f32[2, rows, 6] grad = aten.matmul.default(%v1, %shard1)",
    ):
        assert line in placed.split("\n")
    assert "// %matmul_1[0]: ['2#0', '7#1', '6#6']" in str(unit_of(mlp_program(), "factorize"))


def test_notes_of_what_is_decided() -> None:
    def fn(ids: torch.Tensor, table: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        return [torch.nn.functional.embedding(ids, table) @ w + w.sum()]

    params = {"table": torch.zeros(5, 6), "w": torch.zeros(6, 6)}
    ids = torch.zeros(2, 7, dtype=torch.int64)
    unit = unit_of(program_of(fn, ids, params=params), "choose")
    notes = unit._decided()
    assert "%x0: embedding in %table" in notes or any("embedding" in n for n in notes)
    assert any(n.startswith("no region ['w']: ") for n in notes)
    assert "%table: gather 0" in notes


def test_a_placeholder_as_it_is_stored() -> None:
    unit = unit_of(mlp_program(), "localize")
    x, up, down = (unit.stored(unit.program.node(n)) for n in ("x0", "m.up", "m.down"))
    assert x.shape == (2, 7, 6) and up.shape == (6, 3) and down.shape == (3, 6)
    assert [n.types[0].shape for n in unit.local.nodes[:3] if n.types[0]] == [
        (2, 7, 6),
        (6, 3),
        (3, 6),
    ]


def test_folds_and_draws() -> None:
    unit = unit_of(mlp_program(), "localize")
    assert [n.kwargs["fold"].name for n in unit.folds] == ["m"] and not unit.draws
    drawn = program_of(lambda x: [torch.nn.functional.dropout(x, 0.5)], torch.zeros(2, 7, 6))
    assert not Unit(drawn).draws and unit_of(drawn, "draws").draws
