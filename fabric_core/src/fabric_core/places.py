"""Where a checkpoint lies: on a disk, or on a store, by way of a folder on a disk. Strategies see local paths only."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fabric_core.contracts.agreement import Agreement
from fabric_core.contracts.strategy import Strategy
from fabric_core.errors import CheckpointError, WrongTypeError
from fabric_core.remote import Found, Remote, check_literal
from fabric_core.sharded.remainder import needs_file, read_now


def place_of(path: Any) -> Place:
    """The place that a user means by a path or an address. ``file://`` is a path.

    Raises:
        WrongTypeError: It is neither.
    """
    if not isinstance(path, str | os.PathLike):
        raise WrongTypeError(f"The path of a checkpoint is needed, not a {type(path).__name__}.")
    text = os.fsdecode(path)
    if text.startswith(_FILE):
        return LocalPlace(Path(text.removeprefix(_FILE)))
    return RemotePlace(text) if _ADDRESS.match(text) else LocalPlace(Path(text))


_FILE = "file://"
_ADDRESS = re.compile(r"[\w.+:-]+://")


@dataclass(frozen=True)
class Ranks:
    """One of the processes that put a checkpoint somewhere together, or get it.

    Attributes:
        agreement: How they agree.
        rank, world_size: Which one this is, and of how many.
        node_rank, local_rank, per_node: Its node, which one of its node it is, and of how many.
    """

    agreement: Agreement
    rank: int = 0
    world_size: int = 1
    node_rank: int = 0
    local_rank: int = 0
    per_node: int = 1

    @classmethod
    def of(cls, strategy: Strategy) -> Ranks:
        """All ranks of a job."""
        per_node = strategy.surroundings.processes_per_node
        where = (strategy.node_rank, strategy.local_rank, per_node)
        return cls(strategy.agreement, strategy.global_rank, strategy.world_size, *where)


ALONE = Ranks(Agreement(None, 0, 1))
"""A process that needs no other."""


class Place(ABC):
    """Where one checkpoint lies."""

    @abstractmethod
    def absolute(self) -> Place:
        """The same place, also when the working directory changes."""

    @abstractmethod
    def write(self, ranks: Ranks, save: Callable[[Path], None]) -> None:
        """Put a checkpoint there. Called on every one of ``ranks``.

        Args:
            ranks: Who writes it.
            save: Writes it to a path on a disk, on every rank.

        Raises:
            CheckpointError: It cannot be written; on every rank. What was there before is intact.
            ConfigurationError: It is an address that stands for others, too.
        """

    @abstractmethod
    def opened(self, ranks: Ranks) -> Any:
        """A context with the path on a disk where the checkpoint can be read, as long as it is open.

        Called on every one of ``ranks``.

        Raises:
            CheckpointError: There is none, or it cannot be fetched; on every rank.
        """

    @abstractmethod
    def kind(self) -> str | None:
        """What is there, to this process: a ``"file"``, a ``"folder"``, or nothing.

        Raises:
            CheckpointError: It cannot be reached.
        """

    @abstractmethod
    def read_again(self, tree: Any) -> Any:
        """Read what was left for later of a checkpoint that was opened, for this process alone.

        Args:
            tree: With `fabric_core.sharded.remainder.Later` in it.

        Raises:
            CheckpointError: It cannot be read any more, or is another checkpoint now.
        """


class LocalPlace(Place):
    """A path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def absolute(self) -> Place:
        """See `Place`."""
        return LocalPlace(self.path.absolute())

    def write(self, ranks: Ranks, save: Callable[[Path], None]) -> None:
        """See `Place`."""
        save(self.path)

    @contextmanager
    def opened(self, ranks: Ranks) -> Iterator[Path]:
        """See `Place`."""
        yield self.path

    def kind(self) -> str | None:
        """See `Place`."""
        if not self.path.exists():
            return None
        return "folder" if self.path.is_dir() else "file"

    def read_again(self, tree: Any) -> Any:
        """See `Place`."""
        return read_now(tree)


