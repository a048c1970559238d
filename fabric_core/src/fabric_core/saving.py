"""A save that goes on while the training does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fabric_core.background import Background
from fabric_core.errors import CheckpointError
from fabric_core.staging import Staging

_HEAD_START = 0.001  # seconds in which the caller gets away, before it has to wait for the interpreter's lock


class Saving:
    """Writes one checkpoint at a time on a thread, from a copy of the state that nobody else changes."""

    def __init__(self) -> None:
        self._background = Background()
        self._staging = Staging()
        self._what = ""

    def wait(self) -> None:
        """Wait for the save that goes on, if there is one.

        Raises:
            CheckpointError: It has failed; once.
        """
        try:
            self._background.wait()
        except Exception as error:
            raise CheckpointError(
                f"The checkpoint {self._what!r}, whose save was begun with wait=False, was not written: {error}"
            ) from error

    def stage(self, copy: Callable[[Callable[[Any], Any]], Any]) -> Any:
        """Copy a state.

        Args:
            copy: Gets a function that copies anything, and returns what it makes of it.
        """
        self._staging.begin()
        return copy(self._copied)

    def start(self, what: str, write: Callable[[], None]) -> None:
        """Begin to write what was staged."""
        self._what = what

        def work() -> None:
            time.sleep(_HEAD_START)
            self._staging.wait()
            write()

        self._background.start(work)

    def _copied(self, tree: Any) -> Any:
        try:
            return self._staging.copied(tree)
        except Exception as error:  # whatever copying an object of the user's may raise
            raise CheckpointError(
                f"The state cannot be copied, so that it could be saved while the training goes on "
                f"({type(error).__name__}: {error}). Save plain values and tensors, or save with wait=True."
            ) from error
