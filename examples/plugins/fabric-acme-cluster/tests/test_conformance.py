"""What fabric-core expects of a plugin and of a cluster environment."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fabric_core.testing import ClusterEnvironmentConformance, ManifestConformance


class TestManifest(ManifestConformance):
    distribution = "fabric-acme-cluster"


class TestAcme(ClusterEnvironmentConformance):
    name = "acme"

    def variables(self, place: Any, folder: Path) -> Mapping[str, str]:
        others = [f"node{number}" for number in range(1, place.num_nodes)]
        job = {
            "nodes": [place.main_address, *others],
            "processes_per_node": place.processes_per_node,
            "port": place.main_port,
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        return {"ACME_JOB_FILE": str(folder / "job.json"), "ACME_TASK": str(place.global_rank)}
