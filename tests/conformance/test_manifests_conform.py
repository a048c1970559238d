"""Our own five distributions, through the kit that we ship."""

from __future__ import annotations

from fabric_core.testing import ManifestConformance


class TestCore(ManifestConformance):
    distribution = "fabric-core"


class TestBackends(ManifestConformance):
    distribution = "fabric-backends"


class TestCuda(ManifestConformance):
    distribution = "fabric-cuda"


class TestXLA(ManifestConformance):
    distribution = "fabric-xla"


class TestDeepSpeed(ManifestConformance):
    distribution = "fabric-deepspeed"