class RemotePlace(Place):
    """An address. What is written is complete on a disk first; what is read is fetched whole, once for each node."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._name = re.sub(r"//[^/@]*@", "//…@", url)  # without a password
        self._found: Found | None = None

    def __str__(self) -> str:
        return self._name

    def absolute(self) -> Place:
        """See `Place`."""
        return self

    def write(self, ranks: Ranks, save: Callable[[Path], None]) -> None:
        """See `Place`. Each rank uploads its share of the files; see [Note: remote folders]."""
        check_literal(self.url, self._name)
        agreement = ranks.agreement
        token = agreement.of_rank_zero(secrets.token_hex(8))
        staging = Path(agreement.of_rank_zero(tempfile.gettempdir())) / f"fabric-{token}"
        local = staging / "checkpoint"

        def prepare() -> None:
            Remote(self.url)  # what cannot be reached is better known before everything is written
            staging.mkdir(mode=0o700)

        def upload() -> None:
            if local.is_dir():
                names = sorted(entry.name for entry in local.iterdir())
                Remote(self.url).upload(local, names[ranks.rank :: ranks.world_size], token)

        def publish() -> None:
            if local.is_dir():
                Remote(self.url).publish_folder(local, staging / "pointer", token)
            else:
                Remote(self.url).publish_file(local, token)

        try:
            self._on_ranks(agreement, "write", prepare, range(1))
            self._save(save, local)
            self._on_ranks(agreement, "write", upload, range(ranks.world_size))
            self._on_ranks(agreement, "write", publish, range(1))
        finally:
            if ranks.rank == 0:
                shutil.rmtree(staging, ignore_errors=True)

    def _save(self, save: Callable[[Path], None], local: Path) -> None:
        try:
            save(local)
        except CheckpointError as error:
            raise CheckpointError(
                f"The checkpoint {self._name!r} cannot be written. It is written to the folder for temporary files "
                f"first, which all nodes have to share for a checkpoint in shards (TMPDIR): {error}"
            ) from error

    @contextmanager
    def opened(self, ranks: Ranks) -> Iterator[Path]:
        """See `Place`. The ranks of a node share the work and the copy."""
        agreement, everybody, first = ranks.agreement, range(ranks.world_size), ranks.local_rank == 0
        token = agreement.of_rank_zero(secrets.token_hex(8))
        staging = Path(tempfile.gettempdir()) / f"fabric-{token}-{ranks.node_rank}"
        found = self._find(agreement)

        def fetch() -> None:
            share = sorted(found.sizes)[ranks.local_rank :: ranks.per_node]
            Remote(self.url).fetch(found, share, staging)

        try:
            self._on_ranks(agreement, "read", lambda: staging.mkdir(mode=0o700) if first else None, everybody)
            self._on_ranks(agreement, "read", fetch, everybody)
            yield staging if found.folder is not None else staging / next(iter(found.sizes))
            agreement.first_failure(None, everybody)  # nobody reads any more
        finally:
            if first:
                shutil.rmtree(staging, ignore_errors=True)

    def kind(self) -> str | None:
        """See `Place`."""
        seen: list[str | None] = []
        ALONE.agreement.on_ranks(
            range(1), lambda: seen.append(Remote(self.url).kind()), f"look at {self._name!r}"
        )
        return seen[0]

    def read_again(self, tree: Any) -> Any:
        """See `Place`. It is fetched again, unless it is in memory still."""
        if not needs_file(tree):
            return read_now(tree)
        with self.opened(ALONE) as path:
            return read_now(tree, path)

    def _find(self, agreement: Agreement) -> Found:
        """What rank 0 finds; the second time, it has to be the same."""
        seen: list[Found] = []
        self._on_ranks(agreement, "read", lambda: seen.append(Remote(self.url).find()), range(1))
        found = Found(**json.loads(agreement.of_rank_zero(json.dumps(asdict(seen[0])) if seen else "")))
        if self._found not in (None, found):
            raise CheckpointError(f"At {self._name!r}, there is another checkpoint now.")
        self._found = found
        return found

    def _on_ranks(self, agreement: Agreement, verb: str, action: Callable[[], Any], ranks: range) -> None:
        """Do one part of the work on some ranks, and succeed or fail on all of them."""
        intact = ". What was there before is untouched." if verb == "write" else "."
        agreement.on_ranks(ranks, action, f"{verb} the checkpoint {self._name!r}", intact)
