"""Our own launchers, through the kit that we ship."""

from __future__ import annotations

from fabric_core.testing import LauncherConformance


class TestScript(LauncherConformance):
    name = "script"


class TestSpawn(LauncherConformance):
    name = "spawn"


class TestFork(LauncherConformance):
    name = "fork"
