"""What is handed to ``torch_xla.launch`` for several devices: a stand-in notes it, for want of a TPU."""

from __future__ import annotations

import importlib
import json
import os
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from fabric_core import LaunchError, LaunchJob, RankFailedError
from fabric_core.supervisor import Failure


@pytest.fixture
def launcher(torch_xla: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the launchers, on a machine with four XLA devices. Its processes are this one."""
    launcher = importlib.import_module("fabric_xla.launcher")
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    monkeypatch.setenv("CPU_NUM_DEVICES", "4")
    monkeypatch.setattr(launcher, "die_with_parent", lambda parent: None)
    monkeypatch.setattr(launcher.torch, "set_num_threads", lambda count: None)
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, {"WORLD_SIZE": "4"}.get(name, "0"))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return launcher


def seen() -> dict[str, Any]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "FABRIC_LAUNCHED")
    return {name: os.environ.get(name) for name in names} | {"store": os.environ.get("FABRIC_XLA_STORE")}


@pytest.mark.parametrize("kind", ["XLAForkLauncher", "XLASpawnLauncher"])
def test_a_process_for_every_device_and_the_right_start_method(
    launcher: Any, torch_xla: Any, kind: str
) -> None:
    cls = getattr(launcher, kind)
    result = cls().launch(seen, LaunchJob(4))
    ((started, method),) = torch_xla.launches
    assert method == cls.start_method == kind.removeprefix("XLA").removesuffix("Launcher").lower()
    assert started.parent_pid == os.getpid()
    store = result.pop("store")
    assert store == started.store
    assert store.startswith("127.0.0.1:")
    assert result == {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "FABRIC_LAUNCHED": "1",
    }


def test_another_number_than_there_are_devices_is_refused(launcher: Any, torch_xla: Any) -> None:
    with pytest.raises(LaunchError, match=r"each of the 4 device\(s\) of this machine, and 2 were asked for"):
        launcher.XLAForkLauncher().launch(seen, LaunchJob(2))
    assert torch_xla.launches == []


def test_what_does_not_pickle_is_refused_before_anything_starts(launcher: Any, torch_xla: Any) -> None:
    with pytest.raises(LaunchError, match="cannot be sent to new processes"):
        launcher.XLASpawnLauncher().launch(lambda: None, LaunchJob(4))
    assert torch_xla.launches == []


def test_the_failure_that_came_first_is_the_one_that_is_told(
    launcher: Any, torch_xla: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(started: Any, start_method: str) -> None:
        for rank, time in ((2, 5.0), (1, 4.0)):
            failure = Failure(rank, 1, time, f"ValueError: on {rank}", f"the traceback of {rank}")
            Path(started.private, f"rank-{rank}").write_text(json.dumps(vars(failure)))
        raise BrokenProcessPool

    monkeypatch.setattr(torch_xla, "launch", broken)
    with pytest.raises(RankFailedError, match="ank 1 failed first: ValueError: on 1") as told:
        launcher.XLAForkLauncher().launch(seen, LaunchJob(4))
    assert told.value.rank == 1
    assert str(told.value).endswith("the traceback of 1")


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({"NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "7"}, (1, "first", 7)),
        ({"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "a,b,c"}, (2, "a", 29500)),
        ({}, (3, "10.0.0.1", 29500)),
    ],
)
def test_several_machines_find_their_places(
    launcher: Any, torch_xla: Any, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], place: Any
) -> None:
    class Tpu:
        """What a TPU says of itself."""

        @staticmethod
        def worker_id() -> int:
            return 3

        @staticmethod
        def get_worker_ips() -> list[str]:
            return ["10.0.0.1", "10.0.0.2"]

    monkeypatch.setattr(torch_xla, "tpu", Tpu, raising=False)
    found = launcher.this_place(4, environ)
    assert (found.number, found.address, found.port) == place


def test_one_machine_needs_no_address(launcher: Any) -> None:
    found = launcher.this_place(1, {})
    assert (found.number, found.address, found.port) == (0, "127.0.0.1", 0)
