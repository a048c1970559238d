"""Our own checkpoint ios, through the kit that we ship."""

from __future__ import annotations

from fabric_core.testing import CheckpointIOConformance


class TestTorchFile(CheckpointIOConformance):
    name = "torch_file"


class TestXLAFile(CheckpointIOConformance):
    """Where torch_xla is installed."""

    name = "xla_file"
