"""Programs that watch over ranks, as the tests start, follow and end them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T", bound="Supervised")


class Supervised:
    """A program in a session of its own, whose ranks say by files in a folder how far they are.

    Args:
        folder: Of these files.
        command: The program and its arguments.
        options: For `subprocess.Popen`.
    """

    def __init__(self, folder: Path, *command: str, **options: Any) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )

    def said(self, *names: str, within: float = 90) -> list[str]:
        """What files hold, as soon as all of them are there."""
        paths, until = [self.folder / name for name in names], time.monotonic() + within
        while not all(path.exists() for path in paths):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < until, "the ranks do not begin"
            time.sleep(0.01)
        return [path.read_text() for path in paths]

    def kill(self) -> None:
        """End it, and the ranks, if they have not ended."""
        if self.process.poll() is None:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                process.kill()
            self.process.kill()
            self.process.communicate()


@contextmanager
def all_killed() -> Iterator[list[T]]:
    """A list of programs of which none outlives the context."""
    running: list[T] = []
    try:
        yield running
    finally:
        for each in running:
            each.kill()
