"""accelerate and Trainer on 2 replicas of 2 ranks: losses, metrics, weights and files are those of
the same script on 2 processes of DDP."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, IterableDataset

import tspc
import tspc.trainer
from examples.llama_like import LlamaLike
from tests.support.world import World
from tspc.backend.simulated import relative_errors

pytestmark = [pytest.mark.dist, pytest.mark.integrations]
VOCABULARY, LENGTH = 53, 9
FIRST, LAST = ("replicas", "tsp"), ("tsp", "replicas")


@pytest.fixture(scope="module")
def on_ranks() -> Iterator[World]:
    """Worlds of this file's own, for `register` lasts as long as its process."""
    world = World(4)
    yield world
    world.close()


@pytest.fixture(scope="module")
def by_ddp() -> Iterator[World]:
    world = World(2)
    yield world
    world.close()


class Words(LlamaLike):
    """Takes and returns what Trainer's models do."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(VOCABULARY, 16, 1, 4, 2, 24)
        self.dropout = dropout

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None, **_: Any
    ) -> dict[str, Tensor]:
        x = super().forward(input_ids)
        logits = F.dropout(x, self.dropout, self.training)
        wanted = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = F.cross_entropy(logits.flatten(0, 1), wanted, reduction=reduction)
        if num_items_in_batch is not None:
            loss = loss / num_items_in_batch
        return {"loss": loss, "logits": logits}

    def num_parameters(self, exclude_embeddings: bool) -> int:
        return 7


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(9))


def words(dropout: float = 0.0) -> Words:
    torch.manual_seed(0)
    return Words(dropout).double()


def texts(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    rows = [x[: LENGTH - 2 * (i % 2)] for i, x in enumerate(draws)]
    return [{"input_ids": x, "labels": x} for x in rows]


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    length = max(len(r["labels"]) for r in rows)

    def joined(name: str, fill: int) -> Tensor:
        return torch.stack([F.pad(r[name], (0, length - len(r[name])), value=fill) for r in rows])

    return {"input_ids": joined("input_ids", 0), "labels": joined("labels", -100)}


@contextlib.contextmanager
def launched(options: dict[str, Any] | None, axes: tuple[str, str] | None = None) -> Iterator[None]:
    """The environment of a launcher; with options tspc is registered, on the axes if any."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    env = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "MASTER_ADDR": "localhost"}
    env |= {"WORLD_SIZE": dist.get_world_size(), "LOCAL_WORLD_SIZE": dist.get_world_size()}
    env |= {"MASTER_PORT": 29500}  # not used
    os.environ.update({k: str(v) for k, v in env.items()})
    if options is not None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=axes) if axes else None
        tspc.trainer.register(mesh=mesh, compiler="eager", **options)
    try:
        yield
    finally:
        for k in env:
            del os.environ[k]


def whole(model: Any) -> dict[str, Tensor]:
    """On rank 0."""
    sharded = any(isinstance(p, torch.distributed.tensor.DTensor) for p in model.parameters())
    return tspc.full_state_dict(model) if sharded else model.state_dict()


def looped(
    options: dict[str, Any] | None, axes: Any, folder: str, resume: str | None, seeded: bool
) -> dict[str, Any]:
    with launched(options, axes):
        from accelerate import Accelerator
        from accelerate.utils import DataLoaderConfiguration

        kwargs: dict[str, Any] = {} if options is None else {"dynamo_backend": "tsp"}
        kwargs["dataloader_config"] = DataLoaderConfiguration(use_seedable_sampler=seeded)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **kwargs)
        return {**_loop(accelerator, folder, resume), **_collected(accelerator)}


