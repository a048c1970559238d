"""A training gives the numbers of a plain loop in one process over the global batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fabric_core.testing.comparison import (
    FLOAT32_TOLERANCE,
    HALVES,
    allowed,
    between,
    distance_moved,
    plain_result,
)
from fabric_core.testing.plain_loop import (
    CASES,
    DTYPES,
    Build,
    Case,
    Parameters,
    Trained,
    difference,
    gradients,
    make,
    plain_output,
    probe,
)
from fabric_core.testing.strategy_checks.base import StrategyChecks, outcome_of


class Numbers(StrategyChecks):
    """Losses, gradients and parameters."""

    # -- gradients ------------------------------------------------------------------------------------------------

    def test_gradients_are_averaged_over_all_ranks(self) -> None:
        """One step with a learning rate of one subtracts the mean gradient of the global batch."""
        for facts in self.facts("gradients"):
            self._expect_mean(facts["gradients"], facts["num_replicas"], batches=1)

    def test_held_gradients_are_added_to_those_that_follow(self) -> None:
        """After a batch in ``no_backward_sync`` and one outside, the gradient is the sum of both, averaged."""
        for facts in self.facts("held"):
            self._expect_mean(facts["gradients"], facts["num_replicas"], batches=2)

    def test_held_gradients_are_each_rank_s_own(self) -> None:
        """In ``no_backward_sync`` nothing is averaged; where a rank can see whole gradients, they are of its share."""
        found = self.facts("held")
        if not all(facts["holds"] for facts in found):
            pytest.skip("the strategy says that it cannot hold back the synchronisation")
        if not any(facts["own"] for facts in found):
            pytest.skip("no rank holds whole gradients")
        for facts in found:
            own = gradients(self.build, slice(facts["rank"], None, facts["num_replicas"]))
            for name, value in facts["own"].items():
                assert _distance(value, own[name]) <= FLOAT32_TOLERANCE * _scale([own[name]]), (
                    f"The gradient of {name} inside of no_backward_sync is not that of the rank's own share."
                )

    def _expect_mean(self, found: Parameters, replicas: int, batches: int) -> None:
        expected = gradients(self.build, batches=batches)
        tolerance = FLOAT32_TOLERANCE * _scale(expected.values())
        if difference(found, expected) <= tolerance:
            return
        shares = [gradients(self.build, slice(rank, None, replicas), batches) for rank in range(replicas)]
        known = {f"those of the share of replica {rank} alone": share for rank, share in enumerate(shares)}
        known["the sum over the replicas, not their mean"] = _times(expected, replicas)
        known["divided by the number of replicas twice"] = _times(expected, 1 / replicas)
        known["zero"] = _times(expected, 0)
        looks = [
            f" They are {what}." for what, value in known.items() if difference(found, value) <= tolerance
        ]
        raise AssertionError(
            f"The gradients differ by {difference(found, expected):.1e} from the mean over the global batch, and "
            f"{tolerance:.1e} is allowed.{''.join(looks[:1])}"
        )

    # -- trainings ------------------------------------------------------------------------------------------------

    def test_losses_equal_the_plain_loop(self, precision: str) -> None:
        """The loss of every step, averaged over the ranks."""
        self._expect(precision, "plain", "losses")

    def test_parameters_equal_the_plain_loop(self, precision: str) -> None:
        """After twenty steps."""
        self._expect(precision, "plain", "parameters")

    def test_everything_together_equals_the_plain_loop(self, precision: str) -> None:
        """Accumulation, a short last window, clipping by norm and two optimizers."""
        self._expect(precision, "everything", "losses")
        self._expect(precision, "everything", "parameters")

    def test_accumulation_synchronises_the_gradients_of_whole_windows(self) -> None:
        """Windows of three micro-batches are as one batch of three times the size."""
        self._expect("32-true", "accumulate", "before_last")

    def test_a_short_last_window_is_averaged_over_its_own_length(self) -> None:
        """The last window has two micro-batches instead of three."""
        self._expect("32-true", "accumulate", "parameters")

    def test_clipping_uses_the_norm_over_all_ranks(self) -> None:
        """Parameters after steps whose gradients were clipped by their joint norm."""
        self._expect("32-true", "clip by norm", "parameters")

    def test_clipping_returns_the_norm_over_all_ranks(self) -> None:
        """The norm before clipping, as a plain tensor without dimensions."""
        self._expect("32-true", "clip by norm", "norms")
        assert all(facts["plain"] for facts in self.facts("norms")), (
            "clip_gradients_norm does not return a plain tensor without dimensions."
        )

    def test_norms_of_every_type_are_over_all_ranks(self) -> None:
        """The 1-norm, the 2-norm and the largest element."""
        flat = torch.cat([value.flatten() for value in gradients(self.build).values()])
        for rank, facts in enumerate(self.facts("norms")):
            for kind in ("1", "2", "inf"):
                expected = float(torch.linalg.vector_norm(flat, float(kind)))
                assert facts[kind] == pytest.approx(expected, rel=FLOAT32_TOLERANCE), (
                    f"norm_type={kind} on rank {rank}"
                )

    def test_a_norm_that_is_not_finite_is_an_error_on_every_rank(self) -> None:
        """When the data of one rank are infinite, every rank refuses to clip."""
        for rank, facts in enumerate(self.facts("norms")):
            assert facts["error"], f"rank {rank} clips by a norm that is not finite"

    def test_clipping_by_value_clamps_every_element(self) -> None:
        """Parameters after steps whose gradients were clamped."""
        self._expect("32-true", "clip by value", "parameters")

    def test_several_optimizers_step_as_in_the_plain_loop(self) -> None:
        """Two optimizers of one model, with different learning rates."""
        self._expect("32-true", "two optimizers", "parameters")

    # -- the model ------------------------------------------------------------------------------------------------

    def test_every_rank_begins_with_the_weights_of_rank_zero(self) -> None:
        """However a model was initialised elsewhere."""
        torch.manual_seed(0)
        model = make(CASES["plain"], seed=100, build=self.build)[0]
        with torch.no_grad():
            expected = model(probe())
        for rank, facts in enumerate(self.facts("weights")):
            assert _distance(facts["outputs"], expected) <= FLOAT32_TOLERANCE * _scale([expected]), (
                f"Rank {rank} computes with other weights after setup."
            )

    def test_every_rank_ends_with_the_same_model(self, precision: str) -> None:
        """The same outputs for the same inputs; and whole parameters, where a rank holds any, are the same."""
        first, *others = self.trained(precision, "everything")
        for rank, facts in enumerate(others, 1):
            assert torch.equal(facts["outputs"], first["outputs"]), f"rank {rank} computes other outputs"
            for name in facts["local"].keys() & first["local"].keys():
                assert torch.equal(facts["local"][name], first["local"][name]), (
                    f"{name} differs on rank {rank}"
                )

    def test_a_set_up_model_computes_what_the_model_computes(self, precision: str) -> None:
        """Its outputs are those of a plain model with the same parameters."""
        case = replace(CASES["everything"], precision=precision)
        model = make(case, build=self.build)[0]
        half = precision in HALVES and precision not in self.master_weights
        for facts in self.trained(precision, "everything"):
            parameters = facts["parameters"]
            model.to(next(iter(parameters.values())).dtype if half else DTYPES.get(precision, torch.float32))
            model.load_state_dict(parameters)
            with torch.no_grad():
                expected = plain_output(model, case, probe())
            tolerance = (0.02 if precision in HALVES else FLOAT32_TOLERANCE) * _scale([expected])
            assert _distance(facts["outputs"], expected) <= tolerance

    # -- how it is compared ---------------------------------------------------------------------------------------

    def _expect(self, precision: str, case: str, what: str, facts: list[Any] | None = None) -> None:
        """Compare one thing of a training with the plain loop, as every rank saw it."""
        if precision not in self.claimed_precisions():
            pytest.skip(f"the strategy does not claim the precision {precision!r}")
        found = self.trained(precision, case) if facts is None else facts
        expect_equal(
            replace(CASES[case], precision=precision),
            what,
            found,
            master=precision in self.master_weights,
            build=self.build,
        )


def expect_equal(case: Case, what: str, found: list[Any], *, master: bool, build: Build) -> None:
    """Compare ``"losses"``, ``"norms"``, ``"parameters"`` or ``"before_last"`` of every rank with the plain loop.

    Raises:
        AssertionError: They differ by more than rounding explains.
    """
    for rank, facts in enumerate(found):
        plain: Trained = plain_result(case, facts["replicas"], master, build)
        most = allowed(case.precision, distance_moved(plain, case, build), plain.parameters, master=master)
        one, other = getattr(outcome_of(facts), what), getattr(plain, what)
        distance = difference(one, other) if isinstance(other, dict) else between(one, other)
        assert distance <= most, (
            f"{what} differ by {distance:.1e} from those of the plain loop, as rank {rank} sees them; {most:.1e} is "
            f"allowed. {case}"
        )


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape, f"the shape is {tuple(one.shape)}, not {tuple(other.shape)}"
    return float((one.double() - other.double()).abs().max())


def _scale(values: Iterable[torch.Tensor]) -> float:
    return max(1.0, *(float(value.abs().max()) for value in values))


def _times(values: Parameters, factor: float) -> Parameters:
    return {name: value * factor for name, value in values.items()}
