"""Our own strategies, through the kit that we give to others."""

from __future__ import annotations

from fabric_core.testing import StrategyConformance


class TestSingleDevice(StrategyConformance):
    name = "single_device"


class TestDDP(StrategyConformance):
    name = "ddp"
    precisions = ("32-true", "bf16-mixed")
    world_sizes = (2, 1)
