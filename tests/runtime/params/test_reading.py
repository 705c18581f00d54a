"""Safetensors files read into a model, stored or plain: values, folders, what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import save_file

from tests.support.group import stored
from tspc.base.errors import PlanError
from tspc.runtime.params import reading
from tspc.runtime.params.reading import load_safetensors


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(3, 4)
        self.two.weight = self.one.weight
        self.register_buffer("steps", torch.tensor(3))


STATE = {
    "one.weight": torch.randn(4, 3),
    "one.bias": torch.randn(4),
    "two.bias": torch.randn(4),
    "steps": torch.tensor(7),
}


def test_values_of_a_file_in_shards_and_plain(tmp_path: Path) -> None:
    save_file({f"_orig_mod.{k}": v for k, v in STATE.items()}, tmp_path / "m.safetensors")
    with stored(Tied()) as (m, _):
        for target in (m, Tied()):
            result = load_safetensors(target, tmp_path / "m.safetensors")
            assert (result.missing_keys, result.unexpected_keys) == ([], [])
            state = target.state_dict()
            for k, v in STATE.items():
                x = state[k].full_tensor() if hasattr(state[k], "full_tensor") else state[k]
                assert torch.equal(x, v), k


def test_a_folder_of_parts_with_or_without_an_index(tmp_path: Path) -> None:
    names = list(STATE)
    for i, part in enumerate((names[:2], names[2:])):
        save_file({k: STATE[k] for k in part}, tmp_path / f"p{i}.safetensors")
    m = Tied()
    load_safetensors(m, tmp_path)
    assert torch.equal(m.two.bias, STATE["two.bias"])
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {k: "p0.safetensors" for k in names[:2]}}))
    for path in (tmp_path, index):
        assert reading._files(str(path)) == [str(tmp_path / "p0.safetensors")]
    save_file(STATE, tmp_path / "model.safetensors")
    assert reading._files(str(tmp_path)) == [str(tmp_path / "model.safetensors")]


def test_what_does_not_fit_is_told_before_anything_is_read(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file({**STATE, "one.bias": torch.ones(5), "more": torch.ones(1)}, file)
    m = Tied()
    before = m.one.weight.detach().clone()
    with pytest.raises(PlanError) as caught:
        load_safetensors(m, file)
    text = str(caught.value)
    assert "one.bias is [4], the file has [5]" in text and "more is not in the model" in text
    assert torch.equal(m.one.weight, before)
    save_file({"one.weight": STATE["one.weight"]}, file)
    with pytest.raises(PlanError, match="one.bias is not in the files; two.bias is not"):
        load_safetensors(m, file)
    result = load_safetensors(m, file, strict=False)
    assert sorted(result.missing_keys) == ["one.bias", "steps", "two.bias"]
    assert torch.equal(m.two.weight, STATE["one.weight"])
    with torch.device("meta"):
        on_meta = Tied()
    with pytest.raises(PlanError, match="one.weight is on meta"):
        load_safetensors(on_meta, file, strict=False)


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="has no .safetensors file"):
        load_safetensors(Tied(), tmp_path)
    with pytest.raises(PlanError, match="there is no file or folder"):
        load_safetensors(Tied(), tmp_path / "none")
