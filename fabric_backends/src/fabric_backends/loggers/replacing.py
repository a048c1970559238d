"""Files that a crash or a full disk leaves as they were or as they should be, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, beside ``path``, which takes its place when the block ends well.

    Raises:
        OSError: It cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Bring what was written to a file to the disk, if it is there.

    Raises:
        OSError: That fails.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())
