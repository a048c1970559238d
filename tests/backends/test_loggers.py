"""The loggers: what is on disk after calls in every order, crashes and full disks."""

from __future__ import annotations

import csv
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric_backends.loggers import table as table_module
from fabric_backends.loggers import tensorboard as tensorboard_module
from fabric_backends.loggers.csv import CSVLogger
from fabric_backends.loggers.run_folder import RunFolder
from fabric_backends.loggers.table import Table
from fabric_backends.loggers.tensorboard import TensorBoardLogger
from fabric_core import ConfigurationError, MissingRequirementError, OptionsError, Registry, Request
from fabric_core.build import make
from fabric_core.resolve import resolve


def rows_of(path: Path) -> list[dict[str, str]]:
    """What a CSV file holds; every row has every column, and the file ends with a line's end."""
    text = path.read_text()
    assert text.endswith("\n")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(None not in row and None not in row.values() for row in rows)
    return rows


def filled(row: dict[str, str]) -> dict[str, float]:
    """The cells of a row that hold something, as numbers."""
    return {name: float(value) for name, value in row.items() if value != ""}


@pytest.fixture
def logger(tmp_path: Path) -> CSVLogger:
    return CSVLogger(tmp_path)


def rows(logger: CSVLogger) -> list[dict[str, float]]:
    logger.save()
    return [filled(row) for row in rows_of(logger.log_dir / "metrics.csv")]


@contextmanager
def full_disk(allowed: int = 0) -> Iterator[None]:
    """Files of this process cannot grow beyond so many bytes, as on a full disk."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def warnings_in() -> Iterator[list[str]]:
    """The messages of every warning in a block."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(warning.message) for warning in caught]


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=folder, capture_output=True, text=True, timeout=60
    )


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_metrics_of_one_step_end_in_one_row(logger: CSVLogger) -> None:
    for step in range(3):
        logger.log_metrics({"loss": step / 3}, step)
        logger.log_metrics({"accuracy": 0.5}, step)
    assert rows(logger) == [{"step": s, "loss": s / 3, "accuracy": 0.5} for s in range(3)]


def test_metrics_that_come_after_their_row_was_written_still_join_it(logger: CSVLogger) -> None:
    logger.log_metrics({"loss": 1.03125}, 7)
    assert rows(logger) == [{"step": 7, "loss": 1.03125}]
    logger.log_metrics({"loss": 2.0}, 7)
    assert rows(logger) == [{"step": 7, "loss": 2.0}]
    logger.log_metrics({"accuracy": 0.5}, 7)
    logger.log_metrics({"loss": 3.0}, 8)
    assert rows(logger) == [{"step": 7, "loss": 2.0, "accuracy": 0.5}, {"step": 8, "loss": 3.0}]


def test_a_new_column_loses_no_row(logger: CSVLogger) -> None:
    for step in range(250):
        logger.log_metrics({"loss": step} | ({"validation": -step} if step >= 120 else {}), step)
    logger.log_metrics({"test": 1}, 250)
    got = rows(logger)
    assert [row["step"] for row in got] == list(range(251))
    assert [row["loss"] for row in got[:250]] == list(range(250))
    assert [row["validation"] for row in got if "validation" in row] == [-step for step in range(120, 250)]
    assert list(rows_of(logger.log_dir / "metrics.csv")[0]) == ["step", "loss", "validation", "test"]


def test_calls_without_a_step_have_a_row_each(logger: CSVLogger) -> None:
    for value in (1, 2):
        logger.log_metrics({"loss": value})
        logger.save()
    logger.log_metrics({"accuracy": 3})
    assert rows(logger) == [{"loss": 1}, {"loss": 2}, {"accuracy": 3}]


def test_numbers_come_back_as_they_were(logger: CSVLogger) -> None:
    values = {
        "third": 1 / 3,
        "tiny": 5e-324,
        "large": 2**62,
        "inf": float("-inf"),
        "nan": float("nan"),
        "true": True,
    }
    logger.log_metrics(values, 10**12)
    logger.save()
    (row,) = rows_of(logger.log_dir / "metrics.csv")
    assert float(row["third"]) == 1 / 3
    assert (row["tiny"], row["large"], row["inf"], row["nan"]) == ("5e-324", str(2**62), "-inf", "nan")
    assert (row["true"], row["step"]) == ("True", str(10**12))


def test_names_may_hold_anything(logger: CSVLogger) -> None:
    names = ["a,b", 'quo"te', "new\nline", "ünïcode", " ", "train/loss"]
    for name in names:
        logger.log_metrics({name: 1}, 0)
        logger.save()
    assert rows(logger) == [{"step": 0} | dict.fromkeys(names, 1.0)]


