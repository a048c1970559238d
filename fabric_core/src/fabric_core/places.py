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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fabric_core.contracts.strategy import Strategy
from fabric_core.errors import CheckpointError, WrongTypeError
from fabric_core.remote import Found, Remote


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


class Place(ABC):
    """Where one checkpoint lies. Each method is called on every rank."""

    @abstractmethod
    def absolute(self) -> Place:
        """The same place, also when the working directory changes."""

    @abstractmethod
    def write(self, strategy: Strategy, save: Callable[[Path], None]) -> None:
        """Put a checkpoint there.

        Args:
            strategy: Who this is, and how the ranks agree.
            save: Writes it to a path on a disk, on every rank.

        Raises:
            CheckpointError: It cannot be written; on every rank. What was there before is intact.
        """

    @abstractmethod
    def opened(self, strategy: Strategy) -> Any:
        """A context with the path on a disk where the checkpoint can be read, as long as it is open.

        Raises:
            CheckpointError: There is none, or it cannot be fetched; on every rank.
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

    def write(self, strategy: Strategy, save: Callable[[Path], None]) -> None:
        """See `Place`."""
        save(self.path)

    @contextmanager
    def opened(self, strategy: Strategy) -> Iterator[Path]:
        """See `Place`."""
        yield self.path


class RemotePlace(Place):
    """An address. What is written is complete on a disk first; what is read is fetched whole, once for each node."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._name = re.sub(r"//[^/@]*@", "//…@", url)  # without a password

    def __str__(self) -> str:
        return self._name

    def absolute(self) -> Place:
        """See `Place`."""
        return self

    def write(self, strategy: Strategy, save: Callable[[Path], None]) -> None:
        """See `Place`. Each rank uploads its share of the files; see [Note: remote folders]."""
        agreement, rank, ranks = strategy.agreement, strategy.global_rank, strategy.world_size
        token = agreement.of_rank_zero(secrets.token_hex(8))
        staging = Path(agreement.of_rank_zero(tempfile.gettempdir())) / f"fabric-{token}"
        local = staging / "checkpoint"

        def prepare() -> None:
            Remote(self._url)  # what cannot be reached is better known before everything is written
            staging.mkdir(mode=0o700)

        def upload() -> None:
            if local.is_dir():
                names = sorted(entry.name for entry in local.iterdir())
                Remote(self._url).upload(local, names[rank::ranks], token)

        def publish() -> None:
            if local.is_dir():
                Remote(self._url).publish_folder(local, staging / "pointer", token)
            else:
                Remote(self._url).publish_file(local, token)

        try:
            self._on_ranks(strategy, "write", prepare, range(1))
            self._save(save, local)
            self._on_ranks(strategy, "write", upload, range(ranks))
            self._on_ranks(strategy, "write", publish, range(1))
        finally:
            if rank == 0:
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
    def opened(self, strategy: Strategy) -> Iterator[Path]:
        """See `Place`. The ranks of a node share the work and the copy."""
        agreement, ranks, first = strategy.agreement, range(strategy.world_size), strategy.local_rank == 0
        token = agreement.of_rank_zero(secrets.token_hex(8))
        staging = Path(tempfile.gettempdir()) / f"fabric-{token}-{strategy.node_rank}"
        found = self._found(strategy)

        def fetch() -> None:
            share = sorted(found.sizes)[strategy.local_rank :: strategy.surroundings.processes_per_node]
            Remote(self._url).fetch(found, share, staging)

        try:
            self._on_ranks(strategy, "read", lambda: staging.mkdir(mode=0o700) if first else None, ranks)
            self._on_ranks(strategy, "read", fetch, ranks)
            yield staging if found.folder is not None else staging / next(iter(found.sizes))
            agreement.first_failure(None, ranks)  # nobody reads any more
        finally:
            if first:
                shutil.rmtree(staging, ignore_errors=True)

    def _found(self, strategy: Strategy) -> Found:
        """What rank 0 finds."""
        seen: list[Found] = []
        self._on_ranks(strategy, "read", lambda: seen.append(Remote(self._url).find()), range(1))
        text = strategy.agreement.of_rank_zero(json.dumps(asdict(seen[0])) if seen else "")
        return Found(**json.loads(text))

    def _on_ranks(self, strategy: Strategy, verb: str, action: Callable[[], Any], ranks: range) -> None:
        """Do one part of the work on some ranks, and succeed or fail on all of them."""
        intact = ". What was there before is untouched." if verb == "write" else "."
        strategy.agreement.on_ranks(ranks, action, f"{verb} the checkpoint {self._name!r}", intact)