def _loop(accelerator: Any, folder: str, resume: str | None) -> dict[str, Any]:
    """Two epochs, a checkpoint after the first."""
    model = words()
    torch.manual_seed(5 + accelerator.process_index)  # the order of the data is process 0's
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=12)
    train = DataLoader(texts(14, 1), batch_size=2, shuffle=True, collate_fn=padded)  # type: ignore[arg-type]
    test = DataLoader(texts(7, 2), batch_size=2, collate_fn=padded)  # type: ignore[arg-type]
    raw = model
    model, optimizer, scheduler, train, test = accelerator.prepare(
        model, optimizer, scheduler, train, test
    )
    if resume is not None:
        accelerator.load_state(resume)
    losses, norms, rates, tests = [], [], [], []
    for epoch in range(0 if resume is None else 1, 2):
        train.set_epoch(epoch)
        for batch in train:
            with accelerator.accumulate(model):
                loss = model(**batch)["loss"]
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            rates.append(scheduler.get_last_lr()[0])
        tests.append(_evaluated(accelerator, model, test))
        if epoch == 0:
            accelerator.save_state(folder)
    weights = whole(raw)
    return {"losses": losses, "norms": norms, "rates": rates, "tests": tests, "weights": weights}


def _evaluated(accelerator: Any, model: Any, test: Any) -> list[Any]:
    """The loss of each text, those that are twice to fill the last batches too; their sums."""
    model.eval()
    losses, sums = [], []
    with torch.no_grad():
        for batch in test:
            rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)]
            losses += [model(**row)["loss"] for row in rows]
            sums.append(accelerator.gather_for_metrics(batch["input_ids"].sum(1)))
    model.train()
    return [accelerator.gather(torch.stack(losses)).tolist(), torch.cat(sums).tolist()]


def _collected(accelerator: Any) -> dict[str, Any]:
    """What the processes of accelerate say to each other."""
    from accelerate.utils import broadcast, broadcast_object_list, gather_object, set_seed

    i = accelerator.process_index
    stream = accelerator.prepare_data_loader(DataLoader(Stream(), batch_size=2))
    streamed = [(x.tolist(), accelerator.gather_for_metrics(x).tolist()) for x in stream]
    x = torch.arange(i + 1, dtype=torch.float64) + 1
    with accelerator.split_between_processes(list("abcde")) as inputs:
        part = list(inputs)
    objects = [{"of": i} if accelerator.is_main_process else None]
    if dist.get_rank() == dist.get_world_size() - 1:
        accelerator.set_trigger()
    stops = [accelerator.check_trigger(), accelerator.check_trigger()]
    set_seed(3, device_specific=True)
    drawn = torch.rand(1).item()
    once = accelerator.on_main_process(lambda: 1)()
    ends = accelerator.gather(torch.tensor(int(accelerator.is_last_process)))
    return {
        "processes": (accelerator.num_processes, i, part, drawn),
        "streamed": streamed,
        "gathered": accelerator.gather(x[:1]).tolist(),
        "padded": accelerator.gather(accelerator.pad_across_processes(x)).tolist(),
        "reduced": [accelerator.reduce(x[:1], how).item() for how in ("sum", "mean")],
        "objects": [gather_object([f"of {i}"]), broadcast_object_list(objects)],
        "sent": broadcast(x[:1].clone(), from_process=1).item(),
        "stops": stops,
        "mains": (once, accelerator.is_main_process, ends.sum().item()),
    }


def equal_to_ddp(many: list[dict[str, Any]], two: list[dict[str, Any]], axes: Any = FIRST) -> None:
    """Each rank's results are those of its replica's process; weights of the first."""
    weights = [runs[0].pop("weights") for runs in (many, two)]
    assert max(relative_errors(*weights).values()) <= 1e-9
    for rank, run in enumerate(many):
        replica = rank // 2 if axes == FIRST else rank % 2
        wanted = dict(two[replica])
        for results in (run, wanted):
            results.pop("weights", None)
            once = results.pop("mains", None)
            assert once is None or (once[0] == 1) is once[1]
        assert run.keys() == wanted.keys()
        for k in run:
            ours, theirs = flat(run[k]), flat(wanted[k])
            assert [type(x) for x in ours] == [type(x) for x in theirs], k
            assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-9), k
            assert set(ours) - set(numbers(ours)) == set(theirs) - set(numbers(theirs)), k


