"""Saving a folder of shards by all ranks together: it is there whole, or what was there before is."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fabric_core.beside import remove, remove_abandoned, temporary_for
from fabric_core.contracts.agreement import Agreement
from fabric_core.contracts.checkpoint_io import CheckpointIO
from fabric_core.disk import make_folders
from fabric_core.sharded.folders import check_replaceable
from fabric_core.sharded.writing import VALUES, finish, without_shares, write_part

__all__ = ["save_folder"]


def save_folder(
    path: Path, checkpoint: Any, *, io: CheckpointIO, agreement: Agreement, rank: int, world_size: int
) -> None:
    """Write a folder, and put it in the place of what was there before. Called on every rank.

    There are no collectives in it, so that a thread may do it while the training goes on.

    Args:
        path: Where it goes in the end.
        checkpoint: Every rank writes its shares (`fabric_core.sharded.shares.Share`), rank 0 everything else.
        io: Writes everything else.
        agreement: Of the ranks.
        rank: Of this process.
        world_size: How many ranks there are.

    Raises:
        CheckpointError: It cannot be written; on every rank. What was there before is intact.
    """
    temporary = temporary_for(path, agreement.of_rank_zero(secrets.token_hex(4)))

    def prepare() -> None:
        check_replaceable(path)
        remove_abandoned(path)
        make_folders(temporary)

    def finish_folder() -> None:
        io.save(temporary / VALUES, without_shares(checkpoint))
        finish(temporary, path, world_size, io.origin)

    def on_ranks(ranks: range, action: Callable[[], None]) -> None:
        intact = ". What was there before is untouched."
        agreement.on_ranks(ranks, action, f"write the checkpoint {str(path)!r}", intact)

    try:
        on_ranks(range(1), prepare)
        on_ranks(range(world_size), lambda: write_part(temporary, rank, checkpoint))
        on_ranks(range(1), finish_folder)
    finally:
        if rank == 0:
            remove(temporary)
