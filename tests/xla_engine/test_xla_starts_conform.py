"""The launchers and the cluster environment through the conformance kit, where torch_xla finds two chips.

The chips are the CPU, and each process has one, see ``two_chips``. XLA has no collectives between them; what the kit
trains on two processes is trained by other strategies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from fabric_core.testing import ClusterEnvironmentConformance, LauncherConformance
from fabric_core.testing.places import Place

TWO_CHIPS = str(Path(__file__).parent / "two_chips")
NO_LAUNCH_OF_ONE = "one device of several needs no process of its own, so the launcher says to leave it out"

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(autouse=True)
def _two_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", TWO_CHIPS)
    monkeypatch.setenv("CPU_NUM_DEVICES", "2")


class TestFork(LauncherConformance):
    name = "xla_fork"
    seconds = 120.0
    expected_failures = {
        "test_one_process_can_be_asked_for": NO_LAUNCH_OF_ONE,
        "test_it_works_without_a_script_where_it_says_so": NO_LAUNCH_OF_ONE,
    }


class TestSpawn(LauncherConformance):
    name = "xla_spawn"
    seconds = 120.0
    expected_failures = {"test_one_process_can_be_asked_for": NO_LAUNCH_OF_ONE}


class TestEnvironment(ClusterEnvironmentConformance):
    name = "xla"

    def variables(self, place: Place, folder: Path) -> Mapping[str, str]:
        """What torch_xla's launch sets on a TPU, and our launcher after it; ranks are the device's business."""
        (folder / f"place-{place.global_rank}.json").write_text(json.dumps(answers(place)))
        return {
            "PJRT_LOCAL_PROCESS_RANK": str(place.local_rank),
            "PJRT_LOCAL_PROCESS_COUNT": str(place.processes_per_node),
            "TPU_PROCESS_ADDRESSES": ",".join(f"host:{8476 + rank}" for rank in range(place.world_size)),
            "MASTER_ADDR": place.main_address,
            "MASTER_PORT": str(place.main_port),
            "PJRT_DEVICE": "CPU",
            "PYTHONPATH": TWO_CHIPS,
            "XLA_PLACE": str(folder / f"place-{place.global_rank}.json"),
        }

    def around(self, place: Place) -> AbstractContextManager[Any]:
        """What the device says, in this process."""
        import torch_xla.runtime as xr

        told = {name: (lambda answer=answer: answer) for name, answer in answers(place).items()}
        return patch.multiple(xr, get_master_ip=lambda: place.main_address, **told)


def answers(place: Place) -> dict[str, int]:
    """What torch_xla's runtime says in a process."""
    return {
        "world_size": place.world_size,
        "global_ordinal": place.global_rank,
        "local_ordinal": place.local_rank,
        "local_device_count": place.processes_per_node,
        "host_index": place.node_rank,
    }
