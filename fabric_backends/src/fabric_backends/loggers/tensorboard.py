"""Metrics for TensorBoard."""

from __future__ import annotations

import inspect
import os
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabric_backends.hooks import TENSORBOARD
from fabric_backends.loggers.replacing import flush
from fabric_backends.loggers.run_folder import RunFolder
from fabric_core.contracts.logger import Logger
from fabric_core.errors import CheckpointError, MissingRequirementError, unknown_option

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

WRITER_OPTIONS = ("filename_suffix", "flush_secs", "max_queue", "purge_step")
SECONDS_UNTIL_RETRY = 60.0
EVENT_FILES = "events.out.tfevents."


class TensorBoardLogger(Logger):
    """Writes event files. ``tensorboard`` is imported when the first thing is written.

    When the disk fails during a run (full, gone), the training goes on: one warning, and another try a minute later.
    What is logged in between is missing, and so may be what was on its way. A folder that cannot be made is an error.

    In the state of a checkpoint, it goes on in the same folder: what a run that was killed wrote after the checkpoint
    is cut off, and a TensorBoard that is running is told to forget it. Event files in the folder that came after the
    checkpoint are deleted, whoever wrote them. A logger with another ``version`` begins there.

    Args:
        root_dir: The folder of all logs; what ``tensorboard --logdir`` is given.
        name: The folder of this experiment in it; may be empty.
        version: The folder of this run: a number or a name. One that is there already is continued. By default the
            next free number.
        default_hp_metric: Give settings a first metric, ``hp_metric``, because TensorBoard shows settings only
            beside a metric.
        prefix: Put before the name of each metric, with ``-`` between them.
        sub_dir: A folder in the run's folder, where the files go.
        options: Of ``torch.utils.tensorboard.SummaryWriter``: ``max_queue``, ``flush_secs``, ``purge_step``,
            ``filename_suffix``.

    Raises:
        OptionsError: The writer has no such option.
    """

    spec = TENSORBOARD

    def __init__(
        self,
        root_dir: str | os.PathLike[str] = "logs",
        name: str = "fabric_logs",
        version: int | str | None = None,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        for option in options:
            if option not in WRITER_OPTIONS:
                raise unknown_option("TensorBoardLogger", option, (*_own_options(), *WRITER_OPTIONS))
        self._folder = RunFolder(root_dir, name, version)
        self._default_hp_metric = default_hp_metric
        self._prefix = prefix
        self._sub_dir = sub_dir
        self._purge_step = options.pop("purge_step", None)  # told once, and not to every writer that follows
        self._options = options
        self._writer: SummaryWriter | None = None
        self._points: Counter[str] = Counter()
        self._next_step = 0
        self._retry_at = 0.0
        self._missing = 0

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
        """Where the files go. Ask on global rank 0 only: the run's folder is made now, if it is not there yet."""
        return self._folder.path / (self._sub_dir or "")

    @property
    def experiment(self) -> SummaryWriter:
        """PyTorch's own writer, for images, histograms and all else that it can. Use it on global rank 0 only.

        Raises:
            MissingRequirementError: TensorBoard is not installed.
        """
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingRequirementError(
                    f"TensorBoardLogger needs the package tensorboard, which cannot be imported: {error}. "
                    "Install it: pip install tensorboard"
                ) from error
            self._writer = SummaryWriter(str(self.log_dir), purge_step=self._purge_step, **self._options)
            self._purge_step = None
            weakref.finalize(self, _close_at_exit, self._writer, os.getpid())
        return self._writer

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record one point per metric. Those without a step are counted, from 0, for each metric on its own."""

        def write(writer: Any) -> None:
            for name, value in metrics.items():
                tag = f"{self._prefix}-{name}" if self._prefix else name
                at = self._points[tag] if step is None else step
                writer.add_scalar(tag, value, at)
                self._points[tag] += step is None
                self._next_step = max(self._next_step, at + 1)

        self._try(write, len(metrics))

    def log_hyperparams(self, params: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Record the settings of the run, for TensorBoard's table of them.

        Args:
            params: The settings; nested ones appear as ``outer/inner``.
            metrics: The metrics to show beside them, with their first values.
        """
        if metrics is None:
            metrics = {"hp_metric": -1} if self._default_hp_metric else {}
        flat, first = dict(_flat(params)), dict(metrics)

        def write(writer: Any) -> None:
            from torch.utils.tensorboard import summary

            hparams: Callable[..., Any] = summary.hparams
            for name, value in first.items():
                writer.add_scalar(name, value, 0)
            for part in hparams(flat, first):
                writer._get_file_writer().add_summary(part)

        self._try(write, len(flat))

    def save(self) -> None:
        """Wait until everything is on disk."""
        if self._writer is not None:
            self._try(lambda writer: writer.flush(), 0)

    def state_dict(self) -> dict[str, Any]:
        """The run's folder, how long its event files are, and where counting goes on."""
        if self._writer is not None:
            self._try(self._flush, 0)
        # what a disk that fails shows is not what there is
        is_known = not self._retry_at and self.log_dir.is_dir()
        return {
            "version": self.version,
            "files": {path.name: path.stat().st_size for path in self._event_files()} if is_known else None,
            "points": dict(self._points),
            "next_step": self._next_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the folder of the run, and cut its event files back to what they were.

        Raises:
            CheckpointError: They cannot be written, or it is the state of something else.
        """
        if not self._folder.continues(state, "files", "points", "next_step"):
            return
        if self._writer is not None:
            _close_quietly(self._writer)
            self._writer = None
        self._folder.go_on_with(state["version"], (f"{EVENT_FILES}*",))
        self._points, self._next_step = Counter(state["points"]), state["next_step"]
        self._purge_step = self._next_step or None
        try:
            missing = [] if state["files"] is None else self._cut(state["files"])
        except OSError as error:
            raise CheckpointError(
                f"The event files in {str(self.log_dir)!r} could not be cut back to what they were at the checkpoint: "
                f"{error}."
            ) from error
        _wait_for_the_next_second(self._event_files())
        if missing:
            warnings.warn(
                f"Event files that were written before the checkpoint are not in {str(self.log_dir)!r}, or are shorter "
                f"than they were: {', '.join(missing)}. Was the folder moved or emptied? The run goes on without them.",
                UserWarning,
                stacklevel=2,
            )

    def _flush(self, writer: Any) -> None:
        writer.flush()
        for path in self._event_files():
            flush(path)

    def _cut(self, sizes: Mapping[str, int]) -> list[str]:
        """Make event files what they were; the names of those that have less than that."""
        found = {path.name: path for path in self._event_files()}
        for name, path in found.items():
            if name not in sizes:
                path.unlink()
            elif path.stat().st_size > sizes[name]:
                os.truncate(path, sizes[name])
        return [
            name for name, size in sizes.items() if name not in found or found[name].stat().st_size < size
        ]

    def _event_files(self) -> list[Path]:
        return sorted(self.log_dir.glob(f"{EVENT_FILES}*"))

    def finalize(self, status: str) -> None:
        """Write everything, close the files, and say so when something is missing."""
        if self._writer is not None:
            self._try(lambda writer: writer.close(), 0)
            self._writer = None
        if self._missing:
            warnings.warn(
                f"At least {self._missing} value(s) are missing in {str(self.log_dir)!r}, because the disk failed.",
                UserWarning,
                stacklevel=2,
            )
            self._missing = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_writer": None}

    def _try(self, write: Callable[[Any], None], values: int) -> None:
        if time.monotonic() < self._retry_at:
            self._missing += values
            return
        self.log_dir  # noqa: B018  (a folder that cannot be made is an error of its own)
        try:
            write(self.experiment)
        except OSError as error:
            self._missing += values
            self._give_up_writer(error)
        else:
            self._retry_at = 0.0

    def _give_up_writer(self, error: OSError) -> None:
        writer, self._writer = self._writer, None
        first_time, self._retry_at = not self._retry_at, time.monotonic() + SECONDS_UNTIL_RETRY
        if writer is not None:
            _close_quietly(writer)
        if first_time:
            warnings.warn(
                f"Metrics could not be written for TensorBoard: {error}. The training goes on; some of them will be "
                f"missing. The next try is in {SECONDS_UNTIL_RETRY:.0f} s.",
                UserWarning,
                stacklevel=4,
            )


def _own_options() -> list[str]:
    return [name for name in inspect.signature(TensorBoardLogger).parameters if name != "options"]


def _flat(params: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in params.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}/")
        else:
            yield name, value if isinstance(value, bool | int | float | str) else str(value)


def _wait_for_the_next_second(files: list[Path]) -> None:
    """Let the next event file sort after those that are there: names begin with the second in which they were made."""
    made = [int(path.name.removeprefix(EVENT_FILES).partition(".")[0]) for path in files]
    while 0 <= max(made, default=0) - int(time.time()) < 2:  # not for a clock that was wrong
        time.sleep(0.05)


def _close_at_exit(writer: SummaryWriter, process: int) -> None:
    """Close in the process that opened; a forked copy has no thread that could write."""
    if os.getpid() == process:
        _close_quietly(writer)


def _close_quietly(writer: SummaryWriter) -> None:
    try:
        writer.close()
    except OSError:
        return  # it has failed before, and was reported then
