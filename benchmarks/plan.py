"""The plan.

From what was asked to which parts are taken, without making them: ``resolve`` here, ``_Connector`` in
lightning-fabric, which makes them as well. Plain PyTorch and accelerate have nothing like it.
"""

from __future__ import annotations

import os
from typing import Any

from harness import LIGHTNING, OURS, Case, Measure, Operation, Operations, main

DEFAULTS, DDP = "one CPU", "ddp on 2, bf16-mixed"
ASKED: dict[str, dict[str, Any]] = {
    DEFAULTS: {"accelerator": "cpu", "devices": 1},
    DDP: {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "precision": "bf16-mixed"},
}


def lightning_fabric(case: str) -> Operation:
    """The peer's."""
    from lightning_fabric.connector import _Connector

    return lambda: _Connector(**ASKED[case])


def fabric(case: str) -> Operation:
    """Ours."""
    from fabric_core.registry import default_registry
    from fabric_core.request import DEFAULTS as UNASKED
    from fabric_core.request import make_request
    from fabric_core.resolve import resolve

    registry = default_registry()
    flags = {**UNASKED, **ASKED[case]}

    def decide() -> None:
        request = make_request(
            flags, plugins=None, loggers=None, options={}, environ=os.environ, registry=registry
        )
        resolve(request, registry)

    return decide


FIGURE = Operations(
    name="plan",
    about=__doc__,
    contenders={LIGHTNING: lightning_fabric, OURS: fabric},
    cases=(Case(DEFAULTS, calls=20), Case(DDP, calls=20)),
    together=True,
    measures=(Measure("cpu", "µs", "CPU"), Measure("wall", "µs", "wall"), Measure("calls", "", "calls")),
)

if __name__ == "__main__":
    main(FIGURE)
