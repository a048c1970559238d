"""Our own cluster environments, through the kit that we ship."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fabric_backends.environments import lsf, mpi, torchelastic
from fabric_backends.environments.ray import ranks_of_workers
from fabric_core.errors import ConfigurationError
from fabric_core.testing import ClusterEnvironmentConformance
from fabric_core.testing.places import Place


def meeting(place: Place) -> dict[str, str]:
    return {"MASTER_ADDR": place.main_address, "MASTER_PORT": str(place.main_port)}


def numbers(**values: int) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


class TestLocal(ClusterEnvironmentConformance):
    name = "local"

    def variables(self, place: Place, folder: Path) -> Mapping[str, str]:
        return {
            "FABRIC_LAUNCHED": "1",
            **meeting(place),
            **numbers(
                RANK=place.global_rank,
                LOCAL_RANK=place.local_rank,
                NODE_RANK=place.node_rank,
                WORLD_SIZE=place.world_size,
                LOCAL_WORLD_SIZE=place.processes_per_node,
            ),
        }


class TestTorchrun(ClusterEnvironmentConformance):
    name = "torchelastic"

    def variables(self, place: Place, folder: Path) -> Mapping[str, str]:
        return {
            "TORCHELASTIC_RUN_ID": "none",
            **meeting(place),
            **numbers(
                RANK=place.global_rank,
                LOCAL_RANK=place.local_rank,
                GROUP_RANK=place.node_rank,
                WORLD_SIZE=place.world_size,
                LOCAL_WORLD_SIZE=place.processes_per_node,
            ),
        }

    def around(self, place: Place) -> AbstractContextManager[Any]:
        """This process is no child of torchrun whose life ends with it."""
        stack = ExitStack()
        stack.enter_context(patch.object(torchelastic, "die_with_parent"))
        stack.enter_context(patch.object(torchelastic, "_tied", set()))
        return stack


class TestRay(ClusterEnvironmentConformance):
    name = "ray"

    def variables(self, place: Place, folder: Path) -> Mapping[str, str]:
        hosts = [f"10.0.0.{node}" for node in range(place.num_nodes) for _ in range(place.processes_per_node)]
        return {
            "RAY_RAYLET_PID": "7",
            **ranks_of_workers(hosts, place.main_port)[place.global_rank],
            **meeting(place),
        }


class TestLSF(ClusterEnvironmentConformance):
    name = "lsf"

    def variables(self, place: Place, folder: Path) -> Mapping[str, str]:
        several = place.num_nodes > 1
        hosts = [f"host{node}.net" for node in range(place.num_nodes)] if several else [socket.gethostname()]
        lines = ["launcher", *(host for host in hosts for _ in range(place.processes_per_node))]
        (folder / "rankfile").write_text("\n".join(lines))
        return {
            "LSB_DJOB_RANKFILE": str(folder / "rankfile"),
            **meeting(place),
            **numbers(
                LSB_JOBID=99,
                JSM_NAMESPACE_RANK=place.global_rank,
                JSM_NAMESPACE_SIZE=place.world_size,
                JSM_NAMESPACE_LOCAL_RANK=place.local_rank,
                JSM_NAMESPACE_LOCAL_SIZE=place.processes_per_node,
            ),
        }

    def around(self, place: Place) -> AbstractContextManager[Any]:
        """This machine cannot have the names of several hosts."""
        host = f"host{place.node_rank}" if place.num_nodes > 1 else socket.gethostname()
        return patch.object(lsf.socket, "gethostname", return_value=host)


class TestOpenMPI(ClusterEnvironmentConformance):
    name = "mpi"
    recognises_one_process = False  # which needs nobody

    def variables(self, place: Place, folder: Path) -> Mapping[str, str]:
        return {
            "PMIX_NAMESPACE": "1422458881",
            **meeting(place),
            **numbers(
                OMPI_COMM_WORLD_RANK=place.global_rank,
                OMPI_COMM_WORLD_SIZE=place.world_size,
                OMPI_COMM_WORLD_LOCAL_RANK=place.local_rank,
                OMPI_COMM_WORLD_LOCAL_SIZE=place.processes_per_node,
            ),
        }

    def around(self, place: Place) -> AbstractContextManager[Any]:
        """Without a launcher, MPI has nobody to ask who is where."""
        missing = ConfigurationError("mpi4py cannot be asked. Set MASTER_ADDR.")
        return patch.object(mpi, "take_census", side_effect=missing)


class TestSlurm(ClusterEnvironmentConformance):
    name = "slurm"

    def variables(self, place: Place, folder: Path) -> Mapping[str, str]:
        times = f"(x{place.num_nodes})" if place.num_nodes > 1 else ""
        return {
            "SLURM_STEP_TASKS_PER_NODE": f"{place.processes_per_node}{times}",
            "SLURM_STEP_NODELIST": "127.0.0.[1-9]",
            **meeting(place),
            **numbers(
                SLURM_JOB_ID=4711,
                SLURM_STEP_ID=2,
                SLURM_NTASKS=place.world_size,
                SLURM_STEP_NUM_TASKS=place.world_size,
                SLURM_STEP_NUM_NODES=place.num_nodes,
                SLURM_PROCID=place.global_rank,
                SLURM_LOCALID=place.local_rank,
                SLURM_NODEID=place.node_rank,
            ),
        }


class TestKubeflow(ClusterEnvironmentConformance):
    name = "kubeflow"
    max_processes_per_node = 1

    def variables(self, place: Place, folder: Path) -> Mapping[str, str]:
        return {
            "KUBERNETES_SERVICE_HOST": "10.0.0.1",
            "PET_NPROC_PER_NODE": "auto",
            **meeting(place),
            **numbers(WORLD_SIZE=place.world_size, RANK=place.global_rank),
        }


class TestKubernetesJob(ClusterEnvironmentConformance):
    name = "kubernetes_job"
    max_processes_per_node = 1

    def variables(self, place: Place, folder: Path) -> Mapping[str, str]:
        return {
            "KUBERNETES_SERVICE_HOST": "10.0.0.1",
            **meeting(place),
            **numbers(JOB_COMPLETION_INDEX=place.global_rank, WORLD_SIZE=place.world_size),
        }
