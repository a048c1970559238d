"""How the process of a rank comes to be: as a fresh interpreter, or as a copy of one that has imported all it needs.

[Note: warm starts] Every rank imports PyTorch and more before it does anything of its own. Where that is safe, one
process does so, and is copied for each of them (`fabric_core.supervisor.copies`): time and memory are spent once.
"""

from __future__ import annotations

import os
import re
import selectors
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from fabric_core.errors import LaunchError
from fabric_core.orphans import adopting
from fabric_core.supervisor.children import AdoptedChild, Child
from fabric_core.supervisor.command import RankCommand
from fabric_core.supervisor.messages import receive, send
from fabric_core.supervisor.outcome import died_of, say
from fabric_core.supervisor.signals import Inbox, interrupts_held
from fabric_core.supervisor.variables import LISTEN_FD, WARM_FD

_EARLY = rb"(?:OMP|GOMP|KMP|MKL|OPENBLAS|BLIS|NUMEXPR|VECLIB|ATEN|DNNL|ONEDNN|TORCH|PYTORCH|FABRIC_PLUGINS)_[A-Z0-9_]+"
_READ_EARLY = re.compile(rb"[\"'](%b)[\"']|\b(%b) *= *(?:f?[\"']|str\()" % (_EARLY, _EARLY))
"""Variables that are read during imports, in the text of a program that may be about to set them: named in quotes, or
as an argument that is given a text."""

_LONGEST_FORK = 60.0  # seconds
_SETTLE = 0.25  # seconds; what has killed the warm process may be on its way to this one, too


@dataclass(frozen=True)
class WarmStart:
    """What a process does before it is copied for every rank.

    Attributes:
        steps: Modules to import, and functions without arguments to call: ``package.module:function``. What they do
            must be the same for all ranks.
        required: Whether an error is raised where the ranks cannot be copied; else they are started afresh.
    """

    steps: tuple[str, ...] = ()
    required: bool = False


class Starter(Protocol):
    """Starts the processes of ranks."""

    def get_ready(self, environ: Mapping[str, str], inbox: Inbox) -> Starter:
        """Prepare a start of all ranks; what is to start them. When a signal comes, it may return at once.

        Args:
            environ: The variables that all ranks will have in common.
            inbox: Where signals to this process arrive.

        Raises:
            LaunchError: The ranks cannot be started.
        """

    def start(self, environ: Mapping[str, str], *, listener: socket.socket | None, reads: bool) -> Child:
        """Start one rank.

        Args:
            environ: All its environment variables.
            listener: A socket that it is given.
            reads: Whether it reads this process's standard input; otherwise it finds an empty one.

        Raises:
            OSError: It cannot be started.
            LaunchError: Likewise.
        """

    def close(self) -> None:
        """Give back what further starts would have needed. The ranks live on."""


class FreshStarter:
    """Starts interpreters, each of which imports everything itself."""

    def __init__(self, command: RankCommand) -> None:
        self._argv = command.argv()

    def get_ready(self, environ: Mapping[str, str], inbox: Inbox) -> Starter:
        """There is nothing to prepare."""
        return self

    def start(self, environ: Mapping[str, str], *, listener: socket.socket | None, reads: bool) -> Child:
        """As `Starter.start`."""
        fds, told = list[int](), dict(environ)
        if listener is not None and os.name == "posix":
            fds.append(listener.fileno())
            told[LISTEN_FD] = str(listener.fileno())
        return subprocess.Popen(
            self._argv, env=told, pass_fds=fds, stdin=None if reads else subprocess.DEVNULL
        )

    def close(self) -> None:
        """There is nothing to give back."""


class WarmStarter:
    """Copies a process for each rank, where nothing speaks against it. Used in one thread."""

    def __init__(self, command: RankCommand, warm: WarmStart, otherwise: Starter) -> None:
        self._command = command
        self._warm = warm
        self._otherwise = otherwise
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._refused = not warm.required and read_early(command.source()) is not None

    def get_ready(self, environ: Mapping[str, str], inbox: Inbox) -> Starter:
        """Warm a process up, unless there is one, or see that the ranks have to be started otherwise."""
        if self._process is not None and self._process.poll() is None:
            return self
        self.close()
        hazard = "" if self._refused else self._warm_up(environ, inbox)
        if self._channel is not None:
            return self
        if hazard and self._warm.required:
            raise LaunchError(
                f"The ranks cannot be copied from a warm process: {hazard}. Leave --start (FABRIC_START) out, or start "
                "them afresh: --start=fresh."
            )
        if hazard:
            self._refused = True
            say(f"the ranks are started afresh, not copied: {hazard}")
        return self._otherwise

    def _warm_up(self, environ: Mapping[str, str], inbox: Inbox) -> str:
        """Start the process to be copied, and wait for it; what speaks against copying it, if anything does."""
        self._channel, theirs = socket.socketpair()
        with theirs, interrupts_held():
            told = {**environ, WARM_FD: str(theirs.fileno())}
            self._process = subprocess.Popen(self._command.argv(), env=told, pass_fds=(theirs.fileno(),))
        with suppress(OSError):  # it has ended: see below
            send(self._channel, {"steps": self._warm.steps, "folder": self._command.folder()})
        answer = _answer(self._channel, inbox)
        if inbox.tells_to_end:
            self.close()
            return ""
        if answer is None:
            hazard = self._end_of_process()
        else:
            hazard = str(answer["hazard"])
        self._channel.settimeout(_LONGEST_FORK)
        if hazard:
            self.close()
        return hazard

    def start(self, environ: Mapping[str, str], *, listener: socket.socket | None, reads: bool) -> Child:
        """As `Starter.start`."""
        assert self._channel is not None, "get_ready comes first"
        fds = [] if listener is None else [listener.fileno()]
        try:
            with adopting():
                send(self._channel, {"environ": dict(environ), "reads": reads}, fds)
                answer, _ = receive(self._channel)
            if answer is not None and "pid" in answer:
                return AdoptedChild(answer["pid"])
            reason = self._end_of_process() if answer is None else answer["error"]
        except ChildProcessError:
            reason = "the copy has become the child of another process"
        except BrokenPipeError:
            reason = self._end_of_process()
        except OSError as error:
            reason = str(error)
        raise LaunchError(
            f"Rank {environ['RANK']} could not be started as a copy of the warm process: {reason}. "
            "Start the ranks afresh: --start=fresh, or FABRIC_START=fresh."
        )

    def _end_of_process(self) -> str:
        assert self._process is not None, "it was started before the channel was used"
        return f"the process to be copied has ended: {died_of(self._process.wait())}"

    def close(self) -> None:
        """End the warm process. It has nothing to save."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._channel = None


def read_early(source: bytes) -> str | None:
    """A variable that a program speaks of, and may be about to set, though imports before it have read it already."""
    found = _READ_EARLY.search(source)
    return None if found is None else (found[1] or found[2]).decode()


def _answer(channel: socket.socket, inbox: Inbox) -> dict[str, Any] | None:
    """Wait for an answer, or for a signal that ends this job; ``None`` when there is no answer."""
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        selector.register(inbox.fd, selectors.EVENT_READ)
        while not inbox.tells_to_end:
            if channel in {key.fileobj for key, _ in selector.select()}:
                answer, _ = receive(channel)
                if answer is None:
                    selector.unregister(channel)
                    selector.select(_SETTLE)
                return answer
            inbox.hush()
    return None
