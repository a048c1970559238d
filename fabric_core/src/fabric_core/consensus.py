"""Comparing the plans of all ranks, before the first collective: a difference is a message, and not a hang."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping

from fabric_core.contracts.store import Store
from fabric_core.errors import PlanMismatchError

ADVICE = "Install the same distributions in the same versions on every node, and start every rank with the same flags."

_numbers = itertools.count()
"""One number per comparison in this process; ranks compare in the same order, so it is the same on all of them."""


def check_same_plan(
    store: Store, fingerprint: Mapping[str, str], *, rank: int, world_size: int, node_rank: int
) -> None:
    """Compare the fingerprints of all ranks. Called on every rank.

    Rank 0 reads what every rank posted and publishes one verdict, so the cost per rank does not grow with their number.

    Args:
        store: Shared by all ranks.
        fingerprint: Of this rank's plan.
        rank, world_size, node_rank: Who this is.

    Raises:
        PlanMismatchError: They differ; on every rank, with the same message.
    """
    prefix = f"fabric/plan/{next(_numbers)}"
    store.set(f"{prefix}/{rank}", json.dumps({"node": node_rank, "plan": dict(fingerprint)}))
    if rank == 0:
        posted = [json.loads(store.get(f"{prefix}/{other}")) for other in range(world_size)]
        verdict = compare(posted)
        store.set(f"{prefix}/verdict", json.dumps(verdict))
    else:
        verdict = json.loads(store.get(f"{prefix}/verdict"))
    if verdict:
        raise PlanMismatchError(verdict)


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