def test_a_prefix_goes_before_every_name(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, prefix="run")
    logger.log_metrics({"loss": 1, "step": 5}, 3)
    assert rows(logger) == [{"step": 3, "run-loss": 1, "run-step": 5}]


def test_a_metric_called_step_has_to_be_the_step(logger: CSVLogger) -> None:
    logger.log_metrics({"step": 4, "loss": 1})
    logger.log_metrics({"step": 5.0, "loss": 2}, 5)
    for value, step in ((6, 7), (0.5, None)):
        with pytest.raises(ConfigurationError, match="give the metric another name"):
            logger.log_metrics({"step": value}, step)
    assert rows(logger) == [{"step": 4, "loss": 1}, {"step": 5, "loss": 2}]


calls = st.lists(
    st.tuples(
        st.sampled_from(["log", "log", "log", "save", "resume", "fail"]),
        st.one_of(st.none(), st.integers(0, 4)),
        st.dictionaries(st.sampled_from("abcd"), st.integers(), min_size=1),
    ),
    max_size=25,
)


@given(calls, st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_in_every_order_of_calls_the_last_value_of_every_metric_is_there(
    tmp_path_factory: pytest.TempPathFactory, calls: list[Any], held: int
) -> None:
    """Rows may be written at any time, writing may fail, and another process may go on: nothing is lost or doubled.

    A step whose row is final (another row was written after it) gets a second row, which then holds what is newer.
    """
    folder = tmp_path_factory.mktemp("run")
    logger = CSVLogger(folder, version=0, flush_logs_every_n_steps=held)
    expected: dict[tuple[int, str], int] = {}
    without_step: list[dict[str, int]] = []
    for what, step, metrics in calls:
        if what == "log" and step is None:
            without_step.append(metrics)
        elif what == "log":
            expected |= {(step, name): value for name, value in metrics.items()}
        if what == "log":
            logger.log_metrics(metrics, step)
        elif what == "save":
            logger.save()
        elif what == "resume":
            logger.finalize("success")
            logger = CSVLogger(folder, version=0, flush_logs_every_n_steps=held)
        elif logger._table is not None and not logger._failed:
            with full_disk(3), pytest.MonkeyPatch.context() as patch:
                patch.setattr(logger, "_warn", lambda message: None)
                logger.save()
    logger.finalize("success")
    got: dict[tuple[int, str], int] = {}
    alone = []
    path = folder / "fabric_logs" / "version_0" / "metrics.csv"
    for row in rows_of(path) if path.exists() else []:
        values = {name: int(value) for name, value in row.items() if name != "step" and value != ""}
        if row["step"] == "":
            alone.append(values)
        else:
            got |= {(int(row["step"]), name): value for name, value in values.items()}
    assert got == expected
    assert alone == without_step


# -- when it is written ------------------------------------------------------------------------------------------------


def test_no_more_rows_are_held_back_than_was_said(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=10)
    for step in range(35):
        logger.log_metrics({"loss": step}, step)
        path = logger.log_dir / "metrics.csv"
        written = len(rows_of(path)) if path.exists() else 0
        assert step + 1 - written < 10
    logger.finalize("success")
    assert len(rows_of(path)) == 35
    with pytest.raises(OptionsError, match="has to be at least 1"):
        CSVLogger(tmp_path, flush_logs_every_n_steps=0)


def test_making_a_logger_touches_no_disk(tmp_path: Path) -> None:
    for cls in (CSVLogger, TensorBoardLogger):
        logger = pickle.loads(pickle.dumps(cls(tmp_path / "logs")))
        logger.save()
        logger.finalize("success")
        logger.teardown()
    assert list(tmp_path.iterdir()) == []


def test_what_is_held_back_is_written_when_a_script_just_ends(tmp_path: Path) -> None:
    """Also when it ends with an exception; and a forked child that ends before it writes nothing of its parent's."""
    code = """
        import os, sys
        from fabric_backends.loggers.csv import CSVLogger
        logger = CSVLogger("logs")
        logger.log_metrics({"loss": 1}, 0)
        if os.fork() == 0:
            logger.log_metrics({"loss": 2}, 1)
            sys.exit()
        os.wait()
        assert not (logger.log_dir / "metrics.csv").exists()
        raise KeyError("on purpose")
    """
    done = run(code, tmp_path)
    assert done.stderr.strip().endswith("KeyError: 'on purpose'")
    assert (tmp_path / "logs/fabric_logs/version_0/metrics.csv").read_text() == "step,loss\n0,1\n"


def test_kill_minus_nine_costs_the_rows_held_back_and_no_others(tmp_path: Path) -> None:
    code = """
        import os, signal
        from fabric_backends.loggers.csv import CSVLogger
        logger = CSVLogger("logs", flush_logs_every_n_steps=10)
        for step in range(25):
            logger.log_metrics({"loss": step}, step)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run(code, tmp_path).returncode == -signal.SIGKILL
    assert len(rows_of(tmp_path / "logs/fabric_logs/version_0/metrics.csv")) == 20


# -- runs and folders --------------------------------------------------------------------------------------------------


def test_every_run_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "name" / "version_7").mkdir(parents=True)
    (tmp_path / "name" / "version_x").mkdir()
    loggers = [CSVLogger(tmp_path, "name"), TensorBoardLogger(tmp_path, "name"), CSVLogger(tmp_path, "name")]
    assert [logger.log_dir.name for logger in loggers] == ["version_8", "version_9", "version_10"]
    assert [logger.version for logger in loggers] == ["version_8", "version_9", "version_10"]
    assert {logger.name for logger in loggers} == {"name"}
    assert CSVLogger(tmp_path, "").log_dir == tmp_path / "version_0"
    assert CSVLogger(tmp_path, version="best").log_dir == tmp_path / "fabric_logs" / "best"


def test_runs_that_start_at_the_same_moment_do_not_share_a_folder(tmp_path: Path) -> None:
    code = """
        import sys
        from fabric_backends.loggers.run_folder import RunFolder
        print("ready", flush=True)
        sys.stdin.readline()
        print([RunFolder("logs", "name", None).version for _ in range(100)])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, cwd=tmp_path, **pipes) for _ in range(2)]
    for process in runs:
        assert process.stdout.readline() == "ready\n"
    for process in runs:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0] for process in runs]
    names = [name for output in outputs for name in json.loads(output.replace("'", '"'))]
    assert sorted(names) == sorted(f"version_{number}" for number in range(200))


