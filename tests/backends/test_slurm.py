"""Tasks of srun: what real SLURM sets is in ``tests/engines``; here are the odd cases, and being requeued."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric_backends.environments.nodelist import expand
from fabric_backends.environments.slurm import SlurmEnvironment
from fabric_backends.environments.slurm_tasks import detect
from fabric_core import Fabric
from fabric_core.errors import ConfigurationError, OptionsError
from fabric_core.specs import Detection

TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
ON_NODES = {**TASK, "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Become a task with these variables."""

    def become(variables: dict[str, str]) -> None:
        for name in [name for name in os.environ if name.startswith(("SLURM_", "MASTER_"))]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    become(TASK)
    return become


def test_a_shell_on_a_terminal_is_no_task_but_several_tasks_on_one_are() -> None:
    one = {**TASK, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert detect(one) == Detection(1, 1, "srun has started this as task 0 of step 0")
    assert detect({**one, "SLURM_PTY_PORT": "4000"}) is None
    assert detect({**TASK, "SLURM_PTY_PORT": "4000"}) is not None
    for special in ("4294967290", "4294967291", "4294967292"):
        assert detect({**one, "SLURM_STEP_ID": special}) is None


def test_variables_that_were_handed_down_from_another_step_do_not_make_a_task() -> None:
    assert detect({**TASK, "SLURM_NTASKS": "1"}) is None


def test_whoever_did_not_use_srun_is_told_unless_another_starter_is_at_work() -> None:
    batch = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    with pytest.warns(
        UserWarning, match="SLURM has 4 tasks for this job, but this process was not started by srun"
    ):
        assert detect(batch) is None
    assert detect({**batch, "SLURM_NTASKS": "1"}) is None
    assert detect({**batch, "FABRIC_LAUNCHED": "1"}) is None
    assert detect({**batch, "TORCHELASTIC_RUN_ID": "1"}) is None


def test_unequal_nodes_are_not_guessed() -> None:
    found = detect(
        {**TASK, "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NUM_TASKS": "7", "SLURM_NTASKS": "7"}
    )
    assert found == Detection(
        note="srun has started this as task 0 of step 0; its nodes have unequal numbers of tasks"
    )


def test_the_address_is_loopback_on_one_node_and_the_first_node_of_several(task: Any) -> None:
    environment = SlurmEnvironment()
    assert (environment.main_address, environment.single_node) == ("127.0.0.1", True)
    task(ON_NODES)
    assert (environment.main_address, environment.single_node) == ("gpu07", False)
    task({**ON_NODES, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "2345"})
    assert (environment.main_address, environment.main_port) == ("10.0.0.1", 2345)


def test_jobs_and_steps_at_the_same_time_meet_at_different_ports(task: Any) -> None:
    ports = set()
    for job in range(4711, 4721):
        for step in range(3):
            task({**TASK, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
            ports.add(SlurmEnvironment().main_port)
    assert len(ports) == 30


def test_a_name_that_the_network_does_not_know_is_an_error_at_once(task: Any) -> None:
    task({**ON_NODES, "SLURM_STEP_NODELIST": "no-such-host.invalid"})
    with pytest.raises(
        ConfigurationError, match=r"host 'no-such-host.invalid' of task 0 cannot be resolved .*MASTER_ADDR"
    ):
        SlurmEnvironment().validate(1, 2)


def test_an_arbitrary_order_without_its_file_is_an_error(task: Any, tmp_path: Path) -> None:
    task({**ON_NODES, "SLURM_DISTRIBUTION": "arbitrary"})
    with pytest.raises(
        ConfigurationError, match=r"SLURM_HOSTFILE alone, which cannot be read. Set MASTER_ADDR"
    ):
        SlurmEnvironment().main_address.strip()
    (tmp_path / "hosts").write_text("\ngpu09\ngpu07\n")
    task({**ON_NODES, "SLURM_DISTRIBUTION": "arbitrary", "SLURM_HOSTFILE": str(tmp_path / "hosts")})
    assert SlurmEnvironment().main_address == "gpu09"


def test_it_cannot_be_asked_for_outside_of_a_step(task: Any) -> None:
    task({})
    fabric = Fabric(accelerator="cpu", plugins="slurm")
    with pytest.raises(
        ConfigurationError, match=r"needs the environment variable SLURM_\w+, .* Start the script with srun"
    ):
        fabric.launch()


# -- node lists ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("gpu", "gpu"),
        ("gpu[1-3]", "gpu1 gpu2 gpu3"),
        ("gpu[008-010,3]-ib", "gpu008-ib gpu009-ib gpu010-ib gpu3-ib"),
        ("r[1-2]n[7-8]x,login", "r1n7x r1n8x r2n7x r2n8x login"),
        ("a[9-11],b-[1,3]", "a9 a10 a11 b-1 b-3"),
        ("127.0.0.[1-2]", "127.0.0.1 127.0.0.2"),
    ],
)
def test_a_node_list_is_expanded(nodelist: str, names: str) -> None:
    assert list(expand(nodelist)) == names.split()


@pytest.mark.parametrize(
    "nodelist", ["a[1-", "a[1-2", "a]1[", "a[x]", "a[2-1]", "a,,b", "a,", ",a", "a[]", "a[1-2-3]"]
)
def test_what_is_no_node_list_is_an_error(nodelist: str) -> None:
    with pytest.raises(ConfigurationError, match="is no list of nodes as SLURM writes them"):
        list(expand(nodelist))


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 30)), min_size=1, max_size=5), st.integers(1, 4)
)
def test_ranges_keep_their_width(ranges: list[tuple[int, int]], width: int) -> None:
    text = ",".join(f"{first:0{width}}-{first + more:0{width}}" for first, more in ranges)
    expected = [f"n{number:0{width}}z" for first, more in ranges for number in range(first, first + more + 1)]
    assert list(expand(f"n[{text}]z")) == expected


