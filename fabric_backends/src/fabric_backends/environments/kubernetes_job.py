"""Pods of a plain indexed Job of Kubernetes, one process each. Nothing here imports PyTorch."""

from __future__ import annotations

import os
from collections.abc import Mapping

from fabric_backends.environments.kubeflow import IN_KUBERNETES
from fabric_backends.environments.started import PodEnvironment
from fabric_backends.environments.variables import Variables, of_equal_nodes, whole
from fabric_backends.hooks import KUBERNETES_JOB
from fabric_core.specs import Detection

_INDEX, _COUNT, _PORT = "JOB_COMPLETION_INDEX", "WORLD_SIZE", 29500

_variables = Variables(
    "kubernetes_job",
    "Set it in the manifest of a Job with completionMode: Indexed (docs/clusters.md has one)",
    "The manifest of the Job",
)


def detect(environ: Mapping[str, str]) -> Detection | None:
    """Recognise a pod of an indexed Job whose pods train together: only the manifest can say so, by a count."""
    if IN_KUBERNETES not in environ or "LOCAL_RANK" in environ:
        return None
    if _INDEX not in environ or _COUNT not in environ:
        return None
    note = f"{_INDEX} and {_COUNT} are set in a pod"
    return of_equal_nodes(whole(environ, _COUNT), 1, note)


class KubernetesJobEnvironment(PodEnvironment):
    """Ranks from the completion index; the manifest adds the count (``WORLD_SIZE``) and the name of pod 0.

    Pods of an indexed Job find each other by ``<job>-<index>.<service>`` where a headless service selects them.
    """

    spec = KUBERNETES_JOB
    variables = _variables

    @property
    def main_port(self) -> int:
        """``MASTER_PORT``, or 29500: pods have an address of their own."""
        return super().main_port if os.environ.get("MASTER_PORT") else _PORT

    def global_rank(self) -> int:
        """``JOB_COMPLETION_INDEX``."""
        return _variables.number(_INDEX)