def test_a_version_that_is_there_is_continued(tmp_path: Path) -> None:
    for start in (0, 2):
        logger = CSVLogger(tmp_path, version=3)
        for step in range(start, start + 2):
            logger.log_metrics({"loss": step, f"from_{start}": 1}, step)
        logger.log_hyperparams({"lr": start, f"from_{start}": Path("x")})
        logger.finalize("success")
    assert rows(logger) == [
        {"step": step, "loss": step, f"from_{0 if step < 2 else 2}": 1.0} for step in range(4)
    ]
    text = (tmp_path / "fabric_logs" / "version_3" / "hparams.json").read_text()
    assert json.loads(text) == {"lr": 2, "from_0": "x", "from_2": "x"}
    assert sorted(entry.name for entry in logger.log_dir.iterdir()) == ["hparams.json", "metrics.csv"]


def test_a_line_that_a_crash_cut_off_is_dropped_and_not_read_as_a_smaller_number(tmp_path: Path) -> None:
    folder = tmp_path / "fabric_logs" / "version_0"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("step,loss\n0,1.5\n1,123456\n2,12")
    logger = CSVLogger(tmp_path, version=0)
    logger.log_metrics({"loss": 3}, 2)
    assert rows(logger) == [{"step": 0, "loss": 1.5}, {"step": 1, "loss": 123456}, {"step": 2, "loss": 3}]


@pytest.mark.parametrize("content", ["", "st"])
def test_a_file_without_a_whole_line_is_begun_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    table = Table(tmp_path / "metrics.csv")
    table.add(0, {"loss": 1})
    table.save()
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n0,1\n"


def test_a_table_of_somebody_else_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,loss\n0,1\n")
    with pytest.raises(ConfigurationError, match="its first column is not 'step'"):
        CSVLogger(tmp_path.parent, "", tmp_path.name).log_metrics({"loss": 1}, 0)
    assert (tmp_path / "metrics.csv").read_text() == "epoch,loss\n0,1\n"


@pytest.mark.parametrize("cls", [CSVLogger, TensorBoardLogger])
@pytest.mark.parametrize("version", [None, 1])
def test_a_folder_that_cannot_be_made_is_an_error_at_once(
    tmp_path: Path, cls: Any, version: int | None
) -> None:
    (tmp_path / "file").touch()
    logger = cls(tmp_path / "file", version=version)
    for act in (logger.log_metrics, logger.log_hyperparams):
        with pytest.raises(
            ConfigurationError, match=r"no folder for logs in .*Choose another one with root_dir"
        ):
            act({"value": 1})


# -- settings of the run -----------------------------------------------------------------------------------------------


