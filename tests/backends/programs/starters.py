"""What every starter of processes sets for a process, by its place in the job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fabric_backends.environments import (
    kubeflow,
    kubernetes_job,
    lsf,
    mpi,
    ray,
    slurm,
    slurm_tasks,
    torchelastic,
)
from fabric_core.contracts.cluster_environment import ClusterEnvironment
from fabric_core.specs import Detection


@dataclass(frozen=True)
class Place:
    """One process of a job whose nodes are filled one after the other."""

    nodes: int
    per_node: int
    node: int
    local: int

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    @property
    def rank(self) -> int:
        return self.node * self.per_node + self.local


@dataclass(frozen=True)
class Kind:
    """An environment under test.

    Attributes:
        make: The class.
        detect: Its detection.
        variables: What its starter sets for a process.
        needed: The variables that hold numbers and that a job depends on.
        pods: Whether it has one process per node.
        texts: The variables that hold anything else and that a job depends on.
    """

    make: Callable[[], ClusterEnvironment]
    detect: Callable[[Mapping[str, str]], Detection | None]
    variables: Callable[[Place], dict[str, Any]]
    needed: tuple[str, ...]
    pods: bool = False
    texts: tuple[str, ...] = ()


def of_torchrun(place: Place) -> dict[str, Any]:
    return {
        "TORCHELASTIC_RUN_ID": "none",
        "RANK": place.rank,
        "LOCAL_RANK": place.local,
        "GROUP_RANK": place.node,
        "WORLD_SIZE": place.world,
        "LOCAL_WORLD_SIZE": place.per_node,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 29400,
    }


def of_srun(place: Place) -> dict[str, Any]:
    times = f"(x{place.nodes})" if place.nodes > 1 else ""
    return {
        "SLURM_JOB_ID": 4711,
        "SLURM_STEP_ID": 2,
        "SLURM_NTASKS": place.world,
        "SLURM_STEP_NUM_TASKS": place.world,
        "SLURM_STEP_NUM_NODES": place.nodes,
        "SLURM_STEP_TASKS_PER_NODE": f"{place.per_node}{times}",
        "SLURM_STEP_NODELIST": "127.0.0.[1-9]",
        "SLURM_PROCID": place.rank,
        "SLURM_LOCALID": place.local,
        "SLURM_NODEID": place.node,
    }


def of_open_mpi(place: Place) -> dict[str, Any]:
    return {
        "OMPI_COMM_WORLD_RANK": place.rank,
        "OMPI_COMM_WORLD_SIZE": place.world,
        "OMPI_COMM_WORLD_LOCAL_RANK": place.local,
        "OMPI_COMM_WORLD_LOCAL_SIZE": place.per_node,
        "OMPI_COMM_WORLD_NODE_RANK": place.local,  # which is no rank of a node
        "PMIX_NAMESPACE": "1422458881",
        "MASTER_ADDR": "localhost",
    }


def of_mpich(place: Place) -> dict[str, Any]:
    return {
        "PMI_RANK": place.rank,
        "PMI_SIZE": place.world,
        "MPI_LOCALRANKID": place.local,
        "MPI_LOCALNRANKS": place.per_node,
        "MASTER_ADDR": "localhost",
    }


def of_mvapich(place: Place) -> dict[str, Any]:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    numbers = (place.rank, place.world, place.local, place.per_node)
    own = {f"MV2_COMM_WORLD_{name}": number for name, number in zip(names, numbers, strict=True)}
    return {**own, "PMI_RANK": place.rank, "PMI_SIZE": place.world, "MASTER_ADDR": "localhost"}


def of_jsrun(place: Place) -> dict[str, Any]:
    return {
        "LSB_JOBID": 99,
        "LSB_DJOB_RANKFILE": "rankfile",
        "JSM_NAMESPACE_RANK": place.rank,
        "JSM_NAMESPACE_SIZE": place.world,
        "JSM_NAMESPACE_LOCAL_RANK": place.local,
        "JSM_NAMESPACE_LOCAL_SIZE": place.per_node,
        "node": place.node,
        "nodes": place.nodes,
    }


def of_operator(place: Place) -> dict[str, Any]:
    return {
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "MASTER_ADDR": "train-master-0",
        "MASTER_PORT": 23456,
        "WORLD_SIZE": place.world,
        "RANK": place.rank,
        "PET_NPROC_PER_NODE": "auto",
        "PET_NNODES": place.world,
        "PET_NODE_RANK": place.rank,
    }


def of_indexed_job(place: Place) -> dict[str, Any]:
    return {
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "JOB_COMPLETION_INDEX": place.rank,
        "WORLD_SIZE": place.world,
        "MASTER_ADDR": "train-0.train",
    }


def of_ray(place: Place) -> dict[str, Any]:
    hosts = [f"10.0.0.{node}" for _ in range(place.per_node) for node in range(place.nodes)]
    ranks = ray.ranks_of_workers(hosts, 29500)
    return {"RAY_RAYLET_PID": "7", **next(rank for rank in ranks if rank["RANK"] == str(place.rank))}


KINDS = {
    "torchrun": Kind(
        torchelastic.TorchElasticEnvironment,
        torchelastic.detect,
        of_torchrun,
        ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"),
        texts=("MASTER_ADDR",),
    ),
    "srun": Kind(
        slurm.SlurmEnvironment,
        slurm_tasks.detect,
        of_srun,
        (
            "SLURM_JOB_ID",
            "SLURM_STEP_NUM_TASKS",
            "SLURM_STEP_NUM_NODES",
            "SLURM_STEP_TASKS_PER_NODE",
            "SLURM_PROCID",
            "SLURM_LOCALID",
            "SLURM_NODEID",
        ),
    ),
    "Open MPI": Kind(
        mpi.MPIEnvironment,
        mpi.detect,
        of_open_mpi,
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ),
    "MPICH": Kind(mpi.MPIEnvironment, mpi.detect, of_mpich, ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS")),
    "MVAPICH": Kind(mpi.MPIEnvironment, mpi.detect, of_mvapich, ("MV2_COMM_WORLD_SIZE",)),
    "jsrun": Kind(
        lsf.LSFEnvironment,
        lsf.detect,
        of_jsrun,
        ("LSB_JOBID", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK"),
        texts=("LSB_DJOB_RANKFILE",),
    ),
    "Kubeflow": Kind(
        kubeflow.KubeflowEnvironment,
        kubeflow.detect,
        of_operator,
        ("MASTER_PORT", "WORLD_SIZE", "RANK"),
        pods=True,
        texts=("MASTER_ADDR",),
    ),
    "indexed Job": Kind(
        kubernetes_job.KubernetesJobEnvironment,
        kubernetes_job.detect,
        of_indexed_job,
        ("JOB_COMPLETION_INDEX", "WORLD_SIZE"),
        pods=True,
        texts=("MASTER_ADDR",),
    ),
    "Ray": Kind(
        ray.RayEnvironment,
        ray.detect,
        of_ray,
        ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"),
        texts=("MASTER_ADDR",),
    ),
}
