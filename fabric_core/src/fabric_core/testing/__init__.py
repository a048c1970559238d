"""The conformance kit: proof that a plugin's parts keep the promises of their contracts.

It needs ``pip install 'fabric-core[testing]'``. A plugin's test file holds one class of a few lines per part:

    from fabric_core.testing import PrecisionConformance

    class TestAcmePrecision(PrecisionConformance):
        name = "acme-8"

pytest finds the checks in the base class, runs them against the installed part of that name, shows a table, and writes
``fabric-conformance.json``. See `Conformance` for what a class may state.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fabric_core.testing.accelerator import AcceleratorConformance as AcceleratorConformance
    from fabric_core.testing.checkpoint_io import CheckpointIOConformance as CheckpointIOConformance
    from fabric_core.testing.cluster_environment import (
        ClusterEnvironmentConformance as ClusterEnvironmentConformance,
    )
    from fabric_core.testing.conformance import Conformance as Conformance
    from fabric_core.testing.launcher import LauncherConformance as LauncherConformance
    from fabric_core.testing.logger import LoggerConformance as LoggerConformance
    from fabric_core.testing.manifest import ManifestConformance as ManifestConformance
    from fabric_core.testing.precision import PrecisionConformance as PrecisionConformance
    from fabric_core.testing.strategy import StrategyConformance as StrategyConformance

_MODULE_OF = {
    "AcceleratorConformance": "accelerator",
    "CheckpointIOConformance": "checkpoint_io",
    "ClusterEnvironmentConformance": "cluster_environment",
    "Conformance": "conformance",
    "LauncherConformance": "launcher",
    "LoggerConformance": "logger",
    "ManifestConformance": "manifest",
    "PrecisionConformance": "precision",
    "StrategyConformance": "strategy",
}

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
