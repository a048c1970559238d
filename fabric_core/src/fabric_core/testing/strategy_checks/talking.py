"""Ranks, collectives, and how data are dealt out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fabric_core.testing.programs.strategy_talking import SAMPLES
from fabric_core.testing.strategy_checks.base import StrategyChecks

COMBINE: dict[str, Any] = {
    "mean": lambda values: values.mean(0),
    "sum": lambda values: values.sum(0),
    "min": lambda values: values.amin(0),
    "max": lambda values: values.amax(0),
    "product": lambda values: values.prod(0),
}


class Talking(StrategyChecks):
    """What ranks know of each other."""

    # -- ranks ----------------------------------------------------------------------------------------------------

    def test_every_process_has_a_global_rank_of_its_own(self) -> None:
        """From 0, and the one that the cluster environment says."""
        found = self.facts("ranks")
        assert [facts["said"]["global_rank"] for facts in found] == list(range(self.size()))

    def test_ranks_and_sizes_are_those_of_the_job(self) -> None:
        """``world_size``, ``global_rank``, ``local_rank`` and ``node_rank``."""
        for facts in self.facts("ranks"):
            assert facts["said"] == facts["true"]

    def test_every_process_uses_the_device_of_its_local_rank(self) -> None:
        """``root_device`` is the planned one."""
        for facts in self.facts("ranks"):
            assert facts["device"] == facts["planned"]

    # -- collectives ----------------------------------------------------------------------------------------------

    def test_all_gather_collects_from_all_ranks_in_their_order(self) -> None:
        """Shape (ranks, ...), for floating-point numbers, whole numbers and truth values."""
        ranks = torch.arange(self.size())
        mine = torch.arange(6.0).reshape(2, 3)
        for facts in self.facts("gathered"):
            _same(facts["float"], mine + 10 * ranks.reshape(-1, 1, 1))
            _same(facts["int"], (2**40 + ranks).reshape(-1, 1))
            _same(facts["bool"], ranks == 0)

    def test_gradients_flow_back_through_all_gather(self) -> None:
        """With ``sync_grads``, a rank's gradient is the sum of what all ranks make of its part."""
        factors = torch.arange(1.0, 1 + 2 * self.size()).reshape(-1, 2)
        for rank, facts in enumerate(self.facts("gathered")):
            _same(facts["gradient"], self.size() * factors[rank])

    @pytest.mark.parametrize("operation", COMBINE)
    def test_all_reduce_combines_all_ranks(self, operation: str) -> None:
        """In the same shape and type, equal on every rank."""
        ranks = torch.arange(float(self.size()))
        values = torch.stack([torch.tensor([[1.0 + r, -2.0], [0.5 * r, 4.0]]) for r in ranks])
        for facts in self.facts("reduced"):
            _same(facts["results"][operation], COMBINE[operation](values))

    def test_all_reduce_takes_the_mean_when_nothing_is_said(self) -> None:
        """As the contract has it."""
        for facts in self.facts("reduced"):
            _same(facts["results"]["default"], facts["results"]["mean"])

    def test_sums_of_whole_numbers_are_exact(self) -> None:
        """Also of those that float32 cannot hold."""
        size = self.size()
        for facts in self.facts("reduced"):
            _same(facts["results"]["whole"], torch.tensor([size * 2**40 + size * (size - 1) // 2]))

    def test_all_reduce_leaves_its_argument_alone(self) -> None:
        """The result is another tensor."""
        assert all(facts["argument unchanged"] for facts in self.facts("reduced"))

    def test_broadcast_sends_the_object_of_the_rank_that_is_named(self) -> None:
        """Of the first rank and of the last: dictionaries with tensors, numbers, texts; and a bare tensor."""
        last = self.size() - 1
        for facts in self.facts("sent"):
            for src in {0, last}:
                got = facts[str(src)]
                assert got["rank"] == src, (
                    f"a broadcast from rank {src} gives the object of rank {got['rank']}"
                )
                _same(got["tensor"], torch.full((2, 2), float(src)))
                assert got["nested"] == [("text", None), {"at": 0.5 + src}]
            _same(facts["tensor"], torch.full((2, 2), float(last)))

    def test_a_barrier_waits_for_every_rank(self) -> None:
        """No rank passes before the last one has come."""
        for rank, facts in enumerate(self.facts("waited")):
            assert facts["missed"] == [], f"rank {rank} did not wait for {facts['missed']}"

    def test_collectives_in_a_group_are_among_its_ranks_only(self) -> None:
        """``group=``: groups of one rank each. Skipped for a strategy that refuses groups."""
        for rank, facts in enumerate(self._grouped()):
            mine = torch.tensor([1.0 + rank, 2.0])
            _same(facts["alone gathered"], mine.unsqueeze(0))
            _same(facts["alone summed"], mine)
            _same(facts["alone averaged"], mine)

    def test_collectives_in_a_group_are_among_all_its_ranks(self) -> None:
        """``group=``: a group of all ranks. Skipped for a strategy that refuses groups."""
        values = torch.stack([torch.tensor([1.0 + rank, 2.0]) for rank in range(self.size())])
        for facts in self._grouped():
            _same(facts["all gathered"], values)
            _same(facts["all summed"], values.sum(0))
            _same(facts["all averaged"], values.mean(0))

    def _grouped(self) -> list[Any]:
        found = self.facts("grouped")
        if "none" in found[0]:
            pytest.skip(f"no groups: {found[0]['none']}")
        return found

    # -- data -----------------------------------------------------------------------------------------------------

    def test_sampler_arguments_name_every_shard(self) -> None:
        """Each of ``num_replicas`` shards is read by at least one rank."""
        samplers = [facts["sampler"] for facts in self.facts("dealt")]
        replicas = {arguments["num_replicas"] for arguments in samplers}
        assert len(replicas) == 1, f"the ranks do not agree about num_replicas: {samplers}"
        read = {arguments["rank"] for arguments in samplers}
        assert read == set(range(*replicas)), f"of {replicas.pop()} shards the ranks read {sorted(read)}"

    @pytest.mark.parametrize("order", ["in order", "shuffled"])
    def test_every_sample_is_seen_once(self, order: str) -> None:
        """By one shard; ranks that share a shard see the same."""
        shards: dict[int, list[int]] = {}
        for rank, facts in enumerate(self.facts("dealt")):
            seen = shards.setdefault(facts["sampler"]["rank"], facts[order])
            assert facts[order] == seen, f"rank {rank} sees others than the ranks that it shares a shard with"
        assert sorted(sample for seen in shards.values() for sample in seen) == list(range(SAMPLES))

    def test_batches_arrive_where_the_strategy_says(self) -> None:
        """On ``loader_device``."""
        for facts in self.facts("dealt"):
            if facts["loader device"]:
                assert facts["devices"] == [facts["loader device"]]


def _same(found: Any, expected: torch.Tensor) -> None:
    assert isinstance(found, torch.Tensor), f"got a {found}, not a tensor"
    assert found.dtype == expected.dtype, f"got {found.dtype}, not {expected.dtype}"
    assert found.shape == expected.shape, f"got the shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    assert torch.allclose(found.double(), expected.double(), rtol=1e-6, atol=0), (
        f"got {found}, not {expected}"
    )