# -- requeue ------------------------------------------------------------------------------------------------------


@pytest.fixture
def orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a program that stands for scontrol was told, so far."""
    log = tmp_path / "orders"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\n[ ! -e {tmp_path}/refuse ] || {{ echo "no" >&2; exit 1; }}\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def told() -> list[str]:
        return log.read_text().splitlines() if log.exists() else []

    return told


@pytest.fixture
def usual() -> Iterator[Any]:
    """The handler that was there before; it has to be there afterwards."""
    before = signal.getsignal(signal.SIGUSR1)
    yield before
    assert signal.getsignal(signal.SIGUSR1) is before
    signal.signal(signal.SIGUSR1, before)


def test_who_polls_and_closes_is_requeued_once(task: Any, orders: Any, usual: Any) -> None:
    environment = SlurmEnvironment()
    environment.join()
    assert not environment.requeue_requested
    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR1)
    assert environment.requeue_requested
    environment.accept_requeue()
    assert orders() == []  # not before the loop has saved
    environment.teardown()
    environment.teardown()
    assert orders() == ["requeue 4711"]


def test_who_does_not_poll_is_requeued_when_the_time_is_up(task: Any, orders: Any, usual: Any) -> None:
    environment = SlurmEnvironment(requeue_grace=0.2)
    environment.join()
    signal.raise_signal(signal.SIGUSR1)
    until = time.monotonic() + 30
    while not orders() and time.monotonic() < until:
        time.sleep(0.02)
    environment.accept_requeue()  # whose checkpoint took longer than that
    environment.teardown()
    assert orders() == ["requeue 4711"]


def test_who_ends_by_itself_is_not_requeued(task: Any, orders: Any, usual: Any) -> None:
    """Neither without a signal, nor when the loop has come to its end before the ranks could agree."""
    environment = SlurmEnvironment()
    environment.join()
    assert not environment.requeue_requested
    environment.teardown()
    environment = SlurmEnvironment()
    environment.join()
    signal.raise_signal(signal.SIGUSR1)
    environment.teardown()
    assert orders() == []


def test_only_rank_zero_gives_the_order_but_all_hear_of_it(task: Any, orders: Any, usual: Any) -> None:
    task({**TASK, "SLURM_PROCID": "1", "SLURM_LOCALID": "1"})
    environment = SlurmEnvironment()
    environment.join()
    signal.raise_signal(signal.SIGUSR1)
    assert environment.requeue_requested
    environment.accept_requeue()
    environment.teardown()
    assert orders() == []


def test_rank_zero_is_bound_by_what_the_ranks_agreed_on_before_it_heard_the_signal(
    task: Any, orders: Any, usual: Any
) -> None:
    environment = SlurmEnvironment()
    environment.join()
    environment.accept_requeue()
    environment.teardown()
    assert orders() == ["requeue 4711"]


@pytest.mark.parametrize(("auto", "told"), [(None, []), (True, ["requeue 4711"]), (False, [])])
def test_a_handler_of_the_script_is_called_and_by_default_left_in_charge(
    auto: bool | None, told: list[str], task: Any, orders: Any, usual: Any
) -> None:
    heard: list[int] = []

    def own(signum: int, frame: Any) -> None:
        heard.append(signum)

    signal.signal(signal.SIGUSR1, own)
    environment = SlurmEnvironment(auto_requeue=auto)
    environment.join()
    signal.raise_signal(signal.SIGUSR1)
    assert heard == [signal.SIGUSR1]
    assert environment.requeue_requested
    environment.accept_requeue()
    environment.teardown()
    assert signal.getsignal(signal.SIGUSR1) is own
    signal.signal(signal.SIGUSR1, usual)
    assert orders() == told


def test_a_handler_that_was_installed_later_stays(task: Any, orders: Any, usual: Any) -> None:
    environment = SlurmEnvironment()
    environment.join()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    environment.teardown()
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    signal.signal(signal.SIGUSR1, usual)


def test_a_task_of_an_array_is_requeued_alone(task: Any, orders: Any) -> None:
    task({**TASK, "SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "11"})
    SlurmEnvironment().requeue()
    assert orders() == ["requeue 4700_11"]


def test_an_order_that_slurm_refuses_is_a_warning_with_its_reason(
    task: Any, orders: Any, tmp_path: Path
) -> None:
    (tmp_path / "refuse").touch()
    with pytest.warns(UserWarning, match=r"could not be requeued: 'scontrol requeue 4711' failed \(no\)"):
        SlurmEnvironment().requeue()


def test_outside_of_the_main_thread_one_is_told_that_nothing_is_heard(task: Any, usual: Any) -> None:
    caught: list[str] = []

    def join() -> None:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            SlurmEnvironment().join()
        caught.extend(str(warning.message) for warning in warned)

    thread = threading.Thread(target=join)
    thread.start()
    thread.join()
    assert caught == [
        "The signal SIGUSR1 cannot be listened for, because this is not the main thread: the job will not be requeued."
    ]


def test_the_signal_can_be_chosen(task: Any, orders: Any) -> None:
    for asked in ("usr2", "SIGUSR2", signal.SIGUSR2, int(signal.SIGUSR2)):
        assert SlurmEnvironment(requeue_signal=asked).requeue_signal == signal.SIGUSR2
    for asked in ("USR9", 0, 1.5, None):
        with pytest.raises(
            OptionsError, match="requeue_signal is .* takes the name or the number of a signal"
        ):
            SlurmEnvironment(requeue_signal=asked)  # type: ignore[arg-type]


def test_how_often_the_job_was_requeued_is_known(task: Any) -> None:
    assert SlurmEnvironment().restart_count == 0
    task({**TASK, "SLURM_RESTART_COUNT": "3"})
    assert SlurmEnvironment().restart_count == 3


def test_a_fabric_listens_from_launch_to_close(task: Any, orders: Any, usual: Any) -> None:
    one = {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    task({**TASK, **one})
    with Fabric(accelerator="cpu") as fabric:
        assert fabric.plan.cluster_environment.name == "slurm"
        assert signal.getsignal(signal.SIGUSR1) is usual
        fabric.launch()
        assert not fabric.preempted
        signal.raise_signal(signal.SIGUSR1)
        assert fabric.preempted
        assert orders() == []
    assert orders() == ["requeue 4711"]
