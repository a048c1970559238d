"""A folder of checkpoints on a disk, with a lock, and renames that hide what is not finished or half deleted."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from fabric_core.beside import temporary_for
from fabric_core.checkpoints.directory import Directory
from fabric_core.checkpoints.lock import Lock
from fabric_core.disk import make_folders
from fabric_core.errors import CheckpointError
from fabric_core.manifest import MANIFEST


class DiskDirectory(Directory):
    """A folder; it is made by the first `claim`.

    Args:
        path: Where it is.
    """

    parts_show = False

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock: Lock | None = None

    def __str__(self) -> str:
        return str(self._path)

    def at(self, name: str) -> Path:
        """See `Directory`."""
        return self._path / name

    def names(self) -> list[str]:
        """See `Directory`."""
        try:
            return sorted(os.listdir(self._path))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(
                f"The folder of checkpoints {str(self)!r} cannot be read: {error}."
            ) from error

    def finished(self, names: Iterable[str]) -> set[str]:
        """See `Directory`. A file is there only when it is finished."""
        return {name for name in names if _is_finished(self._path / name)}

    def texts(self, names: Iterable[str]) -> Mapping[str, str | Exception]:
        """See `Directory`."""
        found: dict[str, str | Exception] = {}
        for name in names:
            try:
                found[name] = (self._path / name).read_text(encoding="utf-8")
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                found[name] = error
        return found

    def write(self, name: str, text: str) -> None:
        """See `Directory`."""
        temporary = temporary_for(self._path / name, secrets.token_hex(4))
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path / name)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def remove(self, name: str) -> None:
        """See `Directory`."""
        (self._path / name).unlink(missing_ok=True)

    def claim(self, prefix: str) -> bool:
        """See `Directory`. It lasts as long as the process, however that ends."""
        if self._lock is not None and self._lock.is_mine():
            return False
        make_folders(self._path)
        self._lock = Lock.of(self._path / f".{prefix}.lock")
        return self._lock.is_new()

    def clear(self, name: str) -> None:
        """See `Directory`. Who holds the lock knows that nobody is writing it."""
        with contextlib.suppress(OSError):
            if name.startswith("."):
                _delete(self._path / name)
            else:
                self.remove(name)  # a folder that shows is somebody else's

    def delete(self, name: str) -> None:
        """See `Directory`."""
        hidden = self._path / f".{name}.{secrets.token_hex(4)}.deleted"
        (self._path / name).rename(hidden)
        _delete(hidden)

    def protected(self) -> set[str]:
        """Links, and what links in the same folder lead to."""
        links = [path for path in map(self._path.joinpath, self.names()) if path.is_symlink()]
        return {os.path.basename(path) for link in links for path in (link, os.path.realpath(link))}


def _is_finished(path: Path) -> bool:
    return (path / MANIFEST).is_file() if path.is_dir() else path.is_file()


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
