"""A checkpoint in safetensors files read straight into shards: each rank reads its own slices and
sends nothing. Beside the shards no more than one tensor is in memory."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

from tspc.base.errors import PlanError
from tspc.runtime.params.whole import identity, root_of
from tspc.seams.compiler import part_of
from tspc.seams.tensors import IncompatibleKeys

INDEX = ".safetensors.index.json"
PREFIX = "_orig_mod."  # of a compiled module


class _Slice(Protocol):
    """A tensor of a file, of which a part can be read."""

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, at: tuple[slice, ...], /) -> torch.Tensor: ...


class _File(Protocol):
    """What safetensors opens."""

    def keys(self) -> list[str]: ...

    def get_tensor(self, name: str, /) -> torch.Tensor: ...

    def get_slice(self, name: str, /) -> _Slice: ...


def load_safetensors(
    model: nn.Module, path: str | os.PathLike[str], strict: bool = True
) -> IncompatibleKeys:
    """Read a checkpoint of whole tensors into a model, compiled or not, sharded or not: each rank
    reads its slices only. Nothing is sent; call it on each rank that has a part of the model.

    path: a file, or a folder with one file, with parts and their index, or with several files. A
    tensor that the library left out because it is tied to another is no missing one. -> the
    missing and unexpected keys; with `strict` they are a `PlanError`, as are other shapes: nothing
    is read then.
    """
    root = root_of(model, "tspc.load_safetensors")
    files = _files(os.fspath(path))
    tensors = {n: x for n, x in root.state_dict().items() if isinstance(x, torch.Tensor)}
    shapes = _shapes(files)
    missing, unexpected, wrong = _compared(tensors, shapes)
    differences = [f"{n} is {list(tensors[n].shape)}, the file has {shapes[n][1]}" for n in wrong]
    if strict:
        differences += [f"{n} is not in the files" for n in missing]
        differences += [f"{n} is not in the model" for n in unexpected]
    on_meta = [n for n in shapes if n in tensors and tensors[n].is_meta]
    if on_meta:
        differences.append(f"{on_meta[0]} is on meta: model.to_empty(device=...) first")
    if differences:
        listed = "; ".join(differences[:8]) + (
            f"; and {len(differences) - 8} more" if len(differences) > 8 else ""
        )
        raise PlanError(f"{os.fspath(path)} does not fit the model: {listed}")
    with torch.no_grad():
        for file in files:
            with _open(file) as f:
                for key in sorted(f.keys()):
                    name = key.removeprefix(PREFIX)
                    if name in tensors:
                        _read(f, key, tensors[name])
    return IncompatibleKeys(missing, unexpected)


def _read(f: _File, key: str, target: torch.Tensor) -> None:
    """This rank's part, or a tensor that every rank has all of."""
    if not target.dim():
        target = target._local_tensor if isinstance(target, DTensor) else target
        target.copy_(f.get_tensor(key))
        return
    starts, local = part_of(target) if isinstance(target, DTensor) else ([0] * target.dim(), target)
    if local.numel():
        at = tuple(slice(s, s + n) for s, n in zip(starts, local.shape))
        local.copy_(f.get_slice(key)[at])


def _compared(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[str, list[int]]]
) -> tuple[list[str], list[str], list[str]]:
    """Names that are missing, unexpected, of other shapes."""
    read = {identity(x) for n, x in tensors.items() if n in shapes}
    missing = [n for n, x in tensors.items() if n not in shapes and identity(x) not in read]
    unexpected = [n for n in shapes if n not in tensors]
    wrong = [n for n, (_, s) in shapes.items() if n in tensors and list(tensors[n].shape) != s]
    return missing, unexpected, wrong


def _shapes(files: list[str]) -> dict[str, tuple[str, list[int]]]:
    """Name -> (file, shape)."""
    out = {}
    for file in files:
        with _open(file) as f:
            for key in sorted(f.keys()):
                out[key.removeprefix(PREFIX)] = file, list(f.get_slice(key).get_shape())
    return out


def _files(path: str) -> list[str]:
    if os.path.isfile(path) and path.endswith(".json"):
        return _indexed(path)
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise PlanError(f"tspc.load_safetensors: there is no file or folder {path}")
    names = sorted(os.listdir(path))
    single = [n for n in names if n.endswith(".safetensors")]
    index = [n for n in names if n.endswith(INDEX)]
    if "model.safetensors" in single:
        return [os.path.join(path, "model.safetensors")]
    if len(index) == 1:
        return _indexed(os.path.join(path, index[0]))
    if not single:
        raise PlanError(f"tspc.load_safetensors: {path} has no .safetensors file")
    return [os.path.join(path, n) for n in single]


def _indexed(index: str) -> list[str]:
    with open(index, encoding="utf-8") as f:
        names = sorted(set(json.load(f)["weight_map"].values()))
    return [os.path.join(os.path.dirname(index), n) for n in names]


@contextlib.contextmanager
def _open(file: str) -> Iterator[_File]:
    try:
        from safetensors import safe_open
    except ImportError as e:
        raise PlanError("tspc.load_safetensors needs the package safetensors") from e
    try:
        opened = safe_open(file, "pt", backend="pread")  # a mapped file counts as memory
    except TypeError:  # older
        opened = safe_open(file, "pt")
    with opened as f:
        yield f
