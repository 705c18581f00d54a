"""Libraries around a sharded model: what accelerate, peft, Fabric and TensorBoard write is one
device's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tspc
from tests.support.models import make, tokens_of
from tests.dist.test_whole import adamw, compiled, steps

pytestmark = [pytest.mark.dist, pytest.mark.integrations]


def _lora(seed: int = 0) -> Any:
    from peft import LoraConfig, get_peft_model

    model = make("hf_llama", heads=2, kv_heads=2, layers=1)
    torch.manual_seed(seed)
    config = LoraConfig(r=1, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(model, config).double()


def by_peft(folder: str) -> None:
    model = _lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    fn, ids = compiled(model), tokens_of(9)
    for _ in range(2):
        fn(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(f"{folder}/adapter")
    state = tspc.full_state_dict(model)
    if dist.get_rank() == 0:
        torch.save(state, f"{folder}/whole.pt")


def test_peft_writes_whole_adapters(world: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    world(2).run(by_peft, folder=str(tmp_path))
    wanted, ids = _lora(seed=1), tokens_of(9)
    wanted.load_state_dict(torch.load(tmp_path / "whole.pt"))
    base = make("hf_llama", heads=2, kv_heads=2, layers=1)
    found = PeftModel.from_pretrained(base, tmp_path / "adapter", autocast_adapter_dtype=False)
    assert torch.equal(found.eval()(ids).logits, wanted.eval()(ids).logits)


def on_a_board(folder: str, model: Any, fn: Any) -> None:
    from torch.utils.tensorboard import SummaryWriter

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with SummaryWriter(folder) as writer:
        for step in range(2):
            fn(tokens_of(9), tokens_of(9)).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            writer.add_scalar("norm", norm, step)
            for n, p in model.named_parameters():
                writer.add_histogram(n, p, step)
                writer.add_histogram(f"{n}.grad", p.grad, step)
            optimizer.step()
            optimizer.zero_grad()


def boards(folder: str) -> None:
    """A board of every rank: a parameter's values are a collective."""
    model = make("gpt2_like", heads=2, layers=1)
    on_a_board(f"{folder}/{dist.get_rank()}", model, compiled(model))


def of_a_board(folder: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    found: dict[str, Any] = {t: [e.value for e in events.Scalars(t)] for t in tags["scalars"]}
    for t in tags["histograms"]:
        values = [e.histogram_value for e in events.Histograms(t)]
        found[t] = [x for v in values for x in (v.min, v.max, v.sum)]
        if not t.endswith(".grad"):  # there some are noise around 0, on either side of it
            found[t] += [count for v in values for count in v.bucket]
    return found


def test_a_board_shows_one_device_s_numbers(world: Any, tmp_path: Path) -> None:
    world(2).run(boards, folder=str(tmp_path / "ranks"))
    model = make("gpt2_like", heads=2, layers=1)
    on_a_board(str(tmp_path / "one"), model, model)
    wanted = of_a_board(tmp_path / "one")
    for rank in range(2):
        found = of_a_board(tmp_path / "ranks" / str(rank))
        assert found.keys() == wanted.keys() and len(found) > 8
        for tag, numbers in wanted.items():
            assert found[tag] == pytest.approx(numbers, rel=1e-6, abs=1e-12), tag


def by_accelerate(folder: str, safe: bool) -> list[float]:
    """Saved, two steps made, loaded into the same; -> the two steps again and anew."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    ranks = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": 2}
    ranks |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 29500}  # of the launcher; not used
    os.environ.update({k: str(v) for k, v in ranks.items()})
    try:
        return _accelerated(Accelerator(cpu=True), folder, safe)
    finally:
        for k in ranks:
            del os.environ[k]


def _accelerated(accelerator: Any, folder: str, safe: bool) -> list[float]:
    assert accelerator.num_processes == 2
    m = make("gpt2_like", heads=2, layers=1)
    fn = accelerator.prepare_model(compiled(m), evaluation_mode=True)  # no DDP around it
    optimizer = accelerator.prepare(adamw(m))
    steps(fn, optimizer, 0, 2)
    accelerator.save_state(folder, safe_serialization=safe)
    accelerator.save_model(fn, f"{folder}/model", max_shard_size="20KB")
    first = steps(fn, optimizer, 2, 2)
    accelerator.load_state(folder)
    return [*first, *steps(fn, optimizer, 2, 2)]


@pytest.mark.parametrize("safe", [True, False])
def test_accelerate_saves_and_loads(world: Any, tmp_path: Path, safe: bool) -> None:
    m = make("gpt2_like", heads=2, layers=1)
    optimizer = adamw(m)
    steps(m, optimizer, 0, 2)
    wanted = steps(m, optimizer, 2, 2)
    for losses in world(2).run(by_accelerate, folder=str(tmp_path), safe=safe):
        assert losses == pytest.approx([*wanted, *wanted], rel=1e-9)
    saved = torch.load(tmp_path / "optimizer.bin")
    plain = adamw(make("gpt2_like", heads=2, layers=1))
    plain.load_state_dict(saved)
    assert saved["state"][0]["exp_avg"].shape == plain.param_groups[0]["params"][0].shape
    again = make("gpt2_like", heads=2, layers=1, seed=5)
    tspc.load_safetensors(again, tmp_path / "model")
    assert steps(again, adamw(again), 2, 1) == pytest.approx(wanted[:1], rel=1e-9)


def by_fabric(folder: str) -> list[float]:
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    m = make("gpt2_like", heads=2, layers=1)
    fn, optimizer = compiled(m), adamw(m)
    steps(fn, optimizer, 0, 2)
    fabric.save(f"{folder}/fabric.pt", {"model": m, "optimizer": optimizer, "step": 2})
    first = steps(fn, optimizer, 2, 2)
    state = {"model": m, "optimizer": optimizer, "step": 0}
    fabric.load(f"{folder}/fabric.pt", state)
    assert state["step"] == 2
    return [*first, *steps(fn, optimizer, 2, 2)]


def test_fabric_saves_and_loads(world: Any, tmp_path: Path) -> None:
    m = make("gpt2_like", heads=2, layers=1)
    optimizer = adamw(m)
    steps(m, optimizer, 0, 2)
    wanted = steps(m, optimizer, 2, 2)
    for losses in world(2).run(by_fabric, folder=str(tmp_path)):
        assert losses == pytest.approx([*wanted, *wanted], rel=1e-9)
    saved = torch.load(tmp_path / "fabric.pt")
    plain = make("gpt2_like", heads=2, layers=1, seed=5)
    plain.load_state_dict(saved["model"])
    optimizer = adamw(plain)
    optimizer.load_state_dict(saved["optimizer"])
    assert steps(plain, optimizer, 2, 2) == pytest.approx(wanted, rel=1e-9)
