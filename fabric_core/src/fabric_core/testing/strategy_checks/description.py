"""What the spec says, and what the resolver makes of it."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import MISSING, fields, replace
from typing import Any

import pytest
import torch

from fabric_core.build import build
from fabric_core.contracts.cluster_environment import ClusterEnvironment
from fabric_core.contracts.strategy import Strategy
from fabric_core.errors import OptionsError, UnsupportedError
from fabric_core.registry import default_registry
from fabric_core.resolve.asked import choice_of_offer, overlap
from fabric_core.resolve.strategies import check_strategy
from fabric_core.specs import AcceleratorSpec
from fabric_core.targets import import_target
from fabric_core.testing.strategy_checks.base import StrategyChecks

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Description(StrategyChecks):
    """The spec, and the strategy before it is connected to anything."""

    def test_it_is_made_by_its_name(self) -> None:
        """The class is a strategy, and takes the options of its spec."""
        assert isinstance(self.make(), Strategy)

    def test_it_resolves_without_a_doubt(self) -> None:
        """The resolver takes it for the accelerator that the kit tests it with, and warns of nothing."""
        plan, error = self.plan_or_error()
        assert plan is not None, str(error)
        assert plan.strategy.name.lower() in self.spec.names
        assert plan.warnings == (), "state the accelerator in 'supports'"

    def test_no_accelerator_is_supported_and_rejected_at_once(self) -> None:
        """``supports`` and ``rejects`` name different accelerators."""
        both = {name.lower() for name in self.spec.supports} & {name.lower() for name in self.spec.rejects}
        assert not both, f"{sorted(both)} are in supports and in rejects"

    def test_accelerators_that_it_rejects_are_refused(self) -> None:
        """Those that are installed; also where a group of theirs is rejected."""
        for offer in default_registry().offers(AcceleratorSpec.kind):
            spec: Any = offer.spec
            if overlap(self.spec.rejects, spec):
                plan, _ = self.plan_or_error(accelerator=spec.name, devices="1")
                assert plan is None, f"it rejects {spec.name!r}, and is used with it nevertheless"

    def test_more_devices_than_it_can_use_are_refused(self) -> None:
        """Where the spec states ``max_devices``."""
        if self.spec.max_devices is None:
            pytest.skip("it uses any number of devices")
        accelerator: Any = default_registry().one(AcceleratorSpec.kind, self.accelerator).spec
        with pytest.raises(UnsupportedError):
            check_strategy(
                choice_of_offer(self.offer, "the kit asks"), accelerator, self.spec.max_devices + 1, 1
            )

    def test_every_precision_that_it_claims_resolves(self) -> None:
        """Each of ``precisions`` is installed, and is one for it."""
        errors = [str(self.plan_or_error(precision=name)[1] or "") for name in self.claimed_precisions()]
        assert not any(errors), "\n".join(filter(None, errors))

    def test_ranks_are_those_of_the_cluster_environment(self) -> None:
        """On the second process of the second node, the global rank is 3, and the local one 1."""
        self._need_four()
        strategy = self._attached()
        found = (strategy.global_rank, strategy.local_rank, strategy.node_rank, strategy.world_size)
        assert found == (3, 1, 1, 4), "global_rank, local_rank, node_rank, world_size"
        strategy.teardown()

    def test_the_root_device_is_that_of_the_local_rank(self) -> None:
        """The second process of a node has the second of its devices."""
        self._need_four()
        strategy = self._attached()
        device = strategy.root_device
        strategy.teardown()
        assert device == torch.device("meta", 1)

    def test_processes_of_all_nodes_read_different_shards(self) -> None:
        """The second process of the second node has the last of four shards of the data, where there are four."""
        self._need_four()
        strategy = self._attached()
        replicas, rank = (strategy.sampler_arguments[name] for name in ("num_replicas", "rank"))
        strategy.teardown()
        assert 0 <= rank < replicas, f"it reads shard {rank} of {replicas}"
        assert replicas != 4 or rank == 3, (
            f"rank 3 of 4, on the second node, reads shard {rank}, as another rank does"
        )

    def test_it_can_be_sent_to_a_new_process(self) -> None:
        """Where its launcher runs a function in processes that do not inherit memory, pickling gives it back."""
        launcher = self.launcher()
        if launcher is None or not launcher.needs_function:
            pytest.skip("its launcher sends nothing")
        strategy = self.make()
        assert type(pickle.loads(pickle.dumps(strategy))) is type(strategy)

    def test_options_are_declared_as_the_constructor_takes_them(self) -> None:
        """Each field of ``options_type`` is a keyword of the constructor, with the same default, and the reverse."""
        if self.spec.options_type is None:
            pytest.skip("the spec declares no options")
        declared = {
            each.name: each.default if each.default_factory is MISSING else each.default_factory()
            for each in fields(import_target(self.spec.options_type, "options_type"))
        }
        parameters = inspect.signature(type(self.make())).parameters.values()
        free = [each for each in parameters if each.kind is inspect.Parameter.VAR_KEYWORD]
        taken = {each.name: each.default for each in parameters if each.kind in NAMED}
        assert set(taken) <= set(declared), "the constructor takes options that options_type does not declare"
        assert free or set(declared) <= set(taken), "options_type declares what the constructor does not take"
        other = {name for name in taken if _differ(taken[name], declared[name])}
        assert not other, f"the defaults of {sorted(other)} are not those of the constructor"

    def _need_four(self) -> None:
        if self.spec.processes == "single" or (self.spec.max_devices or 4) < 4:
            pytest.skip("it has no four processes")

    def _attached(self) -> Strategy:
        """The strategy in the second process of the second node."""
        plan, error = self.plan_or_error()
        assert plan is not None, str(error)
        here = build(plan).strategy.surroundings
        there = replace(
            here,
            cluster_environment=_SecondOfSecond(),
            devices=(torch.device("meta", 0), torch.device("meta", 1)),
            processes_per_node=2,
            num_nodes=2,
        )
        strategy: Strategy = self.make()
        try:
            strategy.attach(there)
        except OptionsError as error:
            pytest.skip(f"its options are not for four processes: {error}")
        return strategy


class _SecondOfSecond(ClusterEnvironment):
    """The second process of the second of two nodes."""

    creates_processes_externally = True
    main_address = "127.0.0.1"
    main_port = 29500

    def world_size(self) -> int:
        """Two nodes with two processes."""
        return 4

    def global_rank(self) -> int:
        """The last one."""
        return 3

    def local_rank(self) -> int:
        """The second one."""
        return 1

    def node_rank(self) -> int:
        """The second one."""
        return 1


def _differ(one: Any, other: Any) -> bool:
    """Objects without an equality of their own count as equal when they are of one type."""
    return one != other and (type(one) is not type(other) or "__eq__" in vars(type(one)))
