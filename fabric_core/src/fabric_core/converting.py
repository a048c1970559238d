"""Checkpoints in another form: a folder of shards as one file, one file as a folder, weights as safetensors."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fabric_core.beside import remove, temporary_for
from fabric_core.disk import flush, make_folders
from fabric_core.errors import CheckpointError, CheckpointKeyError, ConfigurationError, listing
from fabric_core.parts.torch_file import TorchFile
from fabric_core.places import ALONE, place_of
from fabric_core.sharded.boxes import Box
from fabric_core.sharded.dtypes import NAMES
from fabric_core.sharded.folders import check_replaceable
from fabric_core.sharded.reading import read_checkpoint
from fabric_core.sharded.safetensors import write_safetensors
from fabric_core.sharded.shares import Share
from fabric_core.sharded.stored import StoredTensor, plain
from fabric_core.sharded.trees import mapped
from fabric_core.sharded.writing import VALUES, finish, without_shares, write_part

__all__ = ["consolidate", "consolidated", "shard"]

SAFETENSORS = ".safetensors"


def consolidated(
    path: str | os.PathLike[str], key: str | None = None, *, weights_only: bool = True
) -> dict[str, Any]:
    """Everything in a checkpoint that ``fabric.save`` wrote, as plain values on the CPU.

    Called in one process, of any program: the ranks that wrote it are not needed, but memory for all of it.

    Args:
        path: A folder of shards, or one file: a path, or the address of a store.
        key: Only what is under this key, such as ``"model"``; dots lead into dictionaries.
        weights_only: ``False`` allows the checkpoint to execute code while it is read. Only for what you trust.

    Returns:
        What was saved, by the same keys: tensors whole, states of optimizers as PyTorch has them.

    Raises:
        CheckpointError: There is none, or it is damaged.
        CheckpointKeyError: It has no such key.
        UnsafeCheckpointError: It holds more than ``weights_only`` allows.
    """
    source = place_of(path)
    with source.opened(ALONE) as local:
        whole: dict[str, Any] = plain(_stored(local, str(source), key, weights_only))
    return whole


def consolidate(
    path: str | os.PathLike[str],
    file: str | os.PathLike[str],
    key: str | None = None,
    *,
    weights_only: bool = True,
) -> None:
    """Write a checkpoint, or what is under one of its keys, as one file.

    Args:
        path, key, weights_only: As `consolidated`.
        file: What is there is replaced. ``.safetensors`` takes nothing but tensors, by their names, and they are read
            and written one by one; anything else becomes a file that ``torch.load`` reads.

    Raises:
        CheckpointError: As `consolidated`; or it cannot be written.
    """
    source, there = place_of(path), place_of(file)
    with source.opened(ALONE) as local:
        found = _stored(local, str(source), key, weights_only)
        if os.fspath(file).endswith(SAFETENSORS):
            tensors = _only_tensors(found, key)
            there.write(
                ALONE,
                lambda place: _replace(place, lambda temporary: write_safetensors(temporary, tensors, plain)),
            )
        else:
            there.write(ALONE, lambda place: TorchFile().save(place, plain(found)))


def _only_tensors(tensors: Mapping[Any, Any], key: str | None) -> dict[str, Any]:
    others = [name for name, value in tensors.items() if not isinstance(value, Tensor | StoredTensor)]
    if others:
        where = "the checkpoint" if key is None else f"what the checkpoint has under {key!r}"
        raise CheckpointError(
            f"A file of safetensors holds tensors and nothing else, and in {where}, {listing(map(repr, others))} are "
            "none. Name the state dict of a model, such as --key model, or write a file of torch.save."
        )
    return {str(name): value for name, value in tensors.items()}


def shard(
    file: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    shards: int = 1,
    *,
    weights_only: bool = True,
) -> None:
    """Write a checkpoint in one file as a folder, as so many ranks would have written it.

    Args:
        file: A file of ``torch.save`` or of safetensors. It is read whole, once.
        folder: What is there is replaced.
        shards: How many files the tensors are divided into, along their first dimension; 1 or more.
        weights_only: As `consolidated`.

    Raises:
        CheckpointError: It cannot be read, or cannot be written.
        ConfigurationError: There would be no shards.
    """
    if shards < 1:
        raise ConfigurationError(f"shards={shards!r}: a checkpoint in shards has 1 or more of them.")
    checkpoint = consolidated(file, weights_only=weights_only)
    place_of(folder).write(ALONE, lambda place: _write_folder(place, checkpoint, shards))


def _write_folder(folder: Path, checkpoint: Any, shards: int) -> None:
    temporary = temporary_for(folder, secrets.token_hex(4))
    try:
        check_replaceable(folder)
        make_folders(temporary)
        for rank in range(shards):
            write_part(temporary, rank, _divided(checkpoint, rank, shards))
        TorchFile().save(temporary / VALUES, without_shares(_divided(checkpoint, 0, shards)))
        finish(temporary, folder, shards, {})
    except OSError as error:
        raise CheckpointError(f"Cannot write a checkpoint to {str(folder)!r}: {error}.") from error
    finally:
        remove(temporary)


def _stored(local: Path, name: str, key: str | None, weights_only: bool) -> Any:
    """What is under a key of a checkpoint that has a name, and lies on this disk."""
    found: Any = read_checkpoint(local, lambda file: TorchFile().load(file, weights_only=weights_only))
    for part in () if key is None else key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            there = listing(map(repr, found)) if isinstance(found, Mapping) else type(found).__name__
            raise CheckpointKeyError(f"The checkpoint {name!r} has no {key!r}. There is: {there}.")
        found = found[part]
    if not isinstance(found, Mapping):
        raise CheckpointError(f"What {name!r} holds is a {type(found).__name__}, and no dictionary.")
    return found


def _divided(checkpoint: Any, rank: int, shards: int) -> Any:
    """A checkpoint as one of several ranks has it. What files of shards cannot hold stays in it."""

    def share(tensor: Tensor) -> Any:
        known = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        if not (known and tensor.dtype in NAMES and tensor.dim() and tensor.numel()):
            return tensor
        begin, end = (tensor.shape[0] * edge // shards for edge in (rank, rank + 1))
        box = Box((begin, *(0 for _ in tensor.shape[1:])), (end - begin, *tensor.shape[1:]))
        parts = ((box, tensor.detach()[begin:end]),) if begin < end else ()
        return Share(tensor.shape, tensor.dtype, parts)

    return mapped(checkpoint, share, Tensor)


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name, and put it in its place."""
    temporary = temporary_for(file, secrets.token_hex(4))
    try:
        make_folders(file.parent)
        write(temporary)
        os.replace(temporary, file)
        flush(file.parent)
    except OSError as error:
        raise CheckpointError(f"Cannot write {str(file)!r}: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
