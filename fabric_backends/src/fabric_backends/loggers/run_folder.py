"""The folder of one run: ``root_dir/name/version``, made when it is first needed, and never one that exists."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fabric_core.errors import CheckpointError, ConfigurationError


class RunFolder:
    """Where one run writes. Nothing is made until `path` is asked for, and then on global rank 0 only.

    Args:
        root_dir: The folder of all logs.
        name: The folder of this experiment in it; empty for none.
        version: The folder of this run: a number or a name. A run of a version that is there already goes on with
            what is there. By default the next free number, which no other run can take at the same moment.
    """

    def __init__(self, root_dir: str | os.PathLike[str], name: str, version: int | str | None) -> None:
        self.root_dir = Path(root_dir)
        self.name = name
        self._version = f"version_{version}" if isinstance(version, int) else version
        self._path: Path | None = None

    @property
    def version(self) -> str:
        """The last part of `path`."""
        return self.path.name

    @property
    def path(self) -> Path:
        """The folder, which exists from now on.

        Raises:
            ConfigurationError: It cannot be made.
        """
        if self._path is None:
            parent = self.root_dir / self.name
            try:
                self._path = _next_free(parent) if self._version is None else _named(parent / self._version)
            except OSError as error:
                raise ConfigurationError(
                    f"There can be no folder for logs in {str(parent)!r}: {error}. Choose another one with root_dir=…."
                ) from error
        return self._path

    def continues(self, state: Any, *names: str) -> bool:
        """Whether a run goes on here: unless this one was given another version.

        Args:
            state: Of the logger of that run, with its ``version``.
            names: What else the state has to have.

        Raises:
            CheckpointError: It is the state of something else, or its version would lead out of the folder of all logs.
        """
        if not isinstance(state, Mapping) or not {"version", *names} <= set(state):
            raise CheckpointError(
                "The checkpoint does not hold the state of this logger where the state that is loaded has it. Load the "
                "loggers in the order and under the names in which they were saved, or leave them out of the state."
            )
        version = state["version"]
        if not isinstance(version, str) or Path(version).name != version or version in ("", ".."):
            raise CheckpointError(
                f"The checkpoint names {version!r} as the folder of its logs, which is no name of a folder. Leave the "
                "logger out of the state."
            )
        return self._version is None or Path(self._version).name == version

    def go_on_with(self, version: str, own: Sequence[str] = ()) -> None:
        """Make the folder of a run that was resumed the folder of this one.

        Args:
            version: The name of its folder, which `continues` has seen.
            own: Patterns of the files of this logger. In a folder that was made for a new run they are deleted, and so
                is the folder if nothing else is in it.
        """
        if self._version is not None:
            return
        new, self._path, self._version = self._path, None, version
        if new is not None and new != self.path:
            _remove(new, own)


def _named(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _next_free(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    taken = [
        int(found[1]) for entry in parent.iterdir() if (found := re.fullmatch(r"version_(\d+)", entry.name))
    ]
    number = max(taken, default=-1) + 1
    while True:
        path = parent / f"version_{number}"
        try:
            path.mkdir()
        except FileExistsError:  # another run was quicker
            number += 1
        else:
            return path


def _remove(folder: Path, own: Sequence[str]) -> None:
    with contextlib.suppress(OSError):  # what is left there harms nobody
        for pattern in own:
            for file in folder.rglob(pattern):
                file.unlink()
        for inner in sorted((entry for entry in folder.rglob("*") if entry.is_dir()), reverse=True):
            inner.rmdir()
        folder.rmdir()
