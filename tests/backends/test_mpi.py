"""Processes of MPI launchers: real ones are in ``tests/engines``; here is what their variables leave open."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric_backends.environments import census, mpi
from fabric_backends.environments.census import Census, take_census
from fabric_backends.environments.mpi import MPIEnvironment, detect, launcher_of
from fabric_core.errors import ConfigurationError

STARTERS = ("OMPI_", "PMI_", "PMIX_", "MPI_", "MV2_", "MVP_", "MASTER_", "SLURM_")
BARE = {"PMI_RANK": "3", "PMI_SIZE": "6"}


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Become a process with these variables, in a job whose ranks are on these hosts."""

    def become(variables: dict[str, str], hosts: str = "") -> None:
        for name in [name for name in os.environ if name.startswith(STARTERS)]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

        def count(rank: int, size: int, libraries: Any) -> Census:
            assert hosts, "MPI was asked"
            assert size == len(hosts)
            return Census(rank, tuple(hosts))

        monkeypatch.setattr(mpi, "take_census", count)

    return become


def open_mpi(rank: int, size: int, local_rank: int, local_size: int, **more: str) -> dict[str, str]:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    numbers = (rank, size, local_rank, local_size)
    return {f"OMPI_COMM_WORLD_{n}": str(number) for n, number in zip(names, numbers, strict=True)} | more


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        (open_mpi(0, 2, 0, 2), "Open MPI"),
        ({"MV2_COMM_WORLD_RANK": "0", **BARE}, "MVAPICH2"),
        ({"MVP_COMM_WORLD_RANK": "0", **BARE}, "MVAPICH"),
        ({"MPI_LOCALRANKID": "0", **BARE}, "MPICH or Intel MPI"),
        (BARE, "a launcher that speaks PMI"),
        ({"SLURM_JOB_ID": "1", **BARE}, None),
        ({"SLURM_JOB_ID": "1", **open_mpi(0, 2, 0, 2)}, "Open MPI"),
        ({}, None),
    ],
)
def test_launchers_are_told_apart(variables: dict[str, str], name: str | None) -> None:
    launcher = launcher_of(variables)
    assert (launcher and launcher.name) == name


def test_on_one_node_mpi_is_not_asked(process: Callable[..., None]) -> None:
    process(open_mpi(1, 2, 1, 2, PMIX_NAMESPACE="77"))
    environment = MPIEnvironment()
    assert (environment.single_node, environment.main_address) == (True, "127.0.0.1")
    assert (environment.node_rank(), environment.local_rank()) == (0, 1)
    first = environment.main_port
    process(open_mpi(1, 2, 1, 2, PMIX_NAMESPACE="78"))
    assert environment.main_port != first
    process(open_mpi(1, 2, 1, 2))
    assert environment.main_port == 29500
    process(open_mpi(1, 2, 1, 2, MASTER_PORT="1234"))
    assert environment.main_port == 1234


def test_across_nodes_the_address_is_the_host_of_rank_zero_and_all_know_it(
    process: Callable[..., None],
) -> None:
    for rank in range(4):
        process(open_mpi(rank, 4, rank % 2, 2), hosts="aabb")
        environment = MPIEnvironment()
        assert environment.main_address == "a"
        assert (environment.node_rank(), environment.local_rank()) == divmod(rank, 2)
    process(open_mpi(3, 4, 1, 2, MASTER_ADDR="there"))
    assert (MPIEnvironment().main_address, MPIEnvironment().node_rank()) == ("there", 1)


def test_ranks_that_are_dealt_out_to_the_nodes_in_turn_are_counted(process: Callable[..., None]) -> None:
    """``--map-by node``: only a count can tell that rank 1 is not on the first node."""
    for rank, (node, local_rank) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        process(open_mpi(rank, 4, local_rank, 2), hosts="abab")
        assert (MPIEnvironment().node_rank(), MPIEnvironment().local_rank()) == (node, local_rank)
    process(open_mpi(1, 4, 0, 2, MASTER_ADDR="there"), hosts="abab")
    assert MPIEnvironment().node_rank() == 1