def test_settings_are_kept_as_json_and_added_to(logger: CSVLogger) -> None:
    logger.log_hyperparams({"lr": 0.1, "nested": {1: [1, (2, None)]}, "path": Path("a/b")})
    logger.log_hyperparams({"lr": 0.2, "type": int})
    assert json.loads((logger.log_dir / "hparams.json").read_text()) == {
        "lr": 0.2,
        "nested": {"1": [1, [2, None]]},
        "path": "a/b",
        "type": "<class 'int'>",
    }


def test_settings_that_cannot_be_read_are_not_overwritten(logger: CSVLogger) -> None:
    (logger.log_dir / "hparams.json").write_text('{"lr": 0.')
    with pytest.raises(ConfigurationError, match=r"hparams\.json' cannot be continued"):
        logger.log_hyperparams({"lr": 1})
    assert (logger.log_dir / "hparams.json").read_text() == '{"lr": 0.'


# -- when the disk fails -----------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_warning_and_no_row_is_lost_when_it_has_room_again(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=5)
    for step in range(5):
        logger.log_metrics({"loss": step}, step)
    path = logger.log_dir / "metrics.csv"
    with full_disk(path.stat().st_size + 3), warnings_in() as warned:
        for step in range(5, 23):
            logger.log_metrics({"loss": step} | ({"new": 1} if step > 15 else {}), step)
        logger.save()
    (message,) = warned
    assert "Nothing can be written to" in message
    assert "[Errno 27] File too large. The training goes on" in message
    logger.log_metrics({"loss": 23}, 23)
    assert [row["loss"] for row in rows(logger)] == list(range(24))

    with full_disk(), warnings_in() as warned:
        logger.log_metrics({"loss": 24}, 24)
        logger.save()
        logger.log_hyperparams({"lr": 0.1})
    assert len(warned) == 1, "a disk that fails again is news again, once"
    logger.finalize("success")
    assert len(rows(logger)) == 25
    assert json.loads((logger.log_dir / "hparams.json").read_text()) == {"lr": 0.1}
    assert sorted(entry.name for entry in logger.log_dir.iterdir()) == ["hparams.json", "metrics.csv"]


def test_settings_that_are_lost_in_the_end_are_reported(logger: CSVLogger) -> None:
    with full_disk(), warnings_in() as warned:
        logger.log_hyperparams({"lr": 0.1})
        logger.finalize("success")
    assert "The training goes on" in warned[0]
    assert "The settings of the run could not be written" in warned[1]
    assert list(logger.log_dir.iterdir()) == []


def test_rows_that_are_lost_in_the_end_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "MOST_ROWS_HELD", 10)
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    logger.log_metrics({"loss": 0}, 0)
    with full_disk(), warnings_in() as warned:
        for step in range(1, 40):
            logger.log_metrics({"loss": step}, step)
            assert logger._table is not None
            assert len(logger._table._rows) <= 11
        logger.finalize("failed")
    assert "The training goes on" in warned[0]
    assert warned[1].startswith("40 row(s) of metrics could not be written"), (
        "one had been, and was written over"
    )
    kept = rows(logger)
    assert kept[-1] == {"step": 39, "loss": 39}
    assert 5 <= len(kept) <= 10


def test_a_folder_that_vanishes_is_a_warning(logger: CSVLogger) -> None:
    logger.log_metrics({"loss": 0}, 0)
    logger.save()
    (logger.log_dir / "metrics.csv").unlink()
    logger.log_dir.rmdir()
    logger.log_metrics({"loss": 1}, 1)
    with pytest.warns(UserWarning, match="No such file"):
        logger.save()
    with pytest.warns(UserWarning, match="are lost"):
        logger.finalize("success")
    logger.log_dir.mkdir()
    (logger.log_dir / "metrics.csv").write_text("step,loss\n0,0\n")
    assert rows(logger) == [{"step": 0, "loss": 0}, {"step": 1, "loss": 1}]


# -- TensorBoard -------------------------------------------------------------------------------------------------------


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in events(folder).Scalars(tag)]


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, prefix="run", sub_dir="rank_0", max_queue=2, flush_secs=1)
    for step in range(5):
        logger.log_metrics({"loss": step / 4, "accuracy": 1}, 10 * step)
    for value in (0.5, 0.25):
        logger.log_metrics({"no_step": value})
    logger.save()
    folder = tmp_path / "fabric_logs" / "version_0" / "rank_0"
    assert logger.log_dir == folder
    assert points(folder, "run-loss") == [(10 * step, step / 4) for step in range(5)]
    assert points(folder, "run-no_step") == [(0, 0.5), (1, 0.25)]
    logger.experiment.add_text("note", "of the user's own")
    logger.finalize("success")
    logger.finalize("success")
    assert "note/text_summary" in events(folder).Tags()["tensors"]


