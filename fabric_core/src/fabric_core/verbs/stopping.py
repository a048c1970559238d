"""Stopping before the end, on every rank at the same step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric_core.errors import SetupError
from fabric_core.verbs.life import Life

if TYPE_CHECKING:
    from fabric_core.preemption import Preemption


class Stopping(Life):
    """What is known of the job's end."""

    @property
    def preempted(self) -> bool:
        """Whether the job is to be stopped before its end. Read on every rank, once per step.

        It turns True on every rank at the same step, about half a second after one of them was told by SIGTERM, by
        another signal of `watch_for_preemption`, or by its cluster environment; and it stays so. Save then, leave the
        loop and `close`: a cluster environment that has the job started again does so at that point. ``fabric run``
        ends with exit code 75.

        The first read begins to listen. The first signal of each kind is noted here; a second one, later than two
        seconds after it, does what it would have done before, and so does every signal after `close`. Handlers that
        were installed before are called in any case.

        Example:
            >>> for step in range(state["step"], steps):
            ...     ...
            ...     if fabric.preempted:
            ...         fabric.save("last.ckpt", state)
            ...         break

        Raises:
            SetupError: The processes are not started yet.
        """
        return (self._preemption or self._watch("preempted", ())).read()

    def watch_for_preemption(self, *signals: str | int) -> None:
        """Say which signals make `preempted` True. Called on every rank, in the main thread, before it is read.

        Args:
            signals: Names or numbers, such as ``"SIGUSR1"``, which ``sbatch --signal=USR1@60`` sends; by default
                SIGTERM alone.

        Raises:
            SetupError: The processes are not started yet, or this rank is listening already.
            ConfigurationError: There is no such signal, or no process can hear it.
        """
        if self._preemption is not None:
            raise SetupError(
                "fabric.watch_for_preemption() was called although this rank is listening already. Call it once, "
                "before fabric.preempted is read, with all signals: "
                'fabric.watch_for_preemption("SIGTERM", "SIGUSR1").'
            )
        self._watch("watch_for_preemption", signals)

    def _watch(self, verb: str, signals: tuple[str | int, ...]) -> Preemption:
        from fabric_core.preemption import DEFAULT_SIGNALS, Preemption

        self._require_launched(verb)
        self._preemption = Preemption(self._parts.strategy, self.world_size, signals or DEFAULT_SIGNALS)
        self._preemption.watch()
        return self._preemption
