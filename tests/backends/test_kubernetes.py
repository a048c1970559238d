"""Pods of Kubernetes, which set variables and no more: made-up ones, and two processes that meet by them."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from fabric_backends.environments.kubeflow import KubeflowEnvironment
from fabric_backends.environments.kubeflow import detect as detect_kubeflow
from fabric_backends.environments.kubernetes_job import KubernetesJobEnvironment
from fabric_backends.environments.kubernetes_job import detect as detect_job
from fabric_core.errors import ConfigurationError

POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
OPERATOR = {**POD, "MASTER_ADDR": "train-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "4", "RANK": "3"}
INDEXED = {**POD, "JOB_COMPLETION_INDEX": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "train-0.train"}


@pytest.fixture
def pod(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Become a pod with these variables."""

    def become(variables: dict[str, str]) -> None:
        for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "PET_NPROC_PER_NODE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return become


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_pytorchjob_is_not_confused_with_what_runs_in_its_pods() -> None:
    found = detect_kubeflow(OPERATOR)
    assert found is not None
    assert (found.processes_per_node, found.num_nodes) == (1, 4)
    assert detect_kubeflow({**OPERATOR, "LOCAL_RANK": "0"}) is None  # torchrun, or we ourselves, in the pod
    assert detect_kubeflow({name: OPERATOR[name] for name in OPERATOR if name not in POD}) is None
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"):
        assert detect_kubeflow({key: value for key, value in OPERATOR.items() if key != name}) is None


def test_several_processes_per_pod_are_left_to_torchrun_with_an_explanation(pod: Any) -> None:
    pod({**OPERATOR, "PET_NPROC_PER_NODE": "2"})
    with pytest.raises(
        ConfigurationError, match=r"asks for 2 processes per pod \(PET_NPROC_PER_NODE\).* torchrun"
    ):
        KubeflowEnvironment().validate(2, 2)
    for per_pod in ("1", "auto"):
        pod({**OPERATOR, "PET_NPROC_PER_NODE": per_pod})
        KubeflowEnvironment().validate(1, 4)


def test_an_indexed_job_is_one_only_if_its_manifest_says_how_many_pods_train_together(pod: Any) -> None:
    found = detect_job(INDEXED)
    assert found is not None
    assert (found.processes_per_node, found.num_nodes) == (1, 4)
    assert detect_job({**POD, "JOB_COMPLETION_INDEX": "2"}) is None
    assert detect_job({**INDEXED, "LOCAL_RANK": "0"}) is None
    pod(INDEXED)
    environment = KubernetesJobEnvironment()
    assert (environment.main_address, environment.main_port) == ("train-0.train", 29500)
    pod({**INDEXED, "MASTER_PORT": "1234"})
    assert environment.main_port == 1234


TOGETHER = """
from fabric_core import Fabric
with Fabric(accelerator="cpu", strategy="ddp") as fabric:
    fabric.launch()
    environment = fabric.plan.cluster_environment.name
    answer((environment, fabric.node_rank, fabric.world_size, fabric.all_reduce(rank + 1.0, reduce_op="sum").item()))
"""


@pytest.mark.parametrize(
    ("environment", "index"), [("kubeflow", "RANK"), ("kubernetes_job", "JOB_COMPLETION_INDEX")]
)
def test_two_pods_train_together(environment: str, index: str, programs: Any, free_port: int) -> None:
    """The processes are real; that each has a pod of its own is made up."""
    script = programs.write("rank = int(os.environ['INDEX'])\n" + TOGETHER)
    common = {**POD, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    pods = [programs.start(str(script), **common, **{index: str(i), "INDEX": str(i)}) for i in range(2)]
    ended = [programs.finish(process) for process in pods]
    assert [one.code for one in ended] == [0, 0], ended[0].err + ended[1].err
    assert ended[-1].answers == {i: (environment, i, 2, 3.0) for i in range(2)}
