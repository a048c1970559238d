"""Processes that jsrun has started in a job of LSF. Nothing here imports PyTorch."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fabric_backends.environments.started import StartedEnvironment
from fabric_backends.environments.variables import Variables, fewer_visible, of_equal_nodes, port_of, whole
from fabric_backends.hooks import LSF
from fabric_core.errors import ConfigurationError
from fabric_core.specs import Detection

_JOB, _RANKFILE, _RANK, _SIZE = "LSB_JOBID", "LSB_DJOB_RANKFILE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"
_LOCAL_RANK, _LOCAL_SIZE = "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"

_variables = Variables("lsf", "Start the script with jsrun in a job of LSF, which set it", "LSF's jsrun")


def detect(environ: Mapping[str, str]) -> Detection | None:
    """Recognise a process of jsrun: a job of LSF alone is none."""
    if _JOB not in environ or _RANK not in environ:
        return None
    size, per_node = whole(environ, _SIZE), whole(environ, _LOCAL_SIZE)
    if per_node is None and size:
        with suppress(OSError):
            hosts = _hosts(environ.get(_RANKFILE, ""))
            per_node = -(-size // len(hosts)) if hosts else None
    note = f"jsrun has started this process ({_JOB} and {_RANK} are set)"
    return of_equal_nodes(size, per_node, note, own_devices=fewer_visible(environ, than=per_node))


class LSFEnvironment(StartedEnvironment):
    """Ranks from the variables of jsrun; hosts from LSF's rank file, whose first line is the node that launches."""

    spec = LSF

    @property
    def main_address(self) -> str:
        """``MASTER_ADDR``, or the first host of the rank file that computes."""
        return os.environ.get("MASTER_ADDR") or _read_hosts()[0]

    @property
    def main_port(self) -> int:
        """``MASTER_PORT``, or a number made of that of the job."""
        if os.environ.get("MASTER_PORT"):
            return _variables.number("MASTER_PORT", least=1)
        return port_of(_variables.number(_JOB))

    def world_size(self) -> int:
        """``JSM_NAMESPACE_SIZE``."""
        return _variables.number(_SIZE, least=1)

    def global_rank(self) -> int:
        """``JSM_NAMESPACE_RANK``."""
        return _variables.number(_RANK)

    def local_size(self) -> int | None:
        """``JSM_NAMESPACE_LOCAL_SIZE``, which older ones do not set."""
        return _variables.number(_LOCAL_SIZE, least=1) if _LOCAL_SIZE in os.environ else None

    def local_rank(self) -> int:
        """``JSM_NAMESPACE_LOCAL_RANK``."""
        return _variables.number(_LOCAL_RANK)

    def node_rank(self) -> int:
        """The place of this host among those of the rank file."""
        hosts = [_short(host) for host in _read_hosts()]
        here = _short(socket.gethostname())
        if here not in hosts:
            raise ConfigurationError(
                f"This host, {here!r}, is not in the rank file of LSF ({os.environ.get(_RANKFILE)}), which has "
                f"{', '.join(hosts)}. See what changed {_RANKFILE}."
            )
        return hosts.index(here)


def _read_hosts() -> list[str]:
    path = _variables.text(_RANKFILE)
    try:
        hosts = _hosts(path)
    except OSError as error:
        raise ConfigurationError(
            f"The rank file of LSF, {path}, cannot be read ({error.strerror}). {_RANKFILE} says where it is; see what "
            "changed it."
        ) from error
    if not hosts:
        raise ConfigurationError(
            f"The rank file of LSF, {path}, names no host beside the one that launches. See what changed {_RANKFILE}."
        )
    return hosts


def _hosts(path: str) -> list[str]:
    """The hosts that compute, each once."""
    lines = Path(path).read_text(encoding="utf-8").split()
    return list(dict.fromkeys(lines[1:]))


def _short(host: str) -> str:
    return host.partition(".")[0]
