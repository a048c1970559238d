"""What a manager needs of a place for many checkpoints: a folder on a disk, or an address on a store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any


class Directory(ABC):
    """Entries by name. Used on rank 0 only. ``str()`` of it is for messages.

    Raises:
        CheckpointError, OSError: It cannot be read, or written.
    """

    parts_show: bool
    """Whether a checkpoint can be seen under its name while it is being written, or when it is half deleted."""

    @abstractmethod
    def at(self, name: str) -> Any:
        """Where an entry is, for ``fabric.save`` and ``fabric.load``."""

    @abstractmethod
    def names(self) -> list[str]:
        """The names of all entries, sorted; none when there is no such place."""

    @abstractmethod
    def finished(self, names: Iterable[str]) -> set[str]:
        """Which of these checkpoints are whole."""

    @abstractmethod
    def texts(self, names: Iterable[str]) -> Mapping[str, str | Exception]:
        """What stands in small files, or why they cannot be read; those that are not there are left out."""

    @abstractmethod
    def write(self, name: str, text: str) -> None:
        """Write a small file, whole or not at all. What is there is replaced."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a small file, if it is there."""

    @abstractmethod
    def claim(self, prefix: str) -> bool:
        """Become the only training that saves under a prefix. Called before each save.

        Returns:
            Whether this process was not that before, so that what another one has left may be cleared away.

        Raises:
            CheckpointError: Another training is it.
        """

    @abstractmethod
    def clear(self, name: str) -> None:
        """Delete what a training that was killed has left, if it can be had, and is not somebody else's."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a checkpoint. It is gone at once, also when it takes long."""

    def protected(self) -> set[str]:
        """Names that may not be deleted."""
        return set()