def test_a_launcher_that_tells_no_local_ranks_leaves_the_size_open_but_a_count_finds_it(
    process: Callable[..., None],
) -> None:
    found = detect(BARE)
    assert found is not None
    assert (found.processes_per_node, found.num_nodes) == (None, None)
    process(BARE, hosts="aabbcc")
    environment = MPIEnvironment()
    assert (environment.node_rank(), environment.local_rank(), environment.single_node) == (1, 1, False)
    environment.validate(2, 3)
    process(BARE, hosts="aaaaaa")
    assert MPIEnvironment().main_address == "127.0.0.1"


def test_a_wrapper_that_hides_the_other_devices_is_seen() -> None:
    for variables, own in (
        ({}, False),
        ({"CUDA_VISIBLE_DEVICES": "1"}, True),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, False),
    ):
        found = detect({**open_mpi(1, 2, 1, 2), **variables})
        assert found is not None
        assert found.own_devices == own


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12))
def test_a_count_numbers_every_host_and_every_rank_on_it(hosts: list[str]) -> None:
    counts = [Census(rank, tuple(hosts)) for rank in range(len(hosts))]
    assert len({(one.node_rank, one.local_rank) for one in counts}) == len(hosts)
    assert {one.node_rank for one in counts} == set(range(len(set(hosts))))
    for one in counts:
        assert 0 <= one.local_rank < one.local_size == hosts.count(hosts[one.rank])
    assert (counts[0].node_rank, counts[0].local_rank) == (0, 0)


def test_without_mpi4py_the_error_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(
        ConfigurationError, match=r"Set MASTER_ADDR to the host of rank 0 on every rank, or install mpi4py"
    ):
        take_census(0, 2, ())


class World:
    """Stands for the communicator of a job whose other ranks answer at once."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def allgather(self, host: str) -> list[str]:
        return [host] * self.size


@pytest.fixture
def mpi4py(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """An MPI that notes what is called: a real one would tie this process to it for good."""

    def install(library: str, world: World, initialised: bool = False) -> list[str]:
        calls: list[str] = []
        module = SimpleNamespace(
            COMM_WORLD=world,
            Get_library_version=lambda: library,
            Is_initialized=lambda: initialised,
            Init_thread=lambda: calls.append("init"),
        )
        package = SimpleNamespace(rc=SimpleNamespace(initialize=True, finalize=None), MPI=module)
        monkeypatch.setitem(sys.modules, "mpi4py", package)
        monkeypatch.setitem(sys.modules, "mpi4py.MPI", module)
        monkeypatch.setattr(census.atexit, "register", lambda *_: calls.append("at exit"))
        return calls

    return install


def test_mpi_is_initialised_once_and_only_if_it_was_not(mpi4py: Callable[..., list[str]]) -> None:
    calls = mpi4py("Open MPI v5", World(1, 2))
    assert take_census(1, 2, ("Open MPI",)).local_size == 2
    assert calls == ["init", "at exit"]
    calls = mpi4py("Open MPI v5", World(1, 2), initialised=True)
    take_census(1, 2, ("Open MPI",))
    assert calls == []


def test_an_mpi_that_does_not_know_the_launcher_is_refused(mpi4py: Callable[..., list[str]]) -> None:
    calls = mpi4py("MPICH Version: 5.0, whatever", World(0, 1))
    with pytest.raises(
        ConfigurationError, match=r"works with Open MPI, but mpi4py .* \(MPICH Version: 5.0\)"
    ):
        take_census(0, 2, ("Open MPI",))
    assert calls == []
    with pytest.raises(ConfigurationError, match="says that this is rank 0 of 2, not 0 of 1, but mpi4py"):
        take_census(0, 2, ())


def test_it_cannot_be_asked_for_without_a_launcher(process: Callable[..., None]) -> None:
    process({})
    with pytest.raises(
        ConfigurationError, match="'mpi' finds no variable of an MPI launcher .* mpirun or mpiexec"
    ):
        MPIEnvironment().world_size()
