"""Options of the cluster environments."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SlurmOptions:
    """Of ``slurm``.

    Attributes:
        auto_requeue: Whether to have SLURM start the job again after the signal. Without it: unless the script has a
            handler of its own for that signal.
        requeue_signal: The signal that "sbatch --signal=USR1@90" sends some time before the end: a name or a number.
        requeue_grace: Seconds from the signal until the job is requeued even if the training loop goes on.
    """

    auto_requeue: bool | None = None
    requeue_signal: int | str = "SIGUSR1"
    requeue_grace: float = 60.0
