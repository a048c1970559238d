"""The base of strategies whose checkpoints may be folders, to which every rank writes its part."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Literal, cast, get_args

from torch import Tensor
from torch.utils.serialization import config as serialization

from fabric_backends.strategies.parallel import ParallelStrategy
from fabric_core.contracts.folder import save_folder
from fabric_core.errors import OptionsError, did_you_mean
from fabric_core.sharded.single import MappedTensors
from fabric_core.sharded.trees import mapped

CheckpointKind = Literal["sharded", "full"]


class FolderStrategy(ParallelStrategy):
    """Writes a checkpoint in parts, as a whole or not at all, and succeeds or fails on all ranks alike.

    Args:
        checkpoint: How ``save`` writes. ``"sharded"``: a folder to which each rank writes what it holds. ``"full"``:
            one file, the same as strategies write whose ranks hold the whole model; rank 0 has to have the memory for
            it. Reading tells them apart by itself, on any number of ranks.
        options: Those of `ParallelStrategy`.

    Raises:
        OptionsError: There is no such kind of checkpoint.
    """

    def __init__(self, *, checkpoint: CheckpointKind = "sharded", **options: Any) -> None:
        super().__init__(**options)
        kinds = get_args(CheckpointKind)
        if checkpoint not in kinds:
            raise OptionsError(
                f"The option checkpoint is {checkpoint!r}.{did_you_mean(str(checkpoint), kinds)} It takes 'sharded' or "
                "'full'."
            )
        self.checkpoint: CheckpointKind = checkpoint

    def save_folder(self, path: Path, checkpoint: Any) -> None:
        """Write a folder, and put it in the place of what was there before. Called on every rank.

        Args:
            path: Where it goes in the end.
            checkpoint: Every rank writes its shares (`fabric_core.sharded.shares.Share`), rank 0 everything else.

        Raises:
            CheckpointError: It cannot be written; on every rank. What was there before is intact.
        """
        save_folder(
            path,
            checkpoint,
            io=self.surroundings.checkpoint_io,
            agreement=self.agreement,
            rank=self.global_rank,
            world_size=self.world_size,
        )

    def read_checkpoint(self, path: Path, weights_only: bool) -> dict[str, Any]:
        """Read a folder of shards, or one file; tensors are read when somebody restores them."""
        if not zipfile.is_zipfile(path):  # a folder, or the format of old, which cannot be mapped
            return super().read_checkpoint(path, weights_only)
        file, settings = MappedTensors(path), cast("Any", serialization)
        with settings.patch({"load.mmap": True}):
            checkpoint: dict[str, Any] = file.stored(super().read_checkpoint(path, weights_only))
        return checkpoint

    def plain_value(self, value: Any) -> Any:
        """As the contract. What is mapped from a file is copied, so that the file may change."""
        return super().plain_value(mapped(value, Tensor.clone, Tensor))
