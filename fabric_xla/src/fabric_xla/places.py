"""Where this machine stands among those of a job, and where its processes meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fabric_core.errors import ConfigurationError
from fabric_core.supervisor import DEFAULT_MAIN_PORT


@dataclass(frozen=True)
class Place:
    """This machine among those of the job, and where all of them meet.

    Attributes:
        number: Of this machine, from 0.
        address: Of the first machine.
        port: What the ranks find as ``MASTER_PORT``, where nothing listens before they do; 0 for any that is free.
        store_port: Where the launcher serves the store, likewise.
    """

    number: int
    address: str
    port: int
    store_port: int

    @property
    def store(self) -> str:
        """Where the store is: ``address:port``."""
        return f"{self.address}:{self.store_port}"


def this_place(num_nodes: int, environ: Mapping[str, str]) -> Place:
    """From the variables that a cluster sets, else from what the TPU says of itself.

    Args:
        num_nodes: How many machines the job has.
        environ: The environment variables.

    Raises:
        ConfigurationError: ``MASTER_PORT`` is no port.
    """
    if num_nodes == 1:
        return Place(0, "127.0.0.1", port_of(environ, 0), 0)
    port = port_of(environ, DEFAULT_MAIN_PORT)
    number = environ.get("NODE_RANK", environ.get("TPU_WORKER_ID"))
    names = environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    address = environ.get("MASTER_ADDR", names[0])
    if number is None or not address:
        import torch_xla

        number = torch_xla.tpu.worker_id() if number is None else number
        address = address or torch_xla.tpu.get_worker_ips()[0]
    return Place(int(number), address, port, port + 1)  # the next port is known on every machine


def port_of(environ: Mapping[str, str], otherwise: int) -> int:
    """What ``MASTER_PORT`` says.

    Args:
        environ: The environment variables.
        otherwise: The answer where it is not set.

    Raises:
        ConfigurationError: It is no port.
    """
    text = environ.get("MASTER_PORT", str(otherwise))
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise ConfigurationError(
            f"The environment variable MASTER_PORT is {text!r}, which is no port. Set it to one that is free, the same "
            "on every machine, or leave it out."
        )
    return int(text)
