"""The base of strategies whose checkpoints may be folders, to which every rank writes its part."""

from __future__ import annotations

import secrets
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast, get_args

from torch import Tensor
from torch.utils.serialization import config as serialization

from fabric_backends.strategies.parallel import ParallelStrategy
from fabric_core.beside import remove, remove_abandoned, temporary_for
from fabric_core.disk import make_folders
from fabric_core.errors import OptionsError, did_you_mean
from fabric_core.sharded.folders import check_replaceable
from fabric_core.sharded.reading import MappedTensors
from fabric_core.sharded.trees import mapped
from fabric_core.sharded.writing import VALUES, finish, without_shares, write_part

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
        temporary = temporary_for(path, self.agreement.of_rank_zero(secrets.token_hex(4)))
        io = self.surroundings.checkpoint_io

        def prepare() -> None:
            check_replaceable(path)
            remove_abandoned(path)
            make_folders(temporary)

        def finish_folder() -> None:
            io.save(temporary / VALUES, without_shares(checkpoint))
            finish(temporary, path, self.world_size, io.origin)

        def on_ranks(ranks: range, action: Callable[[], None]) -> None:
            intact = ". What was there before is untouched."
            self.agreement.on_ranks(ranks, action, f"write the checkpoint {str(path)!r}", intact)

        try:
            on_ranks(range(1), prepare)
            on_ranks(range(self.world_size), lambda: write_part(temporary, self.global_rank, checkpoint))
            on_ranks(range(1), finish_folder)
        finally:
            if self.global_rank == 0:
                remove(temporary)

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
