"""The job file of Acme's scheduler. Each mistake in it is told by file and key."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fabric_core import ConfigurationError

FILE, TASK = "ACME_JOB_FILE", "ACME_TASK"

KEYS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "nodes": (lambda v: type(v) is list and {*map(type, v)} == {str} and all(v), "a list of host names"),
    "processes_per_node": (lambda v: type(v) is int and v > 0, "a whole number from 1"),
    "port": (lambda v: type(v) is int and 0 < v < 65536, "a whole number from 1 to 65535"),
}


@dataclass(frozen=True)
class Job:
    """What the file says of all processes of a job, and the number of this one: node after node is filled."""

    nodes: list[str]
    processes_per_node: int
    port: int
    task: int


def read_job(environ: Mapping[str, str]) -> Job:
    """Read the job file and the number of this process. A `ConfigurationError` says what is wrong with either."""
    path, task = environ.get(FILE), environ.get(TASK, "")
    if not path:
        raise ConfigurationError(f"{FILE} is not set. Acme's scheduler sets it to the path of the job file.")
    file = f"The job file {path} ({FILE})"
    try:
        entries = dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{file} cannot be read as a JSON object: {error}.") from error
    for key, (fits, wanted) in KEYS.items():
        if not fits(entries.get(key)):
            found = repr(entries[key]) if key in entries else "missing"
            raise ConfigurationError(f"{file}: {key!r} has to be {wanted}, and is {found}.")
    size = len(entries["nodes"]) * entries["processes_per_node"]
    if not (task.isascii() and task.isdigit() and int(task) < size):
        why = f"has to be the number of this process, from 0 to {size - 1} by the job file {path}, and is {task!r}"
        raise ConfigurationError(f"{TASK} {why}. Acme's scheduler sets it; see what changed it.")
    return Job(**{key: entries[key] for key in KEYS}, task=int(task))
