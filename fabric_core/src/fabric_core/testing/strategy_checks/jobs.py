"""The jobs in which a strategy is watched, started when a check first asks for what one of them found."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fabric_core.testing.programs.strategy import file_name
from fabric_core.testing.ranks import Ended, run_on_ranks

PROGRAMS = "fabric_core.testing.programs"
LONGEST_TEXT = 4000  # characters of what a job printed, in a message


@dataclass(frozen=True)
class Told:
    """How a program ended that goes through no sections.

    Attributes:
        ended: How.
        folder: Where it wrote.
        time: When it had ended, in seconds since the epoch.
    """

    ended: Ended
    folder: Path
    time: float


@dataclass(frozen=True)
class Batch:
    """The sections that one job goes through, on so many processes."""

    size: int
    sections: tuple[str, ...]

    def needed_for(self, section: str) -> tuple[str, ...]:
        """A section, and the training before it whose files it reads."""
        name, *words = section.split(":")
        before = f"train:{words[0]}:everything" if name == "resume" else section
        return tuple(each for each in self.sections if each in (before, section))


@dataclass
class Jobs:
    """What the sections of some jobs found, by number of processes and section.

    When a section ends its job, the following ones are tried in a new job, so that each fault shows in its own check.

    Attributes:
        batches: One job each; a later one may use files of an earlier one.
        task: The fields of `Task` that the author states.
        flags: Those of ``fabric run``.
        environ: Further environment variables.
        patience: How long one section may take, in seconds.
        sparing: Run only what is asked for, because few checks ask; otherwise one job goes through all sections.
        ended: How each job ended.
    """

    batches: Sequence[Batch]
    task: Mapping[str, Any]
    flags: Mapping[str, Any]
    environ: Mapping[str, str]
    patience: float
    sparing: bool = False
    ended: list[Ended] = field(default_factory=list)
    _folder: Path | None = None
    _known: dict[tuple[int, str], list[Any] | str] = field(default_factory=dict)
    _others: dict[str, Told] = field(default_factory=dict)

    def facts(self, size: int, section: str) -> list[Any]:
        """What every rank found in a section, in the order of ranks.

        Raises:
            AssertionError: It failed on some rank, or hung.
        """
        for batch in self.batches:
            holds_it = batch.size == size and section in batch.sections
            wanted = (section,) if holds_it else batch.sections
            run = batch.needed_for(section) if holds_it and self.sparing else batch.sections
            while any((batch.size, name) not in self._known for name in wanted):
                self._run(batch.size, run)
            if holds_it:
                break
        found = self._known[size, section]
        if isinstance(found, str):
            raise AssertionError(found)
        return found

    def program(self, name: str, size: int | None, **arguments: Any) -> Told:
        """How one of the other programs ended, and the folder in which it wrote. It runs once.

        Args:
            name: Of the module in ``fabric_core.testing.programs``.
            size: How many processes ``fabric run`` starts; ``None`` when the program starts them.
            arguments: Further ones of its own.
        """
        if name not in self._others:
            folder = self.folder / name
            folder.mkdir(exist_ok=True)
            task = {**self.task, "size": arguments.get("devices", size)}
            ended = self._job(name, size, {"folder": str(folder), "task": task, **arguments})
            self._others[name] = Told(ended, folder, time.time())
        return self._others[name]

    @property
    def folder(self) -> Path:
        """Where programs write."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="fabric-conformance-"))
        return self._folder

    def close(self) -> None:
        """Remove what the programs have written."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    def _job(self, program: str, size: int | None, arguments: Mapping[str, Any]) -> Ended:
        return run_on_ranks(
            f"{PROGRAMS}.{program}", arguments, processes=size, environ=self.environ, **self.flags
        )

    def _run(self, size: int, sections: Sequence[str]) -> None:
        """Run what is left of some sections. Afterwards at least one section more is known."""
        left = [name for name in sections if (size, name) not in self._known]
        arguments = {
            "folder": str(self.folder),
            "sections": left,
            "patience": self.patience,
            "task": dict(self.task),
        }
        try:
            ended = self._job("strategy", size, arguments)
            self.ended.append(ended)
            printed = f"The job ended with {ended.code}.\n{ended.out}\n{ended.err}"
        except AssertionError as error:  # it did not end
            printed = str(error)
        for name in left:
            found = self._read(size, name)
            self._known[size, name] = found or self._why_missing(size, name, printed)
            if found is None:
                break

    def _read(self, size: int, section: str) -> list[Any] | str | None:
        """What was found in a section: facts by rank, or why it failed; ``None`` when some rank did not finish it."""
        files = [self.folder / file_name(section, size, rank, "pt") for rank in range(size)]
        found = [torch.load(file, weights_only=True) for file in files if file.exists()]
        errors = [
            f"{section!r} failed on rank {rank} of {size}:\n{answer['error']}"
            for rank, answer in enumerate(found)
            if "error" in answer
        ]
        if errors and len(found) == size:
            return "\n".join(errors)
        return [answer["facts"] for answer in found] if len(found) == size else None

    def _why_missing(self, size: int, section: str, printed: str) -> str:
        hung = [self.folder / file_name(section, size, rank, "hung") for rank in range(size)]
        stacks = [
            f"Rank {rank} was here after {self.patience:g} s:\n{file.read_text()}"
            for rank, file in enumerate(hung)
            if file.exists() and file.stat().st_size
        ]
        return "\n".join(
            (f"{section!r} was not finished by every rank of {size}.", *stacks, printed[-LONGEST_TEXT:])
        )
