"""Work that a thread does while the caller goes on: one piece at a time, and none is lost when the program ends.

[Note: threads at the end] The interpreter waits for threads at its end by itself. But before it tells
``concurrent.futures`` to take no more work, and starts no more threads; work that needs either would fail. So it is
waited for even earlier, by what ``concurrent.futures`` itself uses: what has asked last is called first.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401  # it has asked before; see [Note: threads at the end]
import threading
from collections.abc import Callable

__all__ = ["Background", "finish", "in_background"]

_THREAD = "fabric-background"

_unseen: set[Background] = set()
"""Those that have work whose end nobody has seen yet."""


class Background:
    """Does one piece of work at a time.

    The interpreter waits for its thread when the program ends, however it ends. It can be pickled while it rests.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin a piece of work, after the one before.

        Raises:
            Exception: What the one before has raised, if nobody has seen it; nothing is begun then.
        """
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name=_THREAD, daemon=False)
        _unseen.add(self)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the work is done, if there is any.

        Raises:
            Exception: What it has raised; once.
        """
        self.join()
        self._thread = None
        _unseen.discard(self)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def join(self) -> None:
        """Wait until the work is done; what it has raised is left to `wait`."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as failure:  # whoever waits is told
            self._failure = failure


def finish() -> None:
    """Wait for all work. Called at the end of the program.

    Raises:
        Exception: What some of it has raised, and nobody has seen.
    """
    for background in list(_unseen):
        background.wait()


def in_background() -> bool:
    """Whether the caller is such work."""
    return threading.current_thread().name == _THREAD


def _join_all() -> None:
    for background in list(_unseen):
        background.join()


threading._register_atexit(_join_all)  # type: ignore[attr-defined]  # [Note: threads at the end]
atexit.register(finish)  # what is raised here can only be printed: no exit code follows from it
