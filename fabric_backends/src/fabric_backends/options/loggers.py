"""Options of the loggers."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike


@dataclass(frozen=True)
class RunFolderOptions:
    """Of what writes into a folder per run.

    Attributes:
        root_dir: The folder of all logs.
        name: The folder of this experiment in it; may be empty.
        version: The folder of this run: a number or a name. Without it, the next free number.
        prefix: Put before the name of each metric, with "-" between them.
    """

    root_dir: str | PathLike[str] = "logs"
    name: str = "fabric_logs"
    version: int | str | None = None
    prefix: str = ""


@dataclass(frozen=True)
class CSVOptions(RunFolderOptions):
    """Of ``csv``.

    Attributes:
        flush_logs_every_n_steps: How many rows to hold back at most.
    """

    flush_logs_every_n_steps: int = 100


@dataclass(frozen=True)
class TensorBoardOptions(RunFolderOptions):
    """Of ``tensorboard``.

    Attributes:
        default_hp_metric: Give settings a first metric, because TensorBoard shows settings only beside a metric.
        sub_dir: A folder in the run's folder, where the files go.
        max_queue: How many things to hold back at most.
        flush_secs: Seconds after which what is held back is written.
        purge_step: Hide what earlier files hold from this step on.
        filename_suffix: The end of the files' names.
    """

    default_hp_metric: bool = True
    sub_dir: str | PathLike[str] | None = None
    max_queue: int = 10
    flush_secs: int = 120
    purge_step: int | None = None
    filename_suffix: str = ""