@pytest.mark.parametrize("default", [True, False])
def test_settings_appear_in_tensorboard(tmp_path: Path, default: bool) -> None:
    from tensorboard.plugins.hparams import plugin_data_pb2

    logger = TensorBoardLogger(tmp_path, default_hp_metric=default)
    logger.log_hyperparams({"lr": 0.1, "net": {"depth": 3, "kind": Path("cnn")}, "none": None, "flag": True})
    logger.finalize("success")
    found = events(logger.log_dir)
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings_seen = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings_seen["lr"].number_value == 0.1
    assert settings_seen["net/depth"].number_value == 3
    assert settings_seen["net/kind"].string_value == "cnn"
    assert settings_seen["none"].string_value == "None"
    assert settings_seen["flag"].number_value == 1
    assert (found.Tags()["scalars"] == ["hp_metric"]) is default


def test_first_values_of_metrics_may_be_shown_beside_the_settings(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.1}, {"accuracy": 0.0})
    logger.log_metrics({"accuracy": 0.75}, 1)
    logger.finalize("success")
    assert points(logger.log_dir, "accuracy") == [(0, 0.0), (1, 0.75)]


def test_tensorboard_is_imported_when_something_is_written(tmp_path: Path) -> None:
    code = """
        import sys
        from fabric_backends.loggers.tensorboard import TensorBoardLogger
        logger = TensorBoardLogger("logs")
        logger.save()
        assert not {"tensorboard", "torch"} & set(sys.modules)
        for step in range(5):
            logger.log_metrics({"loss": 0.5}, step)
        assert "tensorboard" in sys.modules
    """
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    written = points(tmp_path / "logs/fabric_logs/version_0", "loss")
    assert written == [(step, 0.5) for step in range(5)], "also when nobody closes the logger"


def test_a_missing_tensorboard_is_an_error_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingRequirementError, match="pip install tensorboard"):
        TensorBoardLogger(tmp_path).log_metrics({"loss": 1}, 0)


def test_an_option_that_the_writer_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="no option 'flush_sec'. Did you mean 'flush_secs'"):
        TensorBoardLogger(tmp_path, flush_sec=1)


def test_the_options_of_the_writer_are_those_of_pytorch() -> None:
    import inspect

    from torch.utils.tensorboard import SummaryWriter

    known = set(inspect.signature(SummaryWriter).parameters) - {"log_dir", "comment"}
    assert set(tensorboard_module.WRITER_OPTIONS) == known


def test_a_full_disk_does_not_stop_a_training_that_logs_to_tensorboard(tmp_path: Path) -> None:
    """In a process of its own, because TensorBoard's thread says on stderr that it died."""
    code = """
        import resource, signal, time, types, warnings
        from fabric_backends.loggers import tensorboard
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        ahead = 0
        tensorboard.time = types.SimpleNamespace(monotonic=lambda: time.monotonic() + ahead)
        logger = tensorboard.TensorBoardLogger("logs", max_queue=1)
        logger.log_metrics({"loss": 0}, 0)
        logger.save()
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))
            for step in range(1, 100):
                logger.log_metrics({"loss": step}, step)
                logger.save()
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            ahead = tensorboard.SECONDS_UNTIL_RETRY
            logger.log_metrics({"loss": 100}, 100)
            logger.finalize("success")
        import json
        print(json.dumps([str(warning.message) for warning in warned]))
    """
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    first, last = json.loads(done.stdout)
    assert "could not be written for TensorBoard" in first
    assert "value(s) are missing" in last
    values = points(tmp_path / "logs/fabric_logs/version_0", "loss")
    assert (values[0], values[-1]) == ((0, 0.0), (100, 100.0))


# -- by name -----------------------------------------------------------------------------------------------------------


def test_loggers_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = resolve(Request(accelerator="cpu", loggers=("csv", "tensorboard")), Registry())
    loggers = [make(choice) for choice in plan.loggers]
    assert [type(logger) for logger in loggers] == [CSVLogger, TensorBoardLogger]
    assert list(tmp_path.iterdir()) == []
    assert RunFolder("logs", "x", 3).path == Path("logs/x/version_3")


def test_no_thread_and_no_file_stays_open(tmp_path: Path) -> None:
    import threading

    threads, files = threading.active_count(), os.listdir("/proc/self/fd")
    for cls in (CSVLogger, TensorBoardLogger):
        logger = cls(tmp_path)
        logger.log_metrics({"loss": 1}, 0)
        logger.finalize("success")
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == len(files)
