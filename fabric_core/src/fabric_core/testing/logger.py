"""The checks of a logger: what is logged arrives, once, and a sink that dies does not end a training."""

from __future__ import annotations

import gc
import io
import math
import pickle
import threading
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from fabric_core import Fabric, Logger
from fabric_core.testing.conformance import PartConformance
from fabric_core.testing.needs import need_plan
from fabric_core.testing.ranks import on_ranks

Written = tuple[str, float, "int | None"]
"""Name, value and step of one number that has arrived."""


class LoggerConformance(PartConformance):
    """Checks of a logger.

    A subclass states `options_for` and `written`; and `break_sink`, without which nothing shows that a training
    outlives its sink.

    Attributes:
        relative_error: How much of a number may be lost: 0 by default; 1e-6 for a sink that keeps float32.
        takes_seconds: How long a thousand steps with three metrics may take. 5 by default.
    """

    kind = "logger"

    relative_error: ClassVar[float] = 0.0
    takes_seconds: ClassVar[float] = 5.0

    def options_for(self, folder: Path) -> Mapping[str, Any]:
        """The options with which a logger writes into a folder, or to a sink that is known by it.

        Args:
            folder: Of one run; there is nothing in it.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has to state with which options the logger writes to a folder: options_for(folder)"
        )

    def written(self, folder: Path) -> Iterable[Written]:
        """What has arrived in the sink of a folder, after the run has ended: ``(name, value, step)``, in any order.

        Nothing where nothing was ever logged.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has to state how to read back what was logged: written(folder)"
        )

    def break_sink(self, folder: Path) -> None:
        """Make the sink fail from now on: remove the folder, stop the server. Called in the middle of a run."""
        pytest.skip("the class does not state how the sink dies: break_sink(folder)")

    # -- what arrives ---------------------------------------------------------------------------------------------

    def test_numbers_arrive_with_their_names_and_steps(self, tmp_path: Path) -> None:
        """Whole ones and others; steps in any order, and far apart."""
        given = [
            ("loss", 0.1, 0),
            ("loss", 1e-12, 1),
            ("loss", -3.5, 1000),
            ("metric/größe", 7.0, 5),
            ("count", 12, 5),
        ]
        logger = self._made(tmp_path)
        for name, value, step in given:
            logger.log_metrics({name: value}, step=step)
        self._end(logger)
        self._compare(tmp_path, given)

    def test_a_number_without_a_step_arrives(self, tmp_path: Path) -> None:
        """Each of them, though they have no step of their own."""
        logger = self._made(tmp_path)
        for value in (1.0, 2.0, 3.0):
            logger.log_metrics({"seen": value})
        self._end(logger)
        assert sorted(value for name, value, _ in self.written(tmp_path) if name == "seen") == [1.0, 2.0, 3.0]

    def test_several_metrics_of_one_step_arrive_from_several_calls(self, tmp_path: Path) -> None:
        """A later call adds to a step; it does not replace it."""
        logger = self._made(tmp_path)
        logger.log_metrics({"one": 1.0, "two": 2.0}, step=3)
        logger.log_metrics({"three": 3.0}, step=3)
        self._end(logger)
        self._compare(tmp_path, [("one", 1.0, 3), ("two", 2.0, 3), ("three", 3.0, 3)])

    def test_nan_and_infinity_arrive_as_what_they_are(self, tmp_path: Path) -> None:
        """They are what one looks for afterwards."""
        logger = self._made(tmp_path)
        given = [("bad", math.nan, 0), ("bad", math.inf, 1), ("bad", -math.inf, 2), ("bad", 1.0, 3)]
        for name, value, step in given:
            logger.log_metrics({name: value}, step=step)
        self._end(logger)
        self._compare(tmp_path, given)

    def test_many_metrics_and_steps_arrive(self, tmp_path: Path) -> None:
        """Hundreds of names in a step; a thousand steps, in little time."""
        logger = self._made(tmp_path)
        wide = {f"layer.{number}/norm": float(number) for number in range(300)}
        logger.log_metrics(wide, step=0)
        began = time.monotonic()
        for step in range(1000):
            logger.log_metrics({"a": step / 2, "b": step * 2.0, "c": 1.0}, step=step)
        seconds = time.monotonic() - began
        self._end(logger)
        given = [(name, value, 0) for name, value in wide.items()]
        given += [(name, value, step) for step in range(1000) for name, value in _of_step(step)]
        self._compare(tmp_path, given)
        assert seconds < self.takes_seconds, f"a thousand steps take {seconds:.1f} s"

    def test_settings_of_any_kind_are_taken(self, tmp_path: Path) -> None:
        """Nested, None, paths, objects, none at all; before and after metrics."""
        logger = self._made(tmp_path)
        logger.log_hyperparams({})
        logger.log_hyperparams(
            {"lr": 0.1, "deep": {"layers": [1, 2]}, "path": tmp_path, "none": None, "object": object()}
        )
        logger.log_metrics({"loss": 1.0}, step=0)
        logger.log_hyperparams({"late": True})
        self._end(logger)
        self._compare(tmp_path, [("loss", 1.0, 0)])

    # -- its life -------------------------------------------------------------------------------------------------

    def test_making_it_opens_nothing(self, tmp_path: Path) -> None:
        """It is made on every rank, and in the parent that starts them; only rank 0 ever logs."""
        self._made(tmp_path)
        assert not list(tmp_path.rglob("*")), "it writes files before anything was logged"

    def test_it_has_a_name(self, tmp_path: Path) -> None:
        """A text, for messages."""
        assert isinstance(self._made(tmp_path).name, str)

    def test_a_run_without_metrics_ends_in_peace(self, tmp_path: Path) -> None:
        """Saved, finished and closed though nothing was logged; also when it failed."""
        for status in ("success", "failed"):
            self._end(self._made(tmp_path / status), status)
            assert list(self.written(tmp_path / status)) == []

    def test_a_failed_run_keeps_what_was_logged(self, tmp_path: Path) -> None:
        """An exception in the middle of a training: what led to it is what one wants to see."""

        def train() -> None:
            with self._fabric(tmp_path) as fabric:
                fabric.log("loss", 1.5, step=4)
                raise RuntimeError("the training fails")

        with pytest.raises(RuntimeError, match="the training fails"):
            train()
        self._compare(tmp_path, [("loss", 1.5, 4)])

    def test_saving_and_closing_twice_writes_nothing_twice(self, tmp_path: Path) -> None:
        """A user may save in between; ``Fabric.close`` may follow a ``with`` block."""
        fabric = self._fabric(tmp_path)
        fabric.log("loss", 1.5, step=0)
        fabric.logger.save()
        fabric.logger.save()
        fabric.log("loss", 2.5, step=1)
        fabric.close()
        fabric.close()
        self._compare(tmp_path, [("loss", 1.5, 0), ("loss", 2.5, 1)])

    def test_it_is_ended_once_with_the_status(self, tmp_path: Path) -> None:
        """And it is not needed again: what it had is written when ``Fabric.close`` returns."""
        fabric, seen = self._fabric(tmp_path), []
        finalize = fabric.logger.finalize

        def noted(status: str) -> None:
            seen.append(status)
            finalize(status)

        fabric.logger.finalize = noted
        with fabric:
            fabric.log_dict({"a": torch.tensor(1.5), "b": 2}, step=0)
        fabric.close()
        assert seen == ["success"]
        self._compare(tmp_path, [("a", 1.5, 0), ("b", 2.0, 0)])

    def test_a_training_outlives_a_dead_sink(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A disk or a server that fails costs metrics, and not the run: one warning, not one per step."""
        self.make(**self.options_for(tmp_path))
        monkeypatch.setattr(threading, "excepthook", lambda _: None)  # a thread that writes may die of it
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fabric = self._fabric(tmp_path)
            fabric.log("loss", 1.0, step=0)
            fabric.logger.save()
            self.break_sink(tmp_path)
            try:
                for step in range(1, 400):
                    fabric.log("loss", float(step), step=step)
                    if step % 100 == 0:
                        fabric.logger.save()
            except Exception as error:
                pytest.fail(f"a dead sink ends the training: {type(error).__name__}: {error}")
            while_training = [str(each.message) for each in caught]
            fabric.close("failed")
            del fabric
            gc.collect()  # what a logger says at its end belongs to what it says
        assert len(while_training) <= 1, f"a dead sink is reported again and again: {while_training[:3]}"
        assert caught, "the sink is dead, metrics are lost, and nobody is told"

    # -- a checkpoint ---------------------------------------------------------------------------------------------

    def test_a_run_that_was_killed_goes_on_where_its_checkpoint_was(self, tmp_path: Path) -> None:
        """Nothing from before the checkpoint is lost; what came after it is logged again, and arrives once."""
        killed = self._that_keeps_state(tmp_path)
        for name, value in _of_step(0):
            killed.log_metrics({name: value}, step=0)
        killed.log_metrics({"loss": 0.5}, step=1)
        state = _from_file(killed.state_dict())
        for step in (1, 2, 3):
            killed.log_metrics({"loss": -1.0, "too_early": 1.0}, step=step)
        killed.save()  # as far as a run may come
        resumed = self._that_keeps_state(tmp_path)
        resumed.load_state_dict(state)
        resumed.log_metrics({"loss": 0.25}, step=2)
        again = _from_file(resumed.state_dict())
        resumed.log_metrics({"loss": -2.0}, step=3)
        resumed.save()
        last = self._that_keeps_state(tmp_path)
        last.load_state_dict(again)
        last.log_metrics({"loss": 0.125}, step=3)
        self._end(last)
        given = [(name, value, 0) for name, value in _of_step(0)]
        self._compare(tmp_path, [*given, *(("loss", 1 / 2**step, step) for step in (1, 2, 3))])

    def test_what_is_held_back_survives_a_kill_right_after_the_checkpoint(self, tmp_path: Path) -> None:
        """It is on disk when the state is returned, or part of it."""
        killed = self._that_keeps_state(tmp_path)
        killed.log_metrics({"loss": 0.5}, step=0)
        state = _from_file(killed.state_dict())
        resumed = self._that_keeps_state(tmp_path)
        resumed.load_state_dict(state)
        resumed.log_metrics({"loss": 0.25}, step=1)
        self._end(resumed)
        self._compare(tmp_path, [("loss", 0.5, 0), ("loss", 0.25, 1)])

    # -- ranks ----------------------------------------------------------------------------------------------------

    def test_of_two_processes_only_rank_zero_writes(self, tmp_path: Path) -> None:
        """Every rank logs, as a loop does; each number arrives once, as a plain number."""
        self.make(**self.options_for(tmp_path))
        need_plan()
        folders = [tmp_path / f"rank {rank}" for rank in range(2)]
        for folder in folders:
            folder.mkdir()
        arguments = {
            "logger": (self.kind, self.name),
            "options": [{**self.options, **self._plain(folder)} for folder in folders],
            "fabric": {"accelerator": "cpu", "devices": 2},
            "checkpoint": str(tmp_path / "run.ckpt"),
        }
        on_ranks("fabric_core.testing.programs.logging_loop", arguments)
        self._compare(folders[0], [("loss", 0.5, 0), ("loss", 0.25, 1), ("rank", 0.0, 1)])
        assert not list(folders[1].rglob("*")), "rank 1 has opened a sink of its own"

    # -- how it is asked ------------------------------------------------------------------------------------------

    def _made(self, folder: Path) -> Any:
        folder.mkdir(exist_ok=True)
        return self.make(**self.options_for(folder))

    def _that_keeps_state(self, folder: Path) -> Any:
        logger = self._made(folder)
        if type(logger).load_state_dict is Logger.load_state_dict:
            pytest.skip("the logger keeps no state: a resumed run logs again what came after its checkpoint")
        return logger

    def _end(self, logger: Any, status: str = "success") -> None:
        """What ``Fabric.close`` does."""
        logger.save()
        logger.finalize(status)

    def _fabric(self, folder: Path) -> Any:
        fabric = Fabric(accelerator="cpu", devices=1, loggers=[self._made(folder)])
        fabric.launch()
        return fabric

    def _plain(self, folder: Path) -> dict[str, Any]:
        """The options as texts and numbers, which can be sent to another process."""
        options = self.options_for(folder).items()
        return {name: str(value) if isinstance(value, Path) else value for name, value in options}

    def _compare(self, folder: Path, given: list[tuple[str, float, int]]) -> None:
        found = {(name, step): value for name, value, step in self.written(folder)}
        missing = [entry for entry in given if (entry[0], entry[2]) not in found]
        assert not missing, f"{len(missing)} of {len(given)} numbers do not arrive, such as {missing[0]}"
        assert len(list(self.written(folder))) == len(given), "numbers arrive that were not logged, or twice"
        for name, value, step in given:
            arrived = found[name, step]
            same = arrived == pytest.approx(value, rel=self.relative_error, abs=0, nan_ok=True)
            assert same, f"{name} at step {step} was {value} and arrives as {arrived}"


def _from_file(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it comes out of a checkpoint, which holds plain values only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        read: dict[str, Any] = torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        pytest.fail(f"the state holds more than plain values, and could not be loaded: {error}")
    return read


def _of_step(step: int) -> list[tuple[str, float]]:
    return [("a", step / 2), ("b", step * 2.0), ("c", 1.0)]
