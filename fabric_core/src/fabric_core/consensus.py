"""Comparing the plans of all ranks, before the first collective: a difference is a message, and not a hang."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

from fabric_core.contracts.store import Store
from fabric_core.errors import PlanMismatchError

ADVICE = "Install the same distributions in the same versions on every node, and start every rank with the same flags."

_numbers = itertools.count()
"""One number per comparison in this process; ranks compare in the same order, so it is the same on all of them."""


def check_same_plan(
    store: Store, fingerprint: Mapping[str, str], *, rank: int, world_size: int, node_rank: int
) -> None:
    """Compare the fingerprints of all ranks. Called on every rank.

    Each compares its own with that of rank 0, and the last one publishes the verdict; so nobody's cost grows with the
    number of ranks, unless they differ.

    Args:
        store: Shared by all ranks.
        fingerprint: Of this rank's plan.
        rank, world_size, node_rank: Who this is.

    Raises:
        PlanMismatchError: They differ; on every rank, with the same message.
    """
    prefix = f"fabric/plan/{next(_numbers)}"
    own = {"node": node_rank, "plan": dict(fingerprint)}
    if rank == 0:
        store.set(f"{prefix}/0", json.dumps(own))
    first = json.loads(store.get(f"{prefix}/0"))
    if own["plan"] != first["plan"]:
        store.set(f"{prefix}/{rank}", json.dumps(own))
        store.add(f"{prefix}/differing", 1)
    if store.add(f"{prefix}/come", 1) == world_size:
        differing = store.add(f"{prefix}/differing", 0)
        verdict = compare(_posted(store, prefix, world_size, first)) if differing else ""
        store.set(f"{prefix}/verdict", json.dumps(verdict))
    else:
        verdict = json.loads(store.get(f"{prefix}/verdict"))
    if verdict:
        raise PlanMismatchError(verdict)


def _posted(store: Store, prefix: str, world_size: int, first: dict[str, Any]) -> list[dict[str, Any]]:
    """What every rank has; those that have posted nothing have what the first one has."""
    keys = [f"{prefix}/{rank}" for rank in range(world_size)]
    return [json.loads(store.get(key)) if store.check([key]) else first for key in keys]


def compare(posted: list[dict[str, dict[str, str]]]) -> str:
    """What differs between the ranks, in a message; empty when nothing does.

    Args:
        posted: For each rank, in order, its node and its fingerprint.
    """
    first = posted[0]
    for rank, other in enumerate(posted):
        lines = [
            f"  {kind}: rank 0 (node {first['node']}) has {first['plan'].get(kind, 'none')}; "
            f"rank {rank} (node {other['node']}) has {other['plan'].get(kind, 'none')}"
            for kind in sorted({*first["plan"], *other["plan"]})
            if first["plan"].get(kind) != other["plan"].get(kind)
        ]
        if lines:
            differing = sum(entry["plan"] != first["plan"] for entry in posted)
            head = (
                f"The ranks of this job decided differently: {differing} of {len(posted)} differ from rank 0."
            )
            return "\n".join([head, *lines, ADVICE])
    return ""
