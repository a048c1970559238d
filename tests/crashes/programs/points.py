"""The moments of a rank: each look at the folder of checkpoints, and each change of it, by number.

Python tells an audit hook before it opens, renames, deletes or lists something; ``fsync``, of which it tells nothing,
is wrapped. So the n-th moment of a save is the same in every run, and a rank can be killed in it, or its system call
fail.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHASES = ("start", "load", "step", "save", "end")
HEARD = ("open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir", "os.truncate")
INSIDE = ("os.remove", "os.rmdir")
"""What is told with the number of a folder, and a name in it, while a tree is deleted."""


@dataclass(frozen=True)
class Plan:
    """What is to happen to one attempt.

    Attributes:
        kind: ``"point"``: a rank kills itself in a moment. ``"around"``: the parent kills somebody a little after it.
            ``"time"``: the parent kills somebody some time after the start. ``"fail"``: the system call of the moment
            fails, as do the later ones of its kind.
        rank, phase, moment: The moment, counted on this rank from 1 since it was first in this phase.
        victim: Whom the parent kills: a rank, or the supervisor, whose number is that of the ranks.
        seconds: How long the parent waits.
        error: With what number a system call fails.
    """

    kind: str
    rank: int = 0
    phase: str = ""
    moment: int = 0
    victim: int = 0
    seconds: float = 0.0
    error: int = 0


class Board:
    """A few bytes that a parent shares with the ranks that it forks."""

    _FORM = struct.Struct(f"qqqq{len(PHASES)}q")
    _PID, _PHASE, _REACHED, _ROTATING, _COUNTS = range(5)

    def __init__(self, ranks: int) -> None:
        self._memory = mmap.mmap(-1, self._FORM.size * ranks)

    def clear(self) -> None:
        self._memory[:] = bytes(len(self._memory))

    def pid(self, rank: int) -> int:
        return self._get(rank, self._PID)

    def phase(self, rank: int) -> str:
        """What the rank is doing; a save is also a rotation in its last part."""
        return "rotation" if self._get(rank, self._ROTATING) else PHASES[self._get(rank, self._PHASE)]

    def reached(self, rank: int) -> bool:
        """Whether the rank has come to the moment of the plan."""
        return bool(self._get(rank, self._REACHED))

    def counts(self, rank: int) -> dict[str, int]:
        """How many moments each phase has had."""
        return {phase: self._get(rank, self._COUNTS + number) for number, phase in enumerate(PHASES)}

    def _get(self, rank: int, place: int) -> int:
        found: int = self._FORM.unpack_from(self._memory, rank * self._FORM.size)[place]
        return found

    def put(self, rank: int, place: int, value: int) -> None:
        struct.pack_into("q", self._memory, rank * self._FORM.size + 8 * place, value)


class Moments:
    """Counts the moments of this rank, and does in one of them what the plan says."""

    def __init__(self, folder: Path, rank: int, board: Board, plan: Plan | None) -> None:
        self._folder, self._rank, self._board = os.fspath(folder), rank, board
        self._plan = plan if plan is not None and plan.rank == rank else None
        self._counts = dict.fromkeys(PHASES, 0)
        self._phase = "start"
        self._failing = ""
        board.put(rank, Board._PID, os.getpid())

    def listen(self) -> None:
        """From here on; there is no way back."""
        fsync = os.fsync

        def heard(descriptor: Any) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            if self._is_ours(os.readlink(f"/proc/self/fd/{number}")):
                self._moment("os.fsync")
            fsync(descriptor)

        os.fsync = heard
        sys.addaudithook(self._hear)

    def enter(self, phase: str) -> None:
        """Say what this rank does from here on."""
        self._phase = phase
        self._board.put(self._rank, Board._ROTATING, 0)
        self._board.put(self._rank, Board._PHASE, PHASES.index(phase))

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in HEARD:
            return
        inside = event in INSIDE and arguments[-1] not in (None, -1)
        if not inside and not any(map(self._is_ours, arguments[:2])):
            return
        if self._phase == "save" and (inside or ".deleted" in str(arguments)):
            self._board.put(self._rank, Board._ROTATING, 1)
        self._moment(event)

    def _is_ours(self, argument: Any) -> bool:
        return isinstance(argument, str | os.PathLike) and str(argument).startswith(self._folder)

    def _moment(self, event: str) -> None:
        self._counts[self._phase] += 1
        self._board.put(self._rank, Board._COUNTS + PHASES.index(self._phase), self._counts[self._phase])
        plan = self._plan
        if plan is None or plan.phase != self._phase:
            return
        if event == self._failing:
            raise OSError(plan.error, os.strerror(plan.error))
        if self._counts[self._phase] != plan.moment:
            return
        self._board.put(self._rank, Board._REACHED, 1)
        if plan.kind == "point":
            os.kill(os.getpid(), signal.SIGKILL)
        elif plan.kind == "fail":
            self._failing = event
            raise OSError(plan.error, os.strerror(plan.error))
