"""Training in processes of real MPI launchers: MPICH's on one node and on two, and Open MPI's."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

MPICH = Path(sys.executable).with_name("mpiexec")
OPEN_MPI = ("mpirun.openmpi", "--allow-run-as-root", "--oversubscribe")

# Stands for ssh HOST COMMAND: the same machine, which in there is called HOST.
OTHER_NODE = """#!/bin/bash
while [[ "$1" == -* ]]; do shift; done
host=$1
shift
exec unshare --uts bash -c 'hostname "$0"; eval "$*"' "$host" "$@"
"""


@pytest.fixture
def mpich() -> str:
    if not MPICH.exists():
        pytest.skip("not run: mpiexec of MPICH is not installed (pip install mpich)")
    return str(MPICH)


@pytest.fixture
def open_mpi() -> tuple[str, ...]:
    if shutil.which(OPEN_MPI[0]) is None:
        pytest.skip("not run: mpirun of Open MPI is not installed (apt-get install openmpi-bin)")
    return OPEN_MPI


@pytest.fixture
def other_node(tmp_path: Path) -> str:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--uts", "true"]).returncode:
        pytest.skip("not run: two nodes want a namespace of their own (unshare --uts), which needs root")
    path = tmp_path / "other_node.sh"
    path.write_text(OTHER_NODE)
    path.chmod(0o755)
    return str(path)


def run(*command: object, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a launcher. It ends what it has started when it is told to."""
    process = subprocess.Popen(
        [str(part) for part in command],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=90)
    except BaseException:
        process.terminate()
        process.communicate(timeout=20)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_two_ranks_of_mpich_train_as_a_plain_loop(
    mpich: str, job: Any, clean_environ: dict[str, str]
) -> None:
    done = run(mpich, "-n", 2, *job.command(), environ=clean_environ)
    assert done.returncode == 0, done.stderr
    job.check("mpi", ranks=[[0, 0, 0], [1, 1, 0]])
    assert job.ranks()[0]["place"] == ["127.0.0.1", 29500]


def test_two_ranks_of_open_mpi_train_as_a_plain_loop(
    open_mpi: tuple[str, ...], job: Any, clean_environ: dict[str, str]
) -> None:
    done = run(*open_mpi, "-n", 2, *job.command(), environ=clean_environ)
    assert done.returncode == 0, done.stderr
    job.check("mpi", ranks=[[0, 0, 0], [1, 1, 0]])


def test_ranks_on_two_nodes_agree_on_an_address_through_mpi4py(
    mpich: str, other_node: str, job: Any, clean_environ: dict[str, str]
) -> None:
    require_mpi4py()
    nodes = ("-launcher", "ssh", "-launcher-exec", other_node, "-hosts", "127.0.0.2:2,127.0.0.3:2")
    done = run(mpich, *nodes, "-n", 4, *job.command(), environ=clean_environ)
    assert done.returncode == 0, done.stderr
    job.check("mpi", ranks=[[0, 0, 0], [1, 1, 0], [2, 0, 1], [3, 1, 1]])
    assert job.ranks()[3]["place"][0] == "127.0.0.2"


FAILING = """
from fabric_core import Fabric
fabric = Fabric(accelerator="cpu", strategy="ddp")
fabric.barrier()
if fabric.global_rank == 1:
    raise RuntimeError("on purpose")
fabric.barrier()
fabric.close()
"""


def test_an_error_on_one_node_ends_the_job_though_mpi_is_initialised(
    mpich: str, other_node: str, tmp_path: Path, clean_environ: dict[str, str]
) -> None:
    require_mpi4py()
    (tmp_path / "failing.py").write_text(FAILING)
    nodes = ("-launcher", "ssh", "-launcher-exec", other_node, "-hosts", "127.0.0.2:1,127.0.0.3:1")
    command = (sys.executable, tmp_path / "failing.py")
    done = run(mpich, *nodes, "-n", 2, *command, environ=clean_environ)
    assert done.returncode != 0
    assert "RuntimeError: on purpose" in done.stderr


def test_an_mpi4py_of_another_mpi_is_refused_before_it_ends_the_process(
    open_mpi: tuple[str, ...], mpich: str, other_node: str, job: Any, clean_environ: dict[str, str]
) -> None:
    """mpi4py finds the MPICH that is installed beside it; Open MPI has started the ranks."""
    require_mpi4py()
    nodes = ("--mca", "plm_rsh_agent", other_node, "-H", "127.0.0.2:1,127.0.0.3:1")
    done = run(*open_mpi, *nodes, "-n", 2, *job.command(), environ=clean_environ)
    assert done.returncode != 0
    assert "The MPI launcher works with Open MPI or Spectrum MPI, but mpi4py" in done.stderr
    assert "Set MASTER_ADDR to the host of rank 0 on every rank" in done.stderr
    assert job.ranks() == []


def test_two_nodes_of_open_mpi_do_without_mpi4py_when_they_are_told_the_address(
    open_mpi: tuple[str, ...], other_node: str, job: Any, clean_environ: dict[str, str]
) -> None:
    nodes = ("--mca", "plm_rsh_agent", other_node, "-H", "127.0.0.2:1,127.0.0.3:1", "-x", "MASTER_ADDR")
    environ = {**clean_environ, "MASTER_ADDR": "127.0.0.1"}
    done = run(*open_mpi, *nodes, "-n", 2, *job.command(), environ=environ)
    assert done.returncode == 0, done.stderr
    job.check("mpi", ranks=[[0, 0, 0], [1, 0, 1]])


def require_mpi4py() -> None:
    try:
        importlib.metadata.version("mpi4py")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not run: mpi4py is not installed (pip install mpi4py mpich)")
