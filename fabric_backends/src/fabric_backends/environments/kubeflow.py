"""Pods of a PyTorchJob, one process each, as Kubeflow's operator starts them. Nothing here imports PyTorch."""

from __future__ import annotations

import os
from collections.abc import Mapping

from fabric_backends.environments.started import PodEnvironment
from fabric_backends.environments.variables import Variables, of_equal_nodes, whole
from fabric_backends.hooks import KUBEFLOW
from fabric_core.errors import ConfigurationError
from fabric_core.specs import Detection

IN_KUBERNETES = "KUBERNETES_SERVICE_HOST"
"""Set in every container of a pod."""

_PLACE = ("MASTER_ADDR", "MASTER_PORT")
_PROCESSES = "PET_NPROC_PER_NODE"

_variables = Variables("kubeflow", "Start the script as a PyTorchJob, whose operator sets it", "The operator")


def detect(environ: Mapping[str, str]) -> Detection | None:
    """Recognise the one process of a pod. Whoever has a local rank was started by something in the pod."""
    if IN_KUBERNETES not in environ or "LOCAL_RANK" in environ or "JOB_COMPLETION_INDEX" in environ:
        return None
    if not all(name in environ for name in (*_PLACE, "WORLD_SIZE", "RANK")):
        return None
    return of_equal_nodes(whole(environ, "WORLD_SIZE"), 1, "the variables of a PyTorchJob are set in a pod")


class KubeflowEnvironment(PodEnvironment):
    """Ranks from the variables that the operator sets in each pod: one node and one process per pod.

    With several processes per pod, the pod starts them itself, by torchrun, which reads the operator's ``PET_…``
    variables.
    """

    spec = KUBEFLOW
    variables = _variables

    def validate(self, processes_per_node: int, num_nodes: int) -> None:
        """Compare what the operator announces with what runs, and with what the user asked for. On every rank.

        Raises:
            ConfigurationError: The pods are meant to hold several processes each, or the numbers differ.
        """
        per_pod = os.environ.get(_PROCESSES, "1")
        if per_pod not in ("1", "auto"):
            raise ConfigurationError(
                f"The PyTorchJob asks for {per_pod} processes per pod ({_PROCESSES}), but this script was started once "
                "in its pod. Start it with torchrun, which reads the same variables, or set nprocPerNode to 1."
            )
        super().validate(processes_per_node, num_nodes)
