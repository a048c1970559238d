"""Checkpoints: what is saved is whole, and what is loaded goes on as if nothing had happened."""

from __future__ import annotations

from dataclasses import replace

import torch

from fabric_core.testing.plain_loop import CASES, make
from fabric_core.testing.strategy_checks.base import StrategyChecks
from fabric_core.testing.strategy_checks.numbers import expect_equal


class State(StrategyChecks):
    """Saving and loading."""

    def test_a_checkpoint_holds_every_parameter_whole(self, precision: str) -> None:
        """Under their own names, in their own shapes; on every rank the same bits."""
        expected = make(CASES["plain"], build=self.build)[0].state_dict()
        first, *others = self.trained(precision, "plain")
        shapes = {name: tuple(value.shape) for name, value in first["parameters"].items()}
        assert shapes == {name: tuple(value.shape) for name, value in expected.items()}
        for rank, facts in enumerate(others, 1):
            for name, value in first["parameters"].items():
                assert torch.equal(facts["parameters"][name], value), f"rank {rank} loads another {name}"

    def test_names_in_state_dicts_have_no_prefix(self) -> None:
        """A set-up model has the names of the user's model."""
        expected = list(make(CASES["plain"], build=self.build)[0].state_dict())
        for facts in self.trained(self._comparable()[0], "plain"):
            assert facts["keys"] == expected

    def test_loading_gives_back_the_same_bits(self, precision: str) -> None:
        """Model, optimizers and numbers that were loaded and saved again are the same checkpoint."""
        for rank, facts in enumerate(self.facts(f"resume:{precision}:{self.size()}")):
            assert facts["changed"] == [], f"on rank {rank}"

    def test_a_restored_training_goes_on_as_if_it_had_never_stopped(self, precision: str) -> None:
        """Saved in the middle by one ``Fabric``, and gone on with by another."""
        self._expect_resumed(precision, self.size(), self.size())

    def test_a_checkpoint_goes_on_in_another_number_of_processes(self, ways: tuple[int, int]) -> None:
        """Saved by a job of one size, and gone on with by one of another; for what ``world_sizes`` claims."""
        saved, resumed = ways
        self._expect_resumed(self._comparable()[0], saved, resumed)

    def test_loading_into_another_number_of_processes_gives_back_the_same_bits(
        self, ways: tuple[int, int]
    ) -> None:
        """What was loaded there and saved again is the same checkpoint."""
        saved, resumed = ways
        for rank, facts in enumerate(self.facts(f"resume:{self._comparable()[0]}:{saved}", resumed)):
            assert facts["changed"] == [], f"on rank {rank}"

    def test_a_checkpoint_is_written_by_rank_zero_only(self) -> None:
        """The checkpoint io is asked to write on no other rank: they would write over each other."""
        for rank, facts in enumerate(self.facts("written")):
            assert rank == 0 or not facts["writes"], f"rank {rank} writes the file as well"

    def test_a_save_that_is_not_waited_for_holds_the_values_of_its_moment(self) -> None:
        """Whatever changes while it is written: parameters, the state of optimizers, values in lists and tensors."""
        for rank, facts in enumerate(self.facts("saved meanwhile")):
            assert facts["changed"] == [], f"rank {rank} loads values of a later moment"

    def test_a_checkpoint_that_cannot_be_written_is_an_error_on_every_rank(self) -> None:
        """A ``CheckpointError``, and no rank that waits for another."""
        for rank, facts in enumerate(self.facts("failing files")):
            told = facts["unwritable"]
            assert told["is right"], f"rank {rank} raises {told['error']} instead of a CheckpointError"

    def test_a_checkpoint_that_is_missing_is_an_error_on_every_rank(self) -> None:
        """Likewise."""
        for rank, facts in enumerate(self.facts("failing files")):
            told = facts["missing"]
            assert told["is right"], f"rank {rank} raises {told['error']} instead of a CheckpointError"

    def _expect_resumed(self, precision: str, saved: int, resumed: int) -> None:
        case, master = replace(CASES["everything"], precision=precision), precision in self.master_weights
        found = self.facts(f"resume:{precision}:{saved}", resumed)
        for what in ("losses", "parameters"):
            expect_equal(case, what, found, master=master, build=self.build)
