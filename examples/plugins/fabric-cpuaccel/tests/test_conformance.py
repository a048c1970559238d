"""What fabric-core expects of a plugin and of an accelerator."""

import pytest

from fabric_core.testing import AcceleratorConformance, ManifestConformance


@pytest.fixture(autouse=True)
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make two devices for every check."""
    monkeypatch.setenv("CPUACCEL_DEVICES", "2")


class TestManifest(ManifestConformance):
    distribution = "fabric-cpuaccel"


class TestCPUAccel(AcceleratorConformance):
    name = "cpuaccel"
    hiding = {"CPUACCEL_DEVICES": "0"}
    most = 1e-6
