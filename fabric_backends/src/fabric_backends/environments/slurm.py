"""Tasks that SLURM's srun has started. Nothing here imports PyTorch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import warnings
from contextlib import suppress
from typing import Any

from fabric_backends.environments.requeue import Requeue
from fabric_backends.environments.slurm_tasks import (
    PER_NODE,
    STEP,
    TASKS,
    VARIABLES,
    host_of_rank_zero,
    tasks_per_node,
)
from fabric_backends.environments.started import StartedEnvironment
from fabric_backends.environments.variables import port_of, whole
from fabric_backends.hooks import SLURM
from fabric_core.errors import ConfigurationError, OptionsError

_ORDER_TIMEOUT = 60.0  # seconds that scontrol may take


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
        return "127.0.0.1" if self.single_node else host_of_rank_zero()

    @property
    def main_port(self) -> int:
        """``MASTER_PORT``, or a number made of those of job and step."""
        if os.environ.get("MASTER_PORT"):
            return VARIABLES.number("MASTER_PORT", least=1)
        return port_of(10 * VARIABLES.number("SLURM_JOB_ID") + VARIABLES.number(STEP))

    @property
    def single_node(self) -> bool:
        """Whether the step has one node."""
        return VARIABLES.number("SLURM_STEP_NUM_NODES", least=1) == 1

    def world_size(self) -> int:
        """``SLURM_STEP_NUM_TASKS``."""
        return VARIABLES.number(TASKS, least=1)

    def global_rank(self) -> int:
        """``SLURM_PROCID``."""
        return VARIABLES.number("SLURM_PROCID")

    def local_rank(self) -> int:
        """``SLURM_LOCALID``."""
        return VARIABLES.number("SLURM_LOCALID")

    def node_rank(self) -> int:
        """``SLURM_NODEID``."""
        return VARIABLES.number("SLURM_NODEID")

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
        per_node = tasks_per_node(VARIABLES.text(PER_NODE))
        if not per_node:
            raise VARIABLES.malformed(PER_NODE, "which is no list of numbers such as '2(x3),1'")
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
        return f"{array}_{VARIABLES.text('SLURM_ARRAY_TASK_ID')}"
    return VARIABLES.text("SLURM_JOB_ID")


def _signal(asked: Any) -> int:
    with suppress(ValueError, KeyError):
        if isinstance(asked, str):
            return signal.Signals[f"SIG{asked.upper().removeprefix('SIG')}"]
        return signal.Signals(asked)
    raise OptionsError(
        f"The option requeue_signal is {asked!r}. It takes the name or the number of a signal, such as 'SIGUSR1'."
    )
