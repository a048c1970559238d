"""Every cluster environment, over its variables: ranks come out right, and what is missing or garbled is named."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starters import KINDS, Kind, Place, of_srun, of_torchrun

from fabric_backends import hooks
from fabric_backends.environments import slurm, torchelastic
from fabric_core.contracts.cluster_environment import ClusterEnvironment
from fabric_core.errors import ConfigurationError
from fabric_core.registry import default_registry
from fabric_core.resolve.hardware import choose_environment

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


@pytest.fixture(autouse=True, scope="module")
def rankfile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """LSF's rank file, and a process that does not tie its life to its parent's when it reads torchrun's rank."""
    path = tmp_path_factory.mktemp("lsf") / "rankfile"
    with patch.object(torchelastic, "die_with_parent"), patch.object(torchelastic, "_tied", set()):
        RANKFILE.append(path)
        yield path
        RANKFILE.clear()


RANKFILE: list[Path] = []


@contextmanager
def process(variables: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Nothing in the environment but these variables, which are also given as text."""
    environ = {name: str(value) for name, value in variables.items()}
    node, nodes = int(environ.pop("node", 0)), int(environ.pop("nodes", 1))
    if environ.get("LSB_DJOB_RANKFILE") == "rankfile":
        environ["LSB_DJOB_RANKFILE"] = str(RANKFILE[0])
        RANKFILE[0].write_text(
            "\n".join(["launcher", *(f"host{index}.net" for index in range(nodes) for _ in "ab")])
        )
    hosts = patch("fabric_backends.environments.lsf.socket.gethostname", return_value=f"host{node}")
    census = patch(
        "fabric_backends.environments.mpi.take_census", side_effect=ConfigurationError("no mpi4py")
    )
    with patch.dict(os.environ, environ, clear=True), hosts, census:
        yield environ


@st.composite
def places(draw: Any, most_per_node: int = 8) -> Place:
    nodes = draw(st.integers(1, 6))
    per_node = draw(st.integers(1, most_per_node))
    return Place(nodes, per_node, draw(st.integers(0, nodes - 1)), draw(st.integers(0, per_node - 1)))


@kinds
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_process_finds_its_place(kind: Kind, data: Any) -> None:
    place = data.draw(places(1 if kind.pods else 8))
    with process(kind.variables(place)) as environ:
        found = kind.detect(environ)
        if place.world > 1:  # which every launcher is recognised for
            assert found is not None
            assert (found.processes_per_node, found.num_nodes) == (place.per_node, place.nodes)
            assert not found.own_devices
        environment = kind.make()
        assert environment.creates_processes_externally
        assert environment.world_size() == place.world
        assert environment.global_rank() == place.rank
        assert (environment.node_rank(), environment.local_rank()) == (place.node, place.local)
        assert environment.main_address
        assert 1024 <= environment.main_port <= 65535
        if environment.single_node:
            assert place.nodes == 1
        environment.validate(place.per_node, place.nodes)
        with pytest.raises(ConfigurationError, match=f"The job has {place.world} processes"):
            environment.validate(place.per_node, place.nodes + 1)


@kinds
def test_all_ranks_agree_on_where_they_meet(kind: Kind) -> None:
    per_node = 1 if kind.pods else 2
    meeting = set()
    for node in range(3):
        for local in range(per_node):
            with process(kind.variables(Place(3, per_node, node, local))):
                environment = kind.make()
                meeting.add((environment.main_address, environment.main_port))
    assert len(meeting) == 1


def everything(environment: ClusterEnvironment) -> None:
    """Ask an environment all that a job asks."""
    environment.world_size()
    environment.global_rank()
    environment.local_rank()
    environment.node_rank()
    environment.main_port.bit_length()
    environment.main_address.strip()
    environment.single_node.__bool__()
    environment.validate(1 if environment.spec.name in ("kubeflow", "kubernetes_job") else 2, 2)


@kinds
def test_a_missing_variable_is_named_in_one_clear_error(kind: Kind) -> None:
    place = Place(2, 1 if kind.pods else 2, 1, 0)
    for name in (*kind.needed, *kind.texts):
        variables = kind.variables(place)
        del variables[name]
        with process(variables) as environ:
            kind.detect(environ)
            with pytest.raises(ConfigurationError, match=f"environment variable {name}, which is not set"):
                everything(kind.make())


@kinds
@pytest.mark.parametrize("text", ["x", "-1", "1.5", " 1", "٣", "1_0", "0x1"])
def test_a_garbled_variable_is_named_in_one_clear_error(kind: Kind, text: str) -> None:
    place = Place(2, 1 if kind.pods else 2, 1, 0)
    for name in kind.needed:
        with process({**kind.variables(place), name: text}) as environ:
            kind.detect(environ)
            with pytest.raises(ConfigurationError, match=f"environment variable {name} is {text!r}"):
                everything(kind.make())


@pytest.mark.filterwarnings(
    "ignore:SLURM has .+ tasks for this job, but this process was not started by srun"
)
@kinds
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_the_variables_hold_detection_answers_and_errors_are_ours(kind: Kind, data: Any) -> None:
    variables = kind.variables(data.draw(places(1 if kind.pods else 3)))
    printable = st.text(st.characters(min_codepoint=32, max_codepoint=0x3FF), max_size=6)
    for name in data.draw(st.sets(st.sampled_from(sorted(set(variables) - {"node", "nodes"})), max_size=3)):
        variables[name] = data.draw(st.one_of(printable, st.integers(-2, 5).map(str)))
    with process(variables) as environ:
        kind.detect(environ)
        with suppress(ConfigurationError):
            everything(kind.make())


def test_a_rank_beyond_the_number_of_ranks_is_refused() -> None:
    with process({**of_torchrun(Place(2, 2, 1, 1)), "RANK": 4}), pytest.raises(ConfigurationError) as caught:
        torchelastic.TorchElasticEnvironment().validate(2, 2)
    assert "gives this process the global rank 4, but there are 4 of them, counted from 0" in str(
        caught.value
    )
    with (
        process({**of_srun(Place(2, 2, 1, 1)), "SLURM_LOCALID": 2}),
        pytest.raises(ConfigurationError) as caught,
    ):
        slurm.SlurmEnvironment().validate(2, 2)
    assert "the local rank 2, but there are 2 of them" in str(caught.value)


@pytest.mark.parametrize("name", ["torchrun", "Open MPI", "MPICH", "jsrun", "Ray"])
def test_unequal_numbers_of_processes_are_explained(name: str) -> None:
    kind = KINDS[name]
    more = {key: 5 for key in kind.needed if key.endswith(("WORLD_SIZE", "_SIZE")) and "LOCAL" not in key}
    with process({**kind.variables(Place(2, 2, 0, 0)), **more}) as environ:
        found = kind.detect(environ)
        assert found is not None
        assert (found.processes_per_node, found.num_nodes) == (None, None)
        assert "its nodes have unequal numbers of processes" in found.note
        with pytest.raises(
            ConfigurationError, match="has started 5 processes, 2 of them on this node. Training needs"
        ):
            kind.make().validate(1, 1)


@pytest.mark.parametrize(
    ("parts", "chosen"),
    [
        (("srun", "torchrun"), "torchelastic"),
        (("srun", "Open MPI"), "mpi"),
        (("srun", "Ray"), "ray"),
        (("jsrun", "Open MPI"), "lsf"),
        (("Kubeflow", "torchrun"), "torchelastic"),
        (("Kubeflow", "Ray"), "ray"),
        (("Kubeflow",), "kubeflow"),
        (("indexed Job",), "kubernetes_job"),
        (("indexed Job", "torchrun"), "torchelastic"),
        (("indexed Job", "Kubeflow"), "kubernetes_job"),
        (("srun",), "slurm"),
        (("MPICH",), "mpi"),
    ],
)
def test_the_starter_that_is_nearest_to_the_process_wins(parts: tuple[str, ...], chosen: str) -> None:
    variables: dict[str, Any] = {}
    for part in parts:
        variables.update(KINDS[part].variables(Place(2, 1, 1, 0)))
    with process(variables) as environ:
        choice, found, warnings = choose_environment(None, default_registry(), environ)
    assert (choice.spec.name, warnings) == (chosen, [])
    assert found is not None
    assert (found.processes_per_node, found.num_nodes) == (1, 2)


def test_ranks_that_the_library_has_started_itself_come_before_all() -> None:
    own = {"FABRIC_LAUNCHED": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for kind in KINDS.values():
        with process({**kind.variables(Place(2, 1, 1, 0)), **own}) as environ:
            assert choose_environment(None, default_registry(), environ)[0].spec.name == "local"


def test_jobs_that_do_not_train_together_are_not_taken_for_jobs() -> None:
    """Each of these is one process on its own, whatever its surroundings."""
    alone: list[dict[str, str]] = [
        {},
        {"LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "/nowhere"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "RANK": "0", "WORLD_SIZE": "2"},
        {"RAY_RAYLET_PID": "12", "RAY_JOB_ID": "01000000"},
        {"SLURM_JOB_ID": "1", "PMI_RANK": "0", "PMI_SIZE": "2", "SLURM_NTASKS": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    ]
    for environ in alone:
        assert choose_environment(None, default_registry(), environ)[1] is None, environ


def test_detection_imports_neither_pytorch_nor_what_it_looks_for() -> None:
    specs = [spec for spec in hooks.fabric_cluster_environments() if spec.detect is not None]
    assert len(specs) == 7
    code = (
        "import importlib, sys\n"
        f"for target in {[spec.detect for spec in specs]!r}:\n"
        "    module, _, name = target.partition(':')\n"
        "    assert getattr(importlib.import_module(module), name)({}) is None\n"
        "print({'torch', 'mpi4py', 'ray', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout == "set()\n", done.stdout + done.stderr
