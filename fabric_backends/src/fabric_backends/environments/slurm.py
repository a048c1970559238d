"""Tasks that SLURM's srun has started. Nothing here imports PyTorch."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from fabric_backends.environments.nodelist import expand
from fabric_backends.environments.requeue import Requeue
from fabric_backends.environments.started import StartedEnvironment
from fabric_backends.environments.variables import Variables, fewer_visible, of_equal_nodes, port_of, whole
from fabric_backends.hooks import SLURM
from fabric_core.errors import ConfigurationError, OptionsError
from fabric_core.specs import Detection

_STEP, _TASKS, _PER_NODE = "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"
_NO_STEP = (
    0xFFFFFFF0  # from here on, numbers of steps stand for batch scripts, interactive shells and the like
)
_OTHER_STARTERS = (
    "FABRIC_LAUNCHED",
    "TORCHELASTIC_RUN_ID",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "RAY_RAYLET_PID",
)
_GROUP = re.compile(r"([1-9][0-9]*)(?:\(x[0-9]+\))?")  # 2 tasks on each of 3 nodes: "2(x3)"
_ORDER_TIMEOUT = 60.0  # seconds that scontrol may take

_variables = Variables("slurm", "Start the script with srun, which sets it", "srun")


def detect(environ: Mapping[str, str]) -> Detection | None:
    """Recognise a task of srun. A batch script without srun, and a shell in an allocation, are no tasks."""
    if not _is_task(environ):
        _say_if_alone(environ)
        return None
    note = f"srun has started this as task {environ.get('SLURM_PROCID')} of step {environ[_STEP]}"
    per_node = _tasks_per_node(environ.get(_PER_NODE, ""))
    if len(set(per_node)) > 1:
        return Detection(note=f"{note}; its nodes have unequal numbers of tasks")
    own = fewer_visible(environ, than=whole(environ, "SLURM_GPUS_ON_NODE"))
    return of_equal_nodes(whole(environ, _TASKS), next(iter(per_node), None), note, own_devices=own)


class SlurmEnvironment(StartedEnvironment):
    """Ranks from the variables that srun sets for each task.

    Args:
        auto_requeue: Whether to have SLURM start the job again after the signal. By default, unless the script has
            installed a handler of its own for that signal before. See [Note: requeue].
        requeue_signal: The signal that ``sbatch --signal=USR1@90`` sends some time before the end: a name or a number.
        requeue_grace: Seconds from the signal until the job is requeued even if the training loop goes on.
    """

    spec = SLURM

    def __init__(
        self,
        *,
        auto_requeue: bool | None = None,
        requeue_signal: int | str = "SIGUSR1",
        requeue_grace: float = 60.0,
    ) -> None:
        self.auto_requeue = auto_requeue
        self.requeue_signal = _signal(requeue_signal)
        self.requeue_grace = requeue_grace
        self._requeue: Requeue | None = None

    @property
    def main_address(self) -> str:
        """``MASTER_ADDR``; loopback in a step on one node; otherwise the node of task 0."""
        given = os.environ.get("MASTER_ADDR")
        if given:
            return given
        return "127.0.0.1" if self.single_node else _host_of_rank_zero()

    @property
    def main_port(self) -> int:
        """``MASTER_PORT``, or a number made of those of job and step."""
        if os.environ.get("MASTER_PORT"):
            return _variables.number("MASTER_PORT", least=1)
        return port_of(10 * _variables.number("SLURM_JOB_ID") + _variables.number(_STEP))

    @property
    def single_node(self) -> bool:
        """Whether the step has one node."""
        return _variables.number("SLURM_STEP_NUM_NODES", least=1) == 1

    def world_size(self) -> int:
        """``SLURM_STEP_NUM_TASKS``."""
        return _variables.number(_TASKS, least=1)

    def global_rank(self) -> int:
        """``SLURM_PROCID``."""
        return _variables.number("SLURM_PROCID")

    def local_rank(self) -> int:
        """``SLURM_LOCALID``."""
        return _variables.number("SLURM_LOCALID")

    def node_rank(self) -> int:
        """``SLURM_NODEID``."""
        return _variables.number("SLURM_NODEID")

    @property
    def restart_count(self) -> int:
        """How many times SLURM has requeued this job: 0 the first time."""
        return whole(os.environ, "SLURM_RESTART_COUNT") or 0

    @property
    def requeue_requested(self) -> bool:
        """Whether the signal has come on this rank."""
        return self._requeue is not None and self._requeue.requested

    def accept_requeue(self) -> None:
        """Requeue the job at `teardown`. Called on every rank; rank 0 gives the order."""
        if self._requeue is not None:
            self._requeue.accepted = True

    def validate(self, processes_per_node: int, num_nodes: int) -> None:
        """Compare what srun has started with what the user asked for. Called on every rank.

        Raises:
            ConfigurationError: The tasks are spread unequally, the numbers differ, or the host of task 0 is unknown.
        """
        per_node = _tasks_per_node(_variables.text(_PER_NODE))
        if not per_node:
            raise _variables.malformed(_PER_NODE, "which is no list of numbers such as '2(x3),1'")
        if len(set(per_node)) > 1:
            raise ConfigurationError(
                f"srun has started {self.world_size()} tasks, {' and '.join(map(str, per_node))} on the nodes of the "
                "step. Training needs the same number on every node: give --ntasks-per-node together with --nodes, "
                "in place of --ntasks."
            )
        super().validate(processes_per_node, num_nodes)
        if not self.single_node:
            _resolve(self.main_address)

    def join(self) -> None:
        """Begin to listen for the signal. Called on every rank."""
        order = self.requeue if self.global_rank() == 0 and self.auto_requeue is not False else None
        self._requeue = Requeue(
            self.requeue_signal, order, grace=self.requeue_grace, yields=self.auto_requeue is None
        )
        self._requeue.listen()

    def teardown(self) -> None:
        """Requeue the job if the ranks have accepted that, and put back the handler that was there."""
        if self._requeue is not None:
            self._requeue.stop()

    def requeue(self) -> None:
        """Have SLURM stop this job and put it back into the queue. Called on one rank; warns when it cannot."""
        command = ("scontrol", "requeue", _job())
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_ORDER_TIMEOUT)
        except (OSError, subprocess.SubprocessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip()
            warnings.warn(
                f"The job could not be requeued: {' '.join(command)!r} failed ({reason}). Submit it again by hand, or "
                "see whether it was submitted with --no-requeue.",
                stacklevel=2,
            )


def _is_task(environ: Mapping[str, str]) -> bool:
    """Whether srun has started this process or what it descends from.

    Shells hand their variables down, so that those of a step also reach what is no part of it: an interactive shell
    and the batch scripts that are submitted from it. A step on a terminal with one task is such a shell, and where
    the step's number of tasks is not the job's, the step is another one's.
    """
    step, tasks = whole(environ, _STEP), environ.get(_TASKS)
    if _STEP not in environ or (step is not None and step >= _NO_STEP):
        return False
    if "SLURM_PTY_PORT" in environ and tasks == "1":
        return False
    numbers = {whole(environ, _TASKS), whole(environ, "SLURM_NTASKS")} - {None}
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


def _tasks_per_node(text: str) -> list[int]:
    """``"2(x3),1"`` as ``[2, 2, 2, 1]``, but equal neighbours once; empty when it is anything else."""
    groups = [_GROUP.fullmatch(part) for part in text.split(",")]
    return [int(group[1]) for group in groups if group] if all(groups) else []


def _host_of_rank_zero() -> str:
    if os.environ.get("SLURM_DISTRIBUTION", "").partition(":")[0] == "arbitrary":
        return _first_of_hostfile()
    return next(expand(_variables.text("SLURM_STEP_NODELIST")))


def _first_of_hostfile() -> str:
    """The order of the node list is not that of the tasks then; only the user's file knows it."""
    with suppress(OSError, StopIteration), open(os.environ.get("SLURM_HOSTFILE", "")) as lines:
        return next(line.strip() for line in lines if line.strip())
    raise ConfigurationError(
        "srun was told to distribute the tasks in an arbitrary order, so that their first node is known from "
        "SLURM_HOSTFILE alone, which cannot be read. Set MASTER_ADDR to the host of task 0."
    )


def _resolve(host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise ConfigurationError(
            f"The host {host!r} of task 0 cannot be resolved ({error}). SLURM's name of the node is not the network's. "
            "Set MASTER_ADDR to an address that all nodes reach."
        ) from error


def _job() -> str:
    """What scontrol calls this job; the number of an array's task alone may mean the whole array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"{array}_{_variables.text('SLURM_ARRAY_TASK_ID')}"
    return _variables.text("SLURM_JOB_ID")


def _signal(asked: Any) -> int:
    with suppress(ValueError, KeyError):
        if isinstance(asked, str):
            return signal.Signals[f"SIG{asked.upper().removeprefix('SIG')}"]
        return signal.Signals(asked)
    raise OptionsError(
        f"The option requeue_signal is {asked!r}. It takes the name or the number of a signal, such as 'SIGUSR1'."
    )
