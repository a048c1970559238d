"""The local environment: processes that ``fabric run`` or a launcher has started, or this one alone."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping

from fabric_core.contracts.cluster_environment import ClusterEnvironment
from fabric_core.errors import ConfigurationError
from fabric_core.hooks import LOCAL
from fabric_core.specs import Detection

LAUNCHED = "FABRIC_LAUNCHED"
LISTEN_FD = "FABRIC_LISTEN_FD"
MEETING_PORT = "FABRIC_MEETING_PORT"
RESTARTS = "FABRIC_RESTARTS"


def detect(environ: Mapping[str, str]) -> Detection | None:
    """Recognise the processes that we have started ourselves."""
    if LAUNCHED not in environ:
        return None
    per_node, world = whole(environ, "LOCAL_WORLD_SIZE"), whole(environ, "WORLD_SIZE")
    if not per_node or not world:
        return Detection(note=f"{LAUNCHED} is set")
    return Detection(per_node, world // per_node, f"{LAUNCHED} is set")


class LocalEnvironment(ClusterEnvironment):
    """Ranks from the variables that our own launchers set; rank 0 of 1 where there are none.

    The variables are read anew each time, because a launcher that forks sets them after this object was made.
    """

    spec = LOCAL

    @property
    def creates_processes_externally(self) -> bool:
        """Whether a launcher has started this process."""
        return LAUNCHED in os.environ

    @property
    def main_address(self) -> str:
        """Loopback, unless the launcher was given an address."""
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """The port that the launcher holds open; 0 where no launcher was."""
        return self._number(MEETING_PORT if MEETING_PORT in os.environ else "MASTER_PORT", 0)

    @property
    def listen_fd(self) -> int | None:
        """The socket that the launcher opened for global rank 0. It is given out once."""
        value = os.environ.pop(LISTEN_FD, None)
        return None if value is None else int(value)

    @property
    def single_node(self) -> bool:
        """Whether the launcher started every process of the job, and they meet on loopback."""
        return self._number("WORLD_SIZE", 1) == self._number("LOCAL_WORLD_SIZE", 1) and is_loopback(
            self.main_address
        )

    def world_size(self) -> int:
        """``WORLD_SIZE``."""
        return self._number("WORLD_SIZE", 1)

    def global_rank(self) -> int:
        """``RANK``."""
        return self._number("RANK", 0)

    def local_rank(self) -> int:
        """``LOCAL_RANK``."""
        return self._number("LOCAL_RANK", 0)

    def node_rank(self) -> int:
        """``NODE_RANK``."""
        return self._number("NODE_RANK", 0)

    @property
    def restart_count(self) -> int:
        """How often ``fabric run --max-restarts`` has started the ranks again."""
        return whole(os.environ, RESTARTS) or 0 if self.creates_processes_externally else 0

    def _number(self, variable: str, otherwise: int) -> int:
        """Variables of a foreign launcher that happen to be set are not ours to read."""
        if not self.creates_processes_externally:
            return otherwise
        number = whole(os.environ, variable)
        if number is None:
            raise ConfigurationError(
                f"{LAUNCHED} says that a launcher has started this process, but its environment variable {variable} "
                f"is {os.environ.get(variable, 'missing')!r}. Launchers set it to a whole number; see what changed it, "
                f"or remove {LAUNCHED} to train in this process alone."
            )
        return number


def whole(environ: Mapping[str, str], variable: str) -> int | None:
    """The whole number in a variable; ``None`` when it is missing or holds anything else."""
    text = environ.get(variable, "")
    return int(text) if text.isascii() and text.isdigit() else None


def is_loopback(address: str) -> bool:
    """Whether an address can only be reached from this machine."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
