"""Reading environment variables: leniently where a job is detected, strictly where a rank depends on it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fabric_core.errors import ConfigurationError
from fabric_core.specs import Detection

VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
"""Where schedulers say which devices of a node a process may see."""

_FIRST_PORT, _PORTS = 12000, 20000
"""Ports that systems neither reserve nor hand out to outgoing connections."""


@dataclass(frozen=True)
class Variables:
    """The variables of one cluster environment, read anew each time.

    Attributes:
        environment: Its name, for messages.
        advice: What to do when one is missing, as the beginning of a sentence (``"Start … with torchrun, which sets
            it"``).
        setter: Who sets them.
    """

    environment: str
    advice: str
    setter: str

    def text(self, name: str) -> str:
        """The value of a variable.

        Raises:
            ConfigurationError: It is not set, or empty.
        """
        value = os.environ.get(name)
        if not value:
            raise ConfigurationError(
                f"The cluster environment {self.environment!r} needs the environment variable {name}, which is not "
                f"set. {self.advice}, or leave the cluster environment to be detected."
            )
        return value

    def number(self, name: str, least: int = 0) -> int:
        """The value of a variable that holds a whole number.

        Raises:
            ConfigurationError: It is not set, or no whole number from ``least``.
        """
        self.text(name)
        number = whole(os.environ, name)
        if number is None:
            raise self.malformed(name, "which is no number")
        if number < least:
            raise self.malformed(name, f"which has to be {least} or more")
        return number

    def malformed(self, name: str, why: str) -> ConfigurationError:
        """The error for a variable that holds something else than it should."""
        return ConfigurationError(
            f"The environment variable {name} is {os.environ.get(name)!r}, {why}. {self.setter} sets it; see what "
            "changed it."
        )


def whole(environ: Mapping[str, str], name: str) -> int | None:
    """The whole number in a variable; ``None`` when it is not set or holds anything else."""
    text = environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else None


def of_equal_nodes(
    world_size: int | None, per_node: int | None, note: str, *, own_devices: bool = False
) -> Detection:
    """The detection of a job whose nodes have equal numbers of processes; one without numbers when they have not."""
    if not world_size or not per_node:
        return Detection(note=note)
    if world_size % per_node:
        return Detection(note=f"{note}; its nodes have unequal numbers of processes")
    return Detection(per_node, world_size // per_node, note, own_devices)


def fewer_visible(environ: Mapping[str, str], than: int | None) -> bool:
    """Whether this process was given devices, and fewer of them than ``than``."""
    counts = [len(environ[name].split(",")) for name in VISIBLE_DEVICES if environ.get(name)]
    return bool(counts and than and min(counts) < than)


def port_of(job: int) -> int:
    """A port for a job that is the same on all its ranks, and another one for the next jobs."""
    return _FIRST_PORT + job % _PORTS
