"""A checkpoint in pieces, as a whole: for strategies that know nothing of pieces, and for other programs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fabric_backends.sharding import folder as folders
from fabric_core.errors import CheckpointError
from fabric_core.parts.torch_file import TorchFile
from fabric_deepspeed import pieces


def consolidate(path: str | os.PathLike[str], *, weights_only: bool = True) -> dict[str, Any]:
    """Everything in a checkpoint that ``fabric.save`` wrote under DeepSpeed, as plain values on the CPU.

    Called in one process, of any program: neither DeepSpeed nor the ranks that wrote it are needed, but memory for all
    of it.

    Example:
        >>> torch.save(consolidate("checkpoints/last"), "checkpoints/last.pt")  # fabric.load reads it everywhere

    Args:
        path: The folder.
        weights_only: ``False`` allows its files to execute code while they are read.

    Returns:
        What was saved, by the same keys: weights in float32, states of optimizers as PyTorch has them.

    Raises:
        CheckpointError: There is none, or it is damaged.
        UnsafeCheckpointError: It holds more than ``weights_only`` allows.
    """
    folder = folders.find(Path(path))
    if folder is None:
        raise CheckpointError(
            f"There is no checkpoint in pieces at {str(path)!r}: it is not a folder. A checkpoint in one file is whole "
            "as it is."
        )
    folders.ShardedFolder(folder)  # looks whether it is finished, and all there
    values = TorchFile().load(folder / folders.VALUES, weights_only=weights_only)
    whole: dict[str, Any] = pieces.plain(pieces.with_stored(values, folder, weights_only))
    return whole
