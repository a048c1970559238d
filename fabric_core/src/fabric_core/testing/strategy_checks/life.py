"""What a strategy leaves behind, and how a job ends."""

from __future__ import annotations

import pytest

from fabric_core.testing.programs.failing import MESSAGE
from fabric_core.testing.programs.strategy_training import FAILURE
from fabric_core.testing.ranks import Ended
from fabric_core.testing.strategy_checks.base import StrategyChecks
from fabric_core.testing.strategy_checks.jobs import Told

SOON = 20  # seconds from a failure to the end of the job


class Life(StrategyChecks):
    """Coming and going."""

    # -- closing --------------------------------------------------------------------------------------------------

    def test_closing_leaves_no_process_group(self) -> None:
        """``torch.distributed`` is as it was before."""
        assert not any(facts["group"] for facts in self.facts("closing"))

    def test_closing_leaves_no_thread(self) -> None:
        """None of Python's, and none of the operating system's beyond the pools that the first use has started."""
        for rank, facts in enumerate(self.facts("closing")):
            assert facts["threads"] == [], f"on rank {rank}"
            first, second, third = facts["os threads"]
            assert third <= second, f"rank {rank} has {first}, {second}, {third} threads after each Fabric"

    def test_closing_leaves_no_process(self) -> None:
        """Neither while the program goes on, nor after it."""
        for rank, facts in enumerate(self.facts("closing")):
            assert facts["processes"] == [], f"on rank {rank}"
        assert [left for ended in self.jobs().ended for left in ended.left] == []

    def test_closing_leaves_the_environment_variables_as_they_were(self) -> None:
        """A later ``Fabric``, and programs that the user starts, see what they saw before."""
        for rank, facts in enumerate(self.facts("closing")):
            assert facts["variables"] == [], f"on rank {rank}"

    def test_tearing_down_twice_is_safe(self) -> None:
        """``teardown`` of a strategy that is torn down does nothing."""
        for rank, facts in enumerate(self.facts("closing")):
            assert facts["second teardown"] == "", f"on rank {rank}"

    def test_making_it_opens_nothing(self) -> None:
        """Neither the constructor nor ``attach`` starts a thread or a process, or changes a variable."""
        for rank, facts in enumerate(self.facts("unused")):
            assert not any(facts["made"].values()), f"on rank {rank}: {facts['made']}"
            assert not facts["group"], f"on rank {rank} a process group is initialised"

    def test_closing_without_having_connected_is_safe(self) -> None:
        """``teardown`` of a strategy that has joined nothing does nothing."""
        for rank, facts in enumerate(self.facts("unused")):
            assert facts["error"] == "", f"on rank {rank}"

    def test_a_program_that_has_closed_everything_ends_well(self) -> None:
        """The job ends with exit code 0."""
        self.facts("closing")
        codes = [ended.code for ended in self.jobs().ended]
        assert codes == [0] * len(codes), self.jobs().ended[0].err[-4000:]

    # -- failing --------------------------------------------------------------------------------------------------

    def test_an_exception_in_a_backward_pass_comes_out(self) -> None:
        """On the rank on which it was raised; otherwise the step would go on without gradients."""
        for rank, facts in enumerate(self.facts("failing backward")):
            assert facts["raised"] == FAILURE, (
                f"on rank {rank} the backward pass raises {facts['raised'] or 'nothing'}"
            )

    def test_a_failing_rank_ends_the_job_with_an_error(self) -> None:
        """Its exit code is that of a Python program that ends with an exception."""
        assert self._failed().code == 1, self._failed().err[-4000:]

    def test_the_traceback_shown_last_is_that_of_the_rank_that_failed(self) -> None:
        """Not that of a rank that waited for it in vain."""
        last = self._failed().err.strip().splitlines()[-1]
        assert last == f"ValueError: rank {self.size() - 1} {MESSAGE}", self._failed().err[-4000:]

    def test_a_failing_rank_ends_the_others_soon(self) -> None:
        """Within seconds, and not when some collective runs out of time."""
        told = self._failing()
        seconds = told.time - float((told.folder / "failed").read_text())
        assert seconds < SOON, f"the job has ended {seconds:.0f} s after the failure"

    def test_a_failing_rank_leaves_no_process(self) -> None:
        """Whatever was started has ended with the job."""
        assert self._failed().left == ()

    def _failed(self) -> Ended:
        return self._failing().ended

    def _failing(self) -> Told:
        self.need()
        return self.jobs().program("failing", self.size())

    # -- launching ------------------------------------------------------------------------------------------------

    def test_launching_starts_every_process(self) -> None:
        """``fabric.launch(function)`` runs the function once on every rank, and the ranks are joined."""
        self._expect_launched(0)

    def test_a_second_launch_in_one_process_works_like_the_first(self) -> None:
        """With a new ``Fabric``, after the first one is closed."""
        self._expect_launched(1)

    def test_launching_returns_what_rank_zero_returned(self) -> None:
        """To the program that called it."""
        ended = self._launched().ended
        assert ended.answers, ended.err[-4000:]
        for answer in ended.answers.values():
            assert [result.rpartition(" of ")[2] for result in answer["results"]] == ["launch 0", "launch 1"]
        assert ended.answers[0]["results"][0] == "rank 0 of launch 0"

    def _launched(self) -> Told:
        self.need()
        if self.spec.launcher is None:
            pytest.skip("the strategy has no launcher")
        return self.jobs().program("launching", None, devices=self.size())

    def _expect_launched(self, number: int) -> None:
        told, size = self._launched(), self.size()
        ended, written = told.ended, told.folder.glob(f"launch-{number}-rank-*")
        notes = {path.name: path.read_text().split() for path in written}
        assert sorted(notes) == [f"launch-{number}-rank-{rank}" for rank in range(size)], ended.err[-4000:]
        assert len({pid for _, pid, _ in notes.values()}) == size, "some ranks share a process"
        for who, (world_size, _, total) in notes.items():
            assert (int(world_size), float(total)) == (size, size * (size + 1) / 2), who
        assert ended.code == 0, ended.err[-4000:]
        assert ended.left == ()
