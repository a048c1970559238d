"""Ranks for workers of Ray; a real Ray is in ``tests/engines``."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric_backends.environments.ray import detect, ranks_of_workers
from fabric_core.errors import ConfigurationError


@given(st.integers(1, 5), st.integers(1, 5), st.randoms(use_true_random=False))
def test_workers_in_any_order_become_the_ranks_of_their_nodes(
    nodes: int, per_node: int, order: random.Random
) -> None:
    hosts = [f"10.0.0.{node}" for node in range(nodes) for _ in range(per_node)]
    order.shuffle(hosts)
    ranks = ranks_of_workers(hosts, 4000)
    assert sorted(int(rank["RANK"]) for rank in ranks) == list(range(nodes * per_node))
    assert ranks[0]["RANK"] == "0"
    assert {rank["MASTER_ADDR"] for rank in ranks} == {hosts[0]}
    for host, rank in zip(hosts, ranks, strict=True):
        node, local_rank = divmod(int(rank["RANK"]), per_node)
        assert (int(rank["NODE_RANK"]), int(rank["LOCAL_RANK"])) == (node, local_rank)
        assert list(dict.fromkeys(hosts))[node] == host
        found = detect({"RAY_RAYLET_PID": "1", **rank})
        assert found is not None
        assert (found.processes_per_node, found.num_nodes) == (per_node, nodes)


def test_unequal_nodes_are_explained() -> None:
    with pytest.raises(
        ConfigurationError, match=r"same number of Ray workers on every node \(a: 2, b: 1\).* placement group"
    ):
        ranks_of_workers(["a", "b", "a"], 1)
    with pytest.raises(ConfigurationError, match="there are none"):
        ranks_of_workers([], 1)


def test_workers_with_a_device_of_their_own_are_told_from_those_that_share_all() -> None:
    worker = {"RAY_RAYLET_PID": "1", **ranks_of_workers(["a", "a"], 1)[1]}
    for visible, own in (("1", True), ("0,1", False), ("", False)):
        found = detect({**worker, "CUDA_VISIBLE_DEVICES": visible})
        assert found is not None
        assert found.own_devices == own