def flat(x: Any) -> list[Any]:
    """Numbers and texts, in order."""
    if isinstance(x, dict):
        return flat(list(x.items()))
    return [z for y in x for z in flat(y)] if isinstance(x, (list, tuple)) else [x]


def numbers(x: list[Any]) -> list[float]:
    return [y for y in x if isinstance(y, (int, float))]


@pytest.mark.parametrize(
    "axes, options, seeded",
    [(FIRST, {}, False), (LAST, {"replicas": "shard"}, True)],
    ids=["replicate", "shard"],
)
def test_a_loop_of_accelerate(
    on_ranks: World, by_ddp: World, tmp_path: Path, axes: Any, options: dict[str, Any], seeded: bool
) -> None:
    def ours(resume: str | None) -> list[dict[str, Any]]:
        kwargs = {"options": options, "axes": axes, "seeded": seeded, "folder": folders[0]}
        return on_ranks.run(looped, resume=resume, **kwargs)

    def theirs(resume: str | None) -> list[dict[str, Any]]:
        kwargs = {"options": None, "axes": None, "seeded": seeded, "folder": folders[1]}
        return by_ddp.run(looped, resume=resume, **kwargs)

    folders = [str(tmp_path / "ours"), str(tmp_path / "theirs")]
    many, two = ours(None), theirs(None)
    assert [run["mains"][:2] for run in many] == [(1, True)] + 3 * [(None, False)]
    assert many[0]["mains"][2] == two[0]["mains"][2] == 1  # one is the last
    assert sorted(os.listdir(folders[0])) == sorted(os.listdir(folders[1]))
    assert "random_states_1.pkl" in os.listdir(folders[0])
    end = many[0]["losses"][4:], many[0]["weights"]
    equal_to_ddp(many, two, axes)
    again = ours(folders[1])
    if seeded:  # else the order of the data begins anew, with DDP too
        assert again[0]["losses"] == pytest.approx(end[0], rel=1e-9)
        assert max(relative_errors(again[0]["weights"], end[1]).values()) <= 1e-9
    equal_to_ddp(again, theirs(folders[0]), axes)


def trained(
    options: dict[str, Any] | None, axes: Any, folder: str, resume: str | None, dropout: float = 0.0
) -> dict[str, Any]:
    """Trainer's numbers, and its files, of 4 steps in a bit more than one epoch."""
    with launched(options, axes):
        from transformers import Trainer, TrainingArguments

        rights: list[float] = []

        def right(found: Any) -> dict[str, float]:
            rights.extend(found.predictions.ravel().tolist())
            hits = found.predictions[:, :-1] == found.label_ids[:, 1:]
            return {"right": float(hits.mean()), "of": len(hits)}

        arguments = TrainingArguments(
            folder,
            max_steps=4,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            max_grad_norm=0.5,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            include_num_input_tokens_seen=True,
            remove_unused_columns=False,
            torch_compile_backend=None if options is None else "tsp",
        )
        model = words(dropout)
        trainer = Trainer(
            model,
            arguments,
            data_collator=padded,
            train_dataset=texts(22, 1),  # type: ignore[arg-type]
            eval_dataset=texts(7, 2),  # type: ignore[arg-type]
            compute_metrics=right,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        )
        trainer.train(resume_from_checkpoint=resume)
        timed = ("runtime", "per_second")
        history = [
            {k: v for k, v in entry.items() if not k.endswith(timed)}
            for entry in trainer.state.log_history
        ]
        return {
            "floats32": [entry.pop("loss", 0.0) for entry in history]
            + [entry.pop("train_loss", 0.0) for entry in history],
            "history": history,
            "rights": rights,
            "says": (arguments.world_size, arguments.process_index),
            "writes": (trainer.is_world_process_zero(), arguments.should_save),
            "weights": whole(model),
        }


def state_of(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "checkpoint-4", "trainer_state.json").read_text())


