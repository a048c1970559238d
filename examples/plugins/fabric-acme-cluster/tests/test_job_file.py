"""The job file: what is read of it, and what is said of a broken one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fabric_acme_cluster.environment import MyCluster, detect
from fabric_core import ConfigurationError, Detection

JOB = {"nodes": ["node7", "node9"], "processes_per_node": 4, "port": 29417}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job file of two nodes, of which this is process 6."""
    path = tmp_path / "job.json"
    path.write_text(json.dumps(JOB), encoding="utf-8")
    monkeypatch.setenv("ACME_JOB_FILE", str(path))
    monkeypatch.setenv("ACME_TASK", "6")
    return path


def test_the_ranks_of_a_job(file: Path) -> None:
    cluster = MyCluster()
    assert (cluster.main_address, cluster.main_port, cluster.world_size()) == ("node7", 29417, 8)
    assert (cluster.global_rank(), cluster.node_rank(), cluster.local_rank()) == (6, 1, 2)
    file.unlink()  # some schedulers tidy up while the job runs
    assert cluster.world_size() == 8


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        *(
            ("nodes", value, "has to be a list of host names")
            for value in (None, [], "node7", [""], [1], [["a"]])
        ),
        *(("processes_per_node", value, "a whole number from 1,") for value in (None, 0, -1, "2", 1.5, True)),
        *(("port", value, "a whole number from 1 to 65535") for value in (None, 0, 65536, "80", False)),
    ],
)
def test_a_broken_entry_is_told_by_file_and_key(file: Path, key: str, value: Any, found: str) -> None:
    file.write_text(json.dumps({**JOB, key: value}), encoding="utf-8")
    with pytest.raises(ConfigurationError) as raised:
        MyCluster().global_rank()
    for text in (str(file), repr(key), found, repr(value)):
        assert text in str(raised.value)


def test_a_missing_entry_is_told_by_file_and_key(file: Path) -> None:
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(
        ConfigurationError, match=r"job\.json .*'nodes' has to be a list of host names, and is missing"
    ):
        MyCluster().main_address  # noqa: B018


@pytest.mark.parametrize("text", ["", "{", "[1]", "17", '"text"', "null"])
def test_a_file_that_holds_something_else_is_told(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(
        ConfigurationError, match=r"job\.json \(ACME_JOB_FILE\) cannot be read as a JSON object"
    ):
        MyCluster().world_size()


def test_a_file_that_is_not_there_is_told_and_still_makes_it_a_job(file: Path) -> None:
    file.unlink()
    with pytest.raises(ConfigurationError, match="No such file"):
        MyCluster().world_size()
    found = detect({"ACME_JOB_FILE": str(file), "ACME_TASK": "6"})
    assert isinstance(found, Detection)
    assert found.processes_per_node is None
    assert "No such file" in found.note


@pytest.mark.parametrize("task", ["", "8", "-1", "x", "1.0", "²"])
def test_a_process_that_the_job_does_not_have_is_told(
    file: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    monkeypatch.setenv("ACME_TASK", task)
    with pytest.raises(ConfigurationError, match=f"ACME_TASK has to be .* from 0 to 7 .*and is '{task}'"):
        MyCluster().global_rank()


def test_the_command_shows_the_job_as_the_plugin_reads_it(file: Path) -> None:
    command = [sys.executable, "-m", "fabric_core", "acme", "job"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "node7, node9, with 4 process(es) each" in done.stdout
    assert "node7 port 29417" in done.stdout
    assert "rank 6 of 8, on node 1" in done.stdout
    file.unlink()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"fabric: The job file {file} (ACME_JOB_FILE) cannot be read" in done.stderr
