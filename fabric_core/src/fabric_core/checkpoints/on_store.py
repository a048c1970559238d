"""A folder of checkpoints on a store, which knows neither locks nor renames of folders.

[Note: folders on stores] A checkpoint exists when its last object is there: the file itself, or of a folder the record
that says which objects count ([Note: remote folders]). That object goes first when one is deleted. What is left of an
upload or of a deletion that was killed is no checkpoint for anybody, and is cleared away when it is a day old, because
nobody can tell it from one that still goes on.

There is no lock that a dead process would give back. So who begins to save becomes the owner, by writing its name to
one object, and looks before each save and each deletion whether it still is: of two trainings, the one that began first
is stopped by an error when it saves next. Until then both may save, and nothing is torn, since no name is used twice
but in the same instant, and then the last one counts.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path

from fabric_core.checkpoints.directory import Directory
from fabric_core.errors import CheckpointError
from fabric_core.remote import Remote, check_literal

ABANDONED = timedelta(days=1)
"""After this time, parts to which nothing was added are taken for what a crash has left."""

_tokens: dict[int, str] = {}
"""What a process signs with, by its number: a process that it forks is another one."""


class StoreDirectory(Directory):
    """An address below which checkpoints lie.

    Args:
        url: With its protocol.
        shown: The same for messages, without a password.

    Raises:
        ConfigurationError: It stands for other addresses, too.
    """

    parts_show = True

    def __init__(self, url: str, shown: str) -> None:
        check_literal(url, shown)
        self._url = url.rstrip("/")
        self._shown = shown
        self._owner: str | None = None

    def __str__(self) -> str:
        return self._shown

    def at(self, name: str) -> str:
        """See `Directory`."""
        return f"{self._url}/{name}"

    def names(self) -> list[str]:
        """See `Directory`."""
        with self._reached("read"):
            return Remote(self._url).names()

    def finished(self, names: Iterable[str]) -> set[str]:
        """See `Directory`."""
        with self._reached("read"):
            return Remote(self._url).finished(names)

    def texts(self, names: Iterable[str]) -> Mapping[str, str]:
        """See `Directory`."""
        with self._reached("read"):
            return Remote(self._url).texts(names)

    def write(self, name: str, text: str) -> None:
        """See `Directory`."""
        with self._reached("written"), tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "text"
            file.write_text(text, encoding="utf-8")
            Remote(self.at(name)).publish_file(file, secrets.token_hex(8))

    def remove(self, name: str) -> None:
        """See `Directory`."""
        with self._reached("written"):
            Remote(self.at(name)).remove()

    def claim(self, prefix: str) -> bool:
        """See `Directory` and [Note: folders on stores]."""
        new, self._owner = self._owner is None, f".{prefix}.owner"
        if new:
            self._sign(self._owner)
        else:
            self._check_owner()
        return new

    def clear(self, name: str) -> None:
        """See `Directory`. It may still be written, unless it is old."""
        with suppress(Exception):
            if datetime.now(timezone.utc) - Remote(self.at(name)).modified() > ABANDONED:
                Remote(self.at(name)).remove()

    def delete(self, name: str) -> None:
        """See `Directory`."""
        self._check_owner()
        self.remove(name)

    def _sign(self, owner: str) -> None:
        now = datetime.now(timezone.utc).isoformat(" ", "seconds")
        who = f"process {os.getpid()} on {socket.gethostname()}, since {now}"
        self.write(owner, f"{_token()} {who}")

    def _check_owner(self) -> None:
        if self._owner is None:
            return
        text = self.texts([self._owner]).get(self._owner)
        if text is None:  # somebody has emptied the folder
            self._sign(self._owner)
            return
        token, _, who = text.partition(" ")
        if token != _token():
            raise CheckpointError(
                f"Another training saves checkpoints in {str(self)!r}: {who}. The one that began last goes on. Give "
                "this one another address or another prefix."
            )

    @contextmanager
    def _reached(self, what: str) -> Iterator[None]:
        """What a store may raise, as an error that names it."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"The checkpoints in {str(self)!r} cannot be {what}: {type(error).__name__}: {error}."
            ) from error


def _token() -> str:
    return _tokens.setdefault(os.getpid(), secrets.token_hex(8))
