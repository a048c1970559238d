"""Who every rank is, as the chosen parts say."""

from __future__ import annotations

from typing import Any


def main(arguments: dict[str, Any]) -> dict[str, Any]:
    """Make a ``Fabric`` by the flags alone; the arguments are further ones of its own."""
    from fabric_core import Fabric

    with Fabric(**arguments) as fabric:
        fabric.launch()
        return {
            "rank": fabric.global_rank,
            "size": fabric.world_size,
            "parts": [p.identity for p in fabric.plan],
        }
