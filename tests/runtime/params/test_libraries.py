"""Writers of other libraries around a stored model: each gets whole tensors on the first rank."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

from tests.support.group import stored
from tspc.runtime.params import libraries


class Saving(nn.Module):
    """A library's model."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.saved: list[Any] = []

    def save_pretrained(self, folder: str, state_dict: Any = None) -> str:
        self.saved.append(self.state_dict() if state_dict is None else state_dict)
        return folder


@pytest.fixture
def sharded() -> Iterator[Saving]:
    torch.manual_seed(0)
    with stored(Saving()) as (m, _):
        yield m


def whole(state: dict[str, Any]) -> bool:
    return all(isinstance(x, torch.Tensor) and not isinstance(x, DTensor) for x in state.values())


def test_a_models_own_save_pretrained(sharded: Saving) -> None:
    assert sharded.save_pretrained("here") == "here" and whole(sharded.saved[-1])
    assert not whole(sharded.state_dict())
    sharded.save_pretrained("here", state_dict=dict(sharded.state_dict()))
    assert whole(sharded.saved[-1])
    plain = {"a": torch.ones(1)}
    sharded.save_pretrained("here", state_dict=plain)
    assert sharded.saved[-1] is plain
    assert hasattr(Saving.save_pretrained, "_tspc_plain")


def test_safetensors_writes_the_whole(sharded: Saving, tmp_path: Path) -> None:
    libraries.adapt()
    file = tmp_path / "m.safetensors"
    safetensors.torch.save_file(dict(sharded.state_dict()), file)
    state = safetensors.torch.load_file(file)
    assert torch.equal(state["linear.weight"], sharded.linear.weight.full_tensor())
    data = safetensors.torch.save(dict(sharded.state_dict()))
    assert safetensors.torch.load(data)["linear.bias"].shape == (4,)
    safetensors.torch.save_file({"x": torch.ones(2)}, file)
    assert safetensors.torch.load_file(file)["x"].tolist() == [1, 1]


def test_tied_shards_are_one_tensor(sharded: Saving, tmp_path: Path) -> None:
    libraries.adapt()
    sharded.other = nn.Linear(3, 4)
    sharded.other.weight = sharded.linear.weight
    file = tmp_path / "m.safetensors"
    safetensors.torch.save_model(sharded, str(file))
    names = set(safetensors.torch.load_file(file))
    assert len({"linear.weight", "other.weight"} & names) == 1


class Accelerator:
    def __init__(self, model: nn.Module) -> None:
        self._models, self._optimizers = [model], list[torch.optim.Optimizer]()

    def get_state_dict(self, model: nn.Module) -> dict[str, Any]:
        return model.state_dict()

    def save_state(self, folder: str) -> dict[str, Any]:
        return self._models[0].state_dict()


class Trainer:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.args = model, types.SimpleNamespace(save_only_model=False)
        self.optimizer = torch.optim.Adam(model.parameters())

    def save_model(self, folder: str) -> dict[str, Any]:
        return self.model.state_dict()

    def _save_checkpoint(self, folder: str) -> tuple[Any, Any]:
        return self.model.state_dict(), self.optimizer.state_dict()


class Strategy:
    def save_checkpoint(self, path: str, state: dict[str, Any]) -> dict[str, Any]:
        return state["model"].state_dict()


def test_libraries_that_are_imported_are_adapted_once(
    sharded: Saving, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {
        "accelerate.accelerator": {"Accelerator": Accelerator},
        "transformers.trainer": {"Trainer": Trainer},
        "lightning_fabric.strategies.strategy": {"Strategy": Strategy},
    }
    for name, members in modules.items():
        stand = types.ModuleType(name)
        vars(stand).update(members)
        monkeypatch.setitem(sys.modules, name, stand)
    monkeypatch.setattr(libraries, "_DONE", set())
    libraries.adapt()
    libraries.adapt()
    assert ("accelerate.accelerator", "Accelerator.save_state") in libraries._DONE
    accelerator, trainer = Accelerator(sharded), Trainer(sharded)
    assert whole(accelerator.get_state_dict(sharded)) and whole(accelerator.save_state("f"))
    assert whole(trainer.save_model("f"))
    sharded.linear(torch.ones(1, 3)).sum().backward()
    trainer.optimizer.step()
    state, of_optimizer = trainer._save_checkpoint("f")
    assert whole(state)
    assert type(of_optimizer["state"][0]["exp_avg"]) is torch.Tensor
    assert whole(Strategy().save_checkpoint("f", {"model": sharded}))
