"""The folder of a manager. Nothing else of the manager touches the disk, and everything here runs on rank 0 only.

[Note: the folder is the truth] There is no index that could disagree with what is there. A checkpoint is an entry
called ``PREFIX-STEP`` (``step-000000100``), a file or a folder, put there whole by a rename. A second one of the same
step is ``step-000000100-1``: nothing is ever written over. Its metrics lie in ``step-000000100.json``, which is written
*before* the checkpoint: a crash in between leaves metrics of nothing, and those are not looked at. What begins with a
dot is not finished, or half deleted.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fabric_core.checkpoints.lock import Lock
from fabric_core.disk import make_folders
from fabric_core.errors import CheckpointError, ConfigurationError, UnsafeCheckpointError
from fabric_core.manifest import MANIFEST

PREFIX = re.compile(r"(?!.*-\d+\Z)[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Checkpoint:
    """One finished checkpoint of a manager.

    Attributes:
        path: For ``fabric.load``.
        step: Of the training, when it was saved.
        version: 0, or how many there were of this step before it.
        metrics: What was given to ``save``.
    """

    path: Path
    step: int
    version: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict, compare=False)


class Folder:
    """The checkpoints of one prefix in a folder.

    Args:
        path: The folder; it is made when something is saved.
        prefix: What the names of its checkpoints begin with.

    Raises:
        ConfigurationError: Names that begin like that could not be told from others.
    """

    def __init__(self, path: Path, prefix: str) -> None:
        if not (isinstance(prefix, str) and PREFIX.fullmatch(prefix)):
            raise ConfigurationError(
                f"The prefix {prefix!r} cannot begin the names of checkpoints. It takes letters, digits and '_', then "
                "'.' and '-' as well, and may not end like a step ('-100')."
            )
        self.path = path
        self._prefix = prefix
        name = rf"{re.escape(prefix)}-(\d{{9,}})(?:-([1-9]\d*))?"
        self._checkpoint = re.compile(name)
        self._metrics = re.compile(rf"({name})\.json")
        self._leftover = re.compile(rf"\.{name}\..*\.(?:tmp|deleted)")
        self._lock: Lock | None = None
        self._noted: set[str] = set()

    # -- reading --------------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Checkpoint]:
        """Those that are finished, the newest last. A folder that is not there has none."""
        found = []
        for name in self._names():
            match = self._checkpoint.fullmatch(name)
            if match is None:
                continue
            path = self.path / name
            if not _is_finished(path):
                self._note(name, f"it has no {MANIFEST}, so it was never finished")
                continue
            step, version = int(match[1]), int(match[2] or 0)
            found.append(Checkpoint(path, step, version, self._metrics_of(name)))
        return sorted(found, key=lambda each: (each.step, each.version))

    def sound(self, checkpoint: Checkpoint, check: Callable[[Path], object]) -> bool:
        """Whether a checkpoint is not damaged; a note is made when it is. What is not allowed is not damaged.

        Args:
            checkpoint: Which.
            check: Reads it, and raises when it is damaged.
        """
        try:
            check(checkpoint.path)
        except UnsafeCheckpointError:
            return True
        except CheckpointError as error:
            self._note(checkpoint.path.name, str(error).rstrip("."))
            return False
        return True

    def _names(self) -> list[str]:
        try:
            return sorted(os.listdir(self.path))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(
                f"The folder of checkpoints {str(self.path)!r} cannot be read: {error}."
            ) from error

    def _metrics_of(self, name: str) -> dict[str, float]:
        try:
            text = (self.path / f"{name}.json").read_text(encoding="utf-8")
            return {metric: float(value) for metric, value in json.loads(text)["metrics"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._note(f"{name}.json", f"it cannot be read ({type(error).__name__}: {error})")
            return {}

    def _note(self, name: str, why: str) -> None:
        if name not in self._noted:
            self._noted.add(name)
            warnings.warn(f"{str(self.path / name)!r} is left out: {why}.", UserWarning, stacklevel=2)

    # -- writing --------------------------------------------------------------------------------------------------

    def open_for_writing(self) -> None:
        """Become the only training that saves here, and clear away what one before was killed in.

        Raises:
            CheckpointError: Another training saves here.
        """
        if self._lock is not None and self._lock.is_mine():
            return
        make_folders(self.path)
        self._lock = Lock.of(self.path / f".{self._prefix}.lock")
        if not self._lock.is_new():
            return
        names = self._names()
        for name in names:
            metrics = self._metrics.fullmatch(name)
            with contextlib.suppress(OSError):
                if self._leftover.fullmatch(name):
                    _delete(self.path / name)
                elif metrics and metrics[1] not in names:
                    (self.path / name).unlink()  # not a folder of that name, which is somebody else's

    def reserve(self, step: int, metrics: Mapping[str, float]) -> Path:
        """Where the next checkpoint of a step goes; its metrics are on disk already."""
        versions = [each.version for each in self._of_step(step)]
        version = max(versions, default=-1) + 1
        name = f"{self._prefix}-{step:09d}" + (f"-{version}" if version else "")
        if metrics:
            self._write(f"{name}.json", {"step": step, "metrics": dict(_as_json(metrics))})
        else:  # those of a save that failed
            (self.path / f"{name}.json").unlink(missing_ok=True)
        return self.path / name

    def delete(self, checkpoint: Checkpoint) -> None:
        """Delete a checkpoint and its metrics. It is gone at once, also when it takes long.

        What cannot be deleted stays, and is warned of.
        """
        path = checkpoint.path
        hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}.deleted")
        try:
            path.rename(hidden)
            _delete(hidden)
            path.with_name(f"{path.name}.json").unlink(missing_ok=True)
        except OSError as error:
            warnings.warn(
                f"The old checkpoint {str(path)!r} cannot be deleted: {error}.", UserWarning, stacklevel=2
            )

    def protected(self) -> set[str]:
        """Names that may not be deleted: links, and what links in the same folder lead to."""
        links = [path for path in map(self.path.joinpath, self._names()) if path.is_symlink()]
        return {name for link in links for name in (link.name, link.resolve().name)}

    def _of_step(self, step: int) -> Iterator[Checkpoint]:
        """Everything that has the name of a checkpoint of a step, finished or not."""
        for name in self._names():
            match = self._checkpoint.fullmatch(name)
            if match is not None and int(match[1]) == step:
                yield Checkpoint(self.path / name, step, int(match[2] or 0))

    def _write(self, name: str, content: dict[str, Any]) -> None:
        temporary = self.path / f".{name}.{secrets.token_hex(4)}.tmp"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(content, file, allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / name)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def _is_finished(path: Path) -> bool:
    """A file is there only when it is finished."""
    return (path / MANIFEST).is_file() if path.is_dir() else path.is_file()


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _as_json(metrics: Mapping[str, float]) -> Iterator[tuple[str, float | str]]:
    """JSON has no NaN and no infinity; as texts, ``float`` understands them."""
    for name, value in metrics.items():
        yield name, value if math.isfinite(value) else str(value)
