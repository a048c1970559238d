"""What is handed to ``torch_xla.launch`` for several devices: a stand-in notes it, for want of a TPU."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import signal
import socket
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fabric_core import ConfigurationError, LaunchError, LaunchJob, RankFailedError
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
    with socket.create_server(
        ("127.0.0.1", int(os.environ["MASTER_PORT"]))
    ):  # which whoever runs here may do
        ports = {"store": os.environ.get("FABRIC_XLA_STORE"), "port": int(os.environ["MASTER_PORT"])}
    return {name: os.environ.get(name) for name in names} | ports


@pytest.mark.parametrize("kind", ["XLAForkLauncher", "XLASpawnLauncher"])
def test_a_process_for_every_device_and_the_right_start_method(
    launcher: Any, torch_xla: Any, kind: str
) -> None:
    cls = getattr(launcher, kind)
    result = cls().launch(seen, LaunchJob(4))
    ((started, method),) = torch_xla.launches
    assert method == cls.start_method == kind.removeprefix("XLA").removesuffix("Launcher").lower()
    assert started.parent_pid == os.getpid()
    store, port = result.pop("store"), result.pop("port")
    assert (store, port) == (started.place.store, started.place.port)
    assert re.fullmatch(r"127\.0\.0\.1:[1-9]\d*", store)
    assert port > 0
    assert not store.endswith(f":{port}"), "the meeting point of whoever meets without us is free"
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


def test_of_ranks_without_a_word_those_are_told_that_the_pool_has_not_ended(
    launcher: Any, torch_xla: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(started: Any, start_method: str) -> None:
        context = multiprocessing.get_context(start_method)
        processes = [context.Process(target=end_by, args=(started.private, *how)) for how in ENDINGS]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        raise BrokenProcessPool

    monkeypatch.setattr(torch_xla, "launch", broken)
    with pytest.raises(
        RankFailedError, match=r"(?s)Rank 7 .*then failed.*code 5.*ank 3 failed first.*SIGKILL"
    ) as told:
        launcher.XLAForkLauncher().launch(seen, LaunchJob(4))
    assert (told.value.rank, told.value.exit_code) == (3, 128 + 9)


ENDINGS = ((2, -signal.SIGTERM), (None, -signal.SIGKILL), (3, -signal.SIGKILL), (7, 5), (1, 0))
"""By process: which rank it says to be, if any, and how it ends."""


def end_by(private: str, rank: int | None, status: int) -> None:
    from fabric_xla.workers import tell_rank

    if rank is not None:
        tell_rank(private, rank)
        assert isinstance(multiprocessing.get_context("fork").Process, type), "as if there was no launcher"
    if status < 0:
        os.kill(os.getpid(), -status)
    os._exit(status)


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
    assert found.store == f"{place[1]}:{place[2] + 1}", "every machine can tell"


def test_one_machine_needs_no_address(launcher: Any) -> None:
    found = launcher.this_place(1, {})
    assert (found.number, found.address, found.port) == (0, "127.0.0.1", 0)
    assert launcher.this_place(1, {"MASTER_PORT": "7"}).port == 7


@pytest.mark.parametrize("text", ["x", "", "-1", "65536"])
def test_a_garbled_port_is_one_clear_error(
    launcher: Any, monkeypatch: pytest.MonkeyPatch, torch_xla: Any, text: str
) -> None:
    monkeypatch.setenv("MASTER_PORT", text)
    with pytest.raises(ConfigurationError, match=f"MASTER_PORT is '{text}', which is no port"):
        launcher.XLAForkLauncher().launch(seen, LaunchJob(4))
    with pytest.raises(ConfigurationError, match=f"MASTER_PORT is '{text}', which is no port"):
        launcher.XLAEnvironment().main_port  # noqa: B018
    assert torch_xla.launches == []


def test_only_the_first_machine_serves_the_store_and_a_port_that_is_taken_is_told(launcher: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        place = launcher.Place(1, "127.0.0.1", port - 1, port)
        with launcher.meeting(place) as there:
            assert there == place
        with (
            pytest.raises(
                LaunchError, match=f"127.0.0.1:{port} cannot be opened.*, as the next one has to be"
            ),
            launcher.meeting(replace(place, number=0)),
        ):
            pass
