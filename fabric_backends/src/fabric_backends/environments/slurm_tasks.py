"""What srun tells a task of its step, and who is no task. Nothing here imports PyTorch."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress

from fabric_backends.environments.nodelist import expand
from fabric_backends.environments.variables import Variables, fewer_visible, of_equal_nodes, whole
from fabric_core.errors import ConfigurationError
from fabric_core.specs import Detection

STEP, TASKS, PER_NODE = "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"
_NO_STEP = 0xFFFFFFF0  # from here on, numbers of steps stand for batch scripts, interactive shells and so on
_OTHER_STARTERS = (
    "FABRIC_LAUNCHED",
    "TORCHELASTIC_RUN_ID",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "RAY_RAYLET_PID",
)
_GROUP = re.compile(r"([1-9][0-9]*)(?:\(x[0-9]+\))?")  # 2 tasks on each of 3 nodes: "2(x3)"

VARIABLES = Variables("slurm", "Start the script with srun, which sets it", "srun")


def detect(environ: Mapping[str, str]) -> Detection | None:
    """Recognise a task of srun. A batch script without srun, and a shell in an allocation, are no tasks."""
    if not _is_task(environ):
        _say_if_alone(environ)
        return None
    note = f"srun has started this as task {environ.get('SLURM_PROCID')} of step {environ[STEP]}"
    per_node = tasks_per_node(environ.get(PER_NODE, ""))
    if len(set(per_node)) > 1:
        return Detection(note=f"{note}; its nodes have unequal numbers of tasks")
    own = fewer_visible(environ, than=whole(environ, "SLURM_GPUS_ON_NODE"))
    return of_equal_nodes(whole(environ, TASKS), next(iter(per_node), None), note, own_devices=own)


def _is_task(environ: Mapping[str, str]) -> bool:
    """Whether srun has started this process or what it descends from.

    Shells hand their variables down, so that those of a step also reach what is no part of it: an interactive shell
    and the batch scripts that are submitted from it. A step on a terminal with one task is such a shell, and where
    the step's number of tasks is not the job's, the step is another one's.
    """
    step, tasks = whole(environ, STEP), environ.get(TASKS)
    if STEP not in environ or (step is not None and step >= _NO_STEP):
        return False
    if "SLURM_PTY_PORT" in environ and tasks == "1":
        return False
    numbers = {whole(environ, TASKS), whole(environ, "SLURM_NTASKS")} - {None}
    return len(numbers) < 2


def _say_if_alone(environ: Mapping[str, str]) -> None:
    tasks = whole(environ, "SLURM_NTASKS")
    if tasks is None or tasks < 2 or any(name in environ for name in _OTHER_STARTERS):
        return
    warnings.warn(
        f"SLURM has {tasks} tasks for this job, but this process was not started by srun, and does not know of any "
        "other. Start the script with srun to train on all of them.",
        stacklevel=2,
    )


def tasks_per_node(text: str) -> list[int]:
    """``"2(x3),1"`` as ``[2, 2, 2, 1]``, but equal neighbours once; empty when it is anything else."""
    groups = [_GROUP.fullmatch(part) for part in text.split(",")]
    return [int(group[1]) for group in groups if group] if all(groups) else []


def host_of_rank_zero() -> str:
    """The host of task 0, as SLURM calls it.

    Raises:
        ConfigurationError: It cannot be known.
    """
    if os.environ.get("SLURM_DISTRIBUTION", "").partition(":")[0] == "arbitrary":
        return _first_of_hostfile()
    return next(expand(VARIABLES.text("SLURM_STEP_NODELIST")))


def _first_of_hostfile() -> str:
    """The order of the node list is not that of the tasks then; only the user's file knows it."""
    with suppress(OSError, StopIteration), open(os.environ.get("SLURM_HOSTFILE", "")) as lines:
        return next(line.strip() for line in lines if line.strip())
    raise ConfigurationError(
        "srun was told to distribute the tasks in an arbitrary order, so that their first node is known from "
        "SLURM_HOSTFILE alone, which cannot be read. Set MASTER_ADDR to the host of task 0."
    )
