"""What a check needs that may not be installed or not be there: then it is skipped, and says why."""

from __future__ import annotations

import pytest

from fabric_core.errors import FabricError
from fabric_core.plan import Request
from fabric_core.registry import default_registry
from fabric_core.resolve import resolve


def why_no_plan(strategy: str = "auto", accelerator: str = "cpu", devices: int = 2) -> str:
    """Why nothing installed trains on several devices here; empty when something does."""
    request = Request(accelerator=accelerator, strategy=strategy, devices=devices)
    try:
        resolve(request, default_registry())
    except FabricError as error:
        return str(error)
    return ""


def need_plan(strategy: str = "auto", accelerator: str = "cpu", devices: int = 2) -> None:
    """Skip the check where nothing installed trains on several devices."""
    reason = why_no_plan(strategy, accelerator, devices)
    if reason:
        pytest.skip(f"there is nothing to train with on {devices} device(s): {reason}")
