"""A lock on a folder, held by one process and given back by the system however that process ends.

It is a record lock: the workers that a process forks do not inherit it, so a killed training can be started again while
its last worker is still there. Such locks know processes, not descriptors, and closing any descriptor of the file gives
them up; so a process has one `Lock` for each file.
"""

from __future__ import annotations

import errno
import os
import socket
import time
import warnings
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from fabric_core.errors import CheckpointError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PATIENCE = 10.0
"""Seconds to wait for another training, which may be about to end."""

_TAKEN = (errno.EACCES, errno.EAGAIN)
_by_file: weakref.WeakValueDictionary[Path, Lock] = weakref.WeakValueDictionary()


class Lock:
    """Held as long as somebody in this process has a reference to it. Get one by `of`."""

    def __init__(self, path: Path) -> None:
        self._pid = os.getpid()
        self._new = True
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, self._file)
        _take(self._file, path)
        with suppress(OSError):  # it is for messages only
            os.truncate(self._file, 0)
            os.pwrite(self._file, f"process {self._pid} on {socket.gethostname()}".encode(), 0)

    @staticmethod
    def of(path: Path) -> Lock:
        """The lock of a file, taken when this process does not hold it yet.

        Raises:
            CheckpointError: Another process holds it.
        """
        path = path.resolve()
        lock = _by_file.get(path)
        if lock is None or not lock.is_mine():
            _by_file[path] = lock = Lock(path)
        return lock

    def is_mine(self) -> bool:
        """Whether this process holds it, and not the one that it was forked from; and its file is still there."""
        return self._pid == os.getpid() and os.fstat(self._file).st_nlink > 0

    def is_new(self) -> bool:
        """Whether nobody in this process has asked that before."""
        new, self._new = self._new, False
        return new


def _take(file: int, path: Path) -> None:
    if fcntl is None:
        return
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _TAKEN:
                warnings.warn(
                    f"The folder {str(path.parent)!r} cannot be locked ({error}). See to it that no two trainings save "
                    "checkpoints there.",
                    UserWarning,
                    stacklevel=2,
                )
                return
            if time.monotonic() < until:
                time.sleep(0.05)
                continue
            owner = os.pread(file, 1000, 0).decode(errors="replace") or "another process"
            raise CheckpointError(
                f"Another training saves checkpoints in {str(path.parent)!r} at this moment: {owner}. Wait for its "
                "end, or give this one another folder or another prefix."
            ) from None
        else:
            return
