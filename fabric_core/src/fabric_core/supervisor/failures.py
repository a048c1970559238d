"""How a rank tells its supervisor why it failed: one small file per rank in a private directory."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

_SEEN = "__fabric_failed_at__"


@dataclass(frozen=True)
class Failure:
    """Why and when one rank failed.

    Attributes:
        rank: The global rank.
        exit_code: What its process ends with; 128 + N when signal N ended it.
        time: When it failed, in seconds of ``time.monotonic()``, which all processes of a machine share.
        summary: One line without its end.
        text: The full traceback, or what there is in its place; may be empty.
        shown: Whether the rank has shown ``text`` to the user itself.
    """

    rank: int
    exit_code: int
    time: float
    summary: str
    text: str = ""
    shown: bool = False


@contextmanager
def error_directory() -> Iterator[str]:
    """A directory that only this user may enter, for the ranks of one launch; removed at the end."""
    path = tempfile.mkdtemp(prefix="fabric-")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def mark_failure(error: BaseException) -> None:
    """Remember that ``error`` passes through now. Called on the rank it arose on, before anything is torn down.

    Closing a process group on the way out of a block makes the peers fail, and they may report it before this
    rank reports its cause. The mark keeps the order true. The first mark on an exception stays.
    """
    if not hasattr(error, _SEEN):
        setattr(error, _SEEN, time.monotonic())


def failed_at(error: BaseException) -> float:
    """When ``error``, or the earliest marked exception that it was raised from, was first seen."""
    times, seen, link = [time.monotonic()], set[int](), error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        times.append(getattr(link, _SEEN, times[0]))
        link = link.__cause__ or link.__context__  # type: ignore[assignment]
    return min(times)


def write_failure(error_dir: str, failure: Failure) -> None:
    """Leave a record for the supervisor. Atomic, because it may look at any moment.

    Raises:
        OSError: The record cannot be written.
    """
    path = _record_path(error_dir, failure.rank)
    with open(f"{path}.part", "w") as file:
        json.dump(asdict(failure), file)
    os.replace(f"{path}.part", path)


def read_failure(error_dir: str, rank: int) -> Failure | None:
    """The record of a rank, or ``None`` when it has left none."""
    try:
        with open(_record_path(error_dir, rank)) as file:
            return Failure(**json.load(file))
    except FileNotFoundError:
        return None


def _record_path(error_dir: str, rank: int) -> str:
    return os.path.join(error_dir, f"rank-{rank}")


def crash_path(error_dir: str, rank: int) -> str:
    """Where the interpreter of a rank dumps its stacks when it crashes."""
    return os.path.join(error_dir, f"rank-{rank}.crash")


def read_crash(error_dir: str, rank: int) -> tuple[float, str] | None:
    """When a rank crashed, in seconds of ``time.monotonic()``, and its stacks; ``None`` when it did not."""
    try:
        with open(crash_path(error_dir, rank), errors="backslashreplace") as file:
            text = file.read()
            age = time.time() - os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    return (time.monotonic() - age, text) if text else None