@pytest.mark.parametrize(
    "axes, options", [(LAST, {}), (FIRST, {"replicas": "shard"})], ids=["replicate", "shard"]
)
def test_trainer(
    on_ranks: World, by_ddp: World, tmp_path: Path, axes: Any, options: dict[str, Any]
) -> None:
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    kwargs = {"options": options, "axes": axes, "folder": ours}
    many = on_ranks.run(trained, resume=None, **kwargs)
    two = by_ddp.run(trained, options=None, axes=None, folder=theirs, resume=None)
    assert [run.pop("writes") for run in many] == [(True, True)] + 3 * [(False, False)]
    for step in ("checkpoint-2", "checkpoint-4"):
        files = [sorted(os.listdir(Path(f, step))) for f in (ours, theirs)]
        assert files[0] == files[1] and "rng_state_1.pth" in files[0]
    ends = [state_of(f) for f in (ours, theirs)]
    for k in ("total_flos", "num_input_tokens_seen", "global_step", "train_batch_size"):
        assert ends[0][k] == ends[1][k] > 0
    first = many[0]
    equal_runs(many, two, axes)
    again = on_ranks.run(trained, resume=f"{theirs}/checkpoint-2", **kwargs)
    assert again[0].pop("writes") == (True, True)
    assert max(relative_errors(again[0]["weights"], first["weights"]).values()) <= 1e-9
    assert [entry["step"] for entry in again[0]["history"]] == [
        entry["step"] for entry in first["history"]
    ]


def equal_runs(many: list[dict[str, Any]], two: list[dict[str, Any]], axes: Any) -> None:
    """Losses of the log are sums in float32."""
    weights = many[0]["weights"]
    rounded = [[run.pop("floats32") for run in runs] for runs in (many, two)]
    for run in rounded[0]:
        assert run == pytest.approx(rounded[1][0], rel=1e-6)
    for run in (*many, *two):
        run.pop("writes", None)
    equal_to_ddp(many, two, axes)
    many[0]["weights"] = weights


def test_one_replica_counts_once(on_ranks: World, tmp_path: Path) -> None:
    """`total_flos` and the losses are one device's."""
    folder = str(tmp_path)
    many = on_ranks.run(trained, options={}, axes=None, folder=folder, resume=None, dropout=0.1)
    assert state_of(folder)["total_flos"] == 6 * 7 * state_of(folder)["num_input_tokens_seen"]
    assert [run["says"] for run in many] == 4 * [(1, 0)]
    assert all(run["floats32"] == many[0]["floats32"] for run in many)
    kwargs = {"options": {}, "axes": None, "folder": folder, "dropout": 0.1}
    again = on_ranks.run(trained, resume=f"{folder}/checkpoint-2", **kwargs)
    assert max(relative_errors(again[0]["weights"], many[0]["weights"]).values()) <= 1e-9


def refused() -> list[str]:
    """What is told at once."""
    from accelerate import Accelerator
    from accelerate.utils import TorchDynamoPlugin

    messages = []

    def tried(do: Callable[[], object]) -> None:
        with pytest.raises(tspc.OptionError) as caught:
            do()
        messages.append(str(caught.value))

    with launched({}, FIRST):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=FIRST)
        tried(lambda: tspc.trainer.register(mesh=mesh["tsp"]))
        accelerator = Accelerator(cpu=True)  # compiles nothing
        tried(lambda: tspc.trainer.register())
        model, optimizer = accelerator.prepare(words(), torch.optim.SGD(words().parameters()))
        row = padded(texts(1, 0))
        optimizer.add_param_group({"params": model.head.weight})
        accelerator.backward(model(**row)["loss"])
        tried(optimizer.step)
        tried(lambda: accelerator.join_uneven_inputs([model], even_batches=False).__enter__())
        plugin = TorchDynamoPlugin(backend="tsp", options={"mesh": mesh["tsp"]})  # type: ignore[arg-type]
        tried(plugin.to_kwargs)
    return messages


def test_what_cannot_be_is_told(on_ranks: World) -> None:
    parts = ["the mesh has the ranks", "call register() first", "are not averaged over the"]
    parts += ["as many steps each", "tspc.trainer.register(mesh=...)"]
    for messages in on_ranks.run(refused):
        assert len(messages) == len(parts)
        assert all(part in text for part, text in zip(parts, messages)), messages
