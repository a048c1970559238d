"""What a manager knows of its folder: which names mean what. Everything here runs on rank 0 only.

[Note: the folder is the truth] There is no index that could disagree with what is there. A checkpoint is an entry
called ``PREFIX-STEP`` (``step-000000100``), a file or a folder, put there whole by a rename. A second one of the same
step is ``step-000000100-1``: nothing is ever written over. Its metrics lie in ``step-000000100.json``, which is written
*before* the checkpoint: a crash in between leaves metrics of nothing, and those are not looked at. What begins with a
dot is not finished, or half deleted. On a store, see [Note: folders on stores].
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fabric_core.checkpoints.directory import Directory
from fabric_core.errors import CheckpointError, ConfigurationError, UnsafeCheckpointError
from fabric_core.manifest import MANIFEST

PREFIX = re.compile(r"(?!.*-\d+\Z)[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
"""Names that begin so are short enough for what else is called after them; see `fabric_core.beside.LONGEST`."""


@dataclass(frozen=True)
class Checkpoint:
    """One finished checkpoint of a manager.

    Attributes:
        path: For ``fabric.load``: a ``Path``, or an address.
        step: Of the training, when it was saved.
        version: 0, or how many there were of this step before it.
        metrics: What was given to ``save``.
    """

    path: Any
    step: int
    version: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """The last part of its path."""
        name: str = os.path.basename(self.path)
        return name


class Folder:
    """The checkpoints of one prefix in a folder.

    Args:
        directory: The folder; it is made when something is saved.
        prefix: What the names of its checkpoints begin with.

    Raises:
        ConfigurationError: Names that begin like that could not be told from others.
    """

    def __init__(self, directory: Directory, prefix: str) -> None:
        if not (isinstance(prefix, str) and PREFIX.fullmatch(prefix)):
            raise ConfigurationError(
                f"The prefix {prefix!r} cannot begin the names of checkpoints. It takes letters, digits and '_', then "
                "'.' and '-' as well, at most 100 in all, and may not end like a step ('-100')."
            )
        self._directory = directory
        self._prefix = prefix
        name = rf"{re.escape(prefix)}-(\d{{9,}})(?:-([1-9]\d*))?"
        self._checkpoint = re.compile(name)
        self._metrics = re.compile(rf"({name})\.json")
        self._leftover = re.compile(rf"\.{name}\..*\.(?:tmp|deleted)")
        self._noted: set[str] = set()

    def __str__(self) -> str:
        return str(self._directory)

    # -- reading --------------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Checkpoint]:
        """Those that are finished, the newest last. A folder that is not there has none."""
        matches = self._matches(self._directory.names())
        finished = self._directory.finished(matches)
        metrics = self._directory.texts(f"{name}.json" for name in finished)
        found = []
        for name, (step, version) in matches.items():
            if name in finished:
                numbers = self._numbers(f"{name}.json", metrics)
                found.append(Checkpoint(self._directory.at(name), step, version, numbers))
            elif not self._directory.parts_show:
                self._note(name, f"it has no {MANIFEST}, so it was never finished")
        return sorted(found, key=lambda each: (each.step, each.version))

    def sound(self, checkpoint: Checkpoint, check: Callable[[Any], object]) -> bool:
        """Whether a checkpoint is there and not damaged; a note is made of damage. What is not allowed is no damage.

        Args:
            checkpoint: Which.
            check: Reads it, and raises when it is damaged.
        """
        try:
            check(checkpoint.path)
        except UnsafeCheckpointError:
            return True
        except CheckpointError as error:
            if self.has(checkpoint):
                self._note(checkpoint.name, str(error).rstrip("."))
            return False
        return True

    def has(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is still there."""
        return bool(self._directory.finished([checkpoint.name]))

    def _matches(self, names: list[str]) -> dict[str, tuple[int, int]]:
        """The step and the version of each name that is one of a checkpoint, finished or not."""
        found = {name: self._checkpoint.fullmatch(name) for name in names}
        return {name: (int(match[1]), int(match[2] or 0)) for name, match in found.items() if match}

    def _numbers(self, name: str, texts: Mapping[str, str | Exception]) -> dict[str, float]:
        try:
            text = texts.get(name, '{"metrics": {}}')
            if isinstance(text, Exception):
                raise text
            return {metric: float(value) for metric, value in json.loads(text)["metrics"].items()}
        except Exception as error:  # whatever stands there, it says nothing of the checkpoint
            self._note(name, f"it cannot be read ({type(error).__name__}: {error})")
            return {}

    def _note(self, name: str, why: str) -> None:
        if name not in self._noted:
            self._noted.add(name)
            where = os.path.join(str(self), name)
            warnings.warn(f"{where!r} is left out: {why}.", UserWarning, stacklevel=2)

    # -- writing --------------------------------------------------------------------------------------------------

    def open_for_writing(self) -> None:
        """Become the only training that saves here, and clear away what one before was killed in.

        Raises:
            CheckpointError: Another training saves here.
        """
        if not self._directory.claim(self._prefix):
            return
        names = self._directory.names()
        for name in names:
            metrics = self._metrics.fullmatch(name)
            if self._leftover.fullmatch(name) or (metrics and metrics[1] not in names):
                self._directory.clear(name)
        if self._directory.parts_show:
            matches = self._matches(names)
            for name in matches.keys() - self._directory.finished(matches):
                self._directory.clear(name)

    def reserve(self, step: int, metrics: Mapping[str, float]) -> Any:
        """Where the next checkpoint of a step goes; its metrics are on disk already."""
        there = self._matches(self._directory.names()).values()
        version = max((version for at, version in there if at == step), default=-1) + 1
        name = f"{self._prefix}-{step:09d}" + (f"-{version}" if version else "")
        if metrics:
            content = {"step": step, "metrics": dict(_as_json(metrics))}
            self._directory.write(f"{name}.json", json.dumps(content, allow_nan=False))
        else:  # those of a save that failed
            self._directory.remove(f"{name}.json")
        return self._directory.at(name)

    def delete(self, checkpoint: Checkpoint) -> None:
        """Delete a checkpoint, then its metrics. What cannot be deleted stays, and is warned of."""
        try:
            self._directory.delete(checkpoint.name)
            self._directory.remove(f"{checkpoint.name}.json")
        except (OSError, CheckpointError) as error:
            where, why = os.path.join(str(self), checkpoint.name), str(error).rstrip(".")
            warnings.warn(
                f"The old checkpoint {where!r} cannot be deleted: {why}.", UserWarning, stacklevel=2
            )

    def protected(self) -> set[str]:
        """Names that may not be deleted."""
        return self._directory.protected()


def _as_json(metrics: Mapping[str, float]) -> Iterator[tuple[str, float | str]]:
    """JSON has no NaN and no infinity; as texts, ``float`` understands them."""
    for name, value in metrics.items():
        yield name, value if math.isfinite(value) else str(value)
