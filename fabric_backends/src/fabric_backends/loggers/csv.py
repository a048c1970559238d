"""Metrics as a table: one CSV file per run, and a JSON file with its settings."""

from __future__ import annotations

import json
import os
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fabric_backends.hooks import CSV
from fabric_backends.loggers.replacing import flush, replacing
from fabric_backends.loggers.run_folder import RunFolder
from fabric_backends.loggers.table import STEP, Table
from fabric_core.contracts.logger import Logger
from fabric_core.errors import CheckpointError, ConfigurationError, OptionsError

METRICS_FILE = "metrics.csv"
HYPERPARAMETERS_FILE = "hparams.json"


class CSVLogger(Logger):
    """Writes ``metrics.csv``: a column ``step``, and a column per metric; an empty cell where there is no value.

    Everything that is logged for one step ends in one row, however many calls it took; calls without a step have a row
    each. Rows are in the order in which their steps first came. Rows that are held back are written by `save`, at the
    end of the process, and whenever there are enough of them; ``kill -9`` costs the rows held back and no others.

    When the disk fails during a run (full, gone), the training goes on: one warning, the rows are held and written as
    soon as that works again. A folder that cannot be made is an error at once.

    In the state of a checkpoint, it goes on with the same file: the file of a run that was killed and resumed, however
    often, equals that of a run never killed byte for byte. A logger with another ``version`` begins there.

    Args:
        root_dir: The folder of all logs.
        name: The folder of this experiment in it; may be empty.
        version: The folder of this run: a number or a name. One that is there already is continued. By default the
            next free number.
        prefix: Put before the name of each metric, with ``-`` between them.
        flush_logs_every_n_steps: How many rows to hold back at most.
    """

    spec = CSV

    def __init__(
        self,
        root_dir: str | os.PathLike[str] = "logs",
        name: str = "fabric_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        if flush_logs_every_n_steps < 1:
            raise OptionsError(f"flush_logs_every_n_steps={flush_logs_every_n_steps} has to be at least 1.")
        self._folder = RunFolder(root_dir, name, version)
        self._prefix = prefix
        self._held_at_most = self._save_at = flush_logs_every_n_steps
        self._failed = False
        self._table: Table | None = None
        self._hyperparameters: dict[str, Any] = {}
        self._hyperparameters_held = False

    @property
    def name(self) -> str:
        """The experiment, as given."""
        return self._folder.name

    @property
    def version(self) -> str:
        """The name of the run's folder. Ask on global rank 0 only: it is made now, if it is not there yet."""
        return self._folder.version

    @property
    def log_dir(self) -> Path:
        """The run's folder. Ask on global rank 0 only: it is made now, if it is not there yet."""
        return self._folder.path

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record metrics in the row of their step.

        Raises:
            ConfigurationError: The folder cannot be made, or a metric is called ``step`` and is not the step.
        """
        if self._prefix:
            metrics = {f"{self._prefix}-{name}": value for name, value in metrics.items()}
        if STEP in metrics:
            step = _agreed_step(metrics, step)
        table = self._opened()
        table.add(step, metrics)
        if table.unsaved >= self._save_at:
            self.save()

    def _opened(self) -> Table:
        if self._table is None:
            self._table = Table(self.log_dir / METRICS_FILE)
            weakref.finalize(self, self._table.save_at_exit)
        return self._table

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Record settings in ``hparams.json``, in addition to those that are there. What JSON cannot hold becomes text.

        Raises:
            ConfigurationError: The folder cannot be made, or the file that is there cannot be read.
        """
        path = self.log_dir / HYPERPARAMETERS_FILE
        if not self._hyperparameters and path.exists():
            self._hyperparameters = _read_json(path)
        self._hyperparameters.update(params)
        self._hyperparameters_held = True
        self._save_hyperparams()

    def save(self) -> None:
        """Write the rows that are held back."""
        self._save_hyperparams()
        if self._table is None:
            return
        try:
            self._table.save()
        except OSError as error:
            self._table.give_up_oldest()
            self._save_at = self._table.unsaved + self._held_at_most
            self._report(error)
        else:
            self._failed, self._save_at = False, self._held_at_most

    def state_dict(self) -> dict[str, Any]:
        """The run's folder and what its table holds; rows that cannot be written are part of it."""
        table = self._opened()
        self.save()
        try:
            flush(table.path)
        except OSError as error:
            self._report(error)
        return {"version": self.version, "table": table.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the folder of the run, and cut its table back to what it was.

        Raises:
            CheckpointError: The table cannot be written, or it is the state of something else.
        """
        if not self._folder.continues(state, "table"):
            return
        if self._table is not None:
            self._table.forget()
            self._table = None
        self._folder.go_on_with(state["version"], (METRICS_FILE, HYPERPARAMETERS_FILE))
        table = self._opened()
        try:
            missing = table.go_back(state["table"])
        except OSError as error:
            raise CheckpointError(
                f"The table {str(table.path)!r} could not be cut back to what it was at the checkpoint: {error}."
            ) from error
        if missing:
            self._warn(
                f"{missing} row(s) that were logged before the checkpoint are not in {str(table.path)!r}. Was the "
                "folder moved or emptied? The run goes on without them."
            )
        settings, self._hyperparameters = self._hyperparameters, {}
        if settings:
            self.log_hyperparams(settings)

    def _save_hyperparams(self) -> None:
        if not self._hyperparameters_held:
            return
        text = json.dumps(_with_text_keys(self._hyperparameters), indent=2, default=str)
        try:
            with replacing(self.log_dir / HYPERPARAMETERS_FILE) as file:
                file.write(text.encode() + b"\n")
            self._hyperparameters_held = False
        except OSError as error:
            self._report(error)

    def _report(self, error: OSError) -> None:
        """Say it once for each time that the disk begins to fail."""
        if not self._failed:
            self._failed = True
            self._warn(
                f"Nothing can be written to {str(self.log_dir)!r}: {error}. The training goes on; what is logged is "
                "held in memory and written as soon as that works again."
            )

    def finalize(self, status: str) -> None:
        """Write the rows that are held back, and say so when some are lost."""
        self.save()
        if self._hyperparameters_held:
            self._warn(f"The settings of the run could not be written to {str(self.log_dir)!r} and are lost.")
        if self._table is not None and (lost := self._table.unsaved + self._table.lost):
            path = str(self._table.path)
            self._warn(f"{lost} row(s) of metrics could not be written to {path!r} and are lost.")

    def _warn(self, message: str) -> None:
        warnings.warn(message, UserWarning, stacklevel=3)


def _agreed_step(metrics: Mapping[str, float], step: int | None) -> int:
    named = metrics[STEP]
    if step not in (None, named) or named != int(named):
        raise ConfigurationError(
            f"A metric is called {STEP!r} and is {named}, while the step is {step}. That column of the table holds the "
            "step; give the metric another name."
        )
    return int(named)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"The settings in {str(path)!r} cannot be continued: {error}. Remove the file, or choose another version."
        ) from error


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _with_text_keys(entry) for key, entry in value.items()}
    return [_with_text_keys(entry) for entry in value] if isinstance(value, list | tuple) else value
