"""Which strategies work with which accelerators, as far as anybody says so. No hardware is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from fabric_core.errors import ConfigurationError, listing
from fabric_core.plan import Plan
from fabric_core.registry import Offer, Registry
from fabric_core.resolve.asked import asked_choice, choice_of_offer, overlap
from fabric_core.resolve.hardware import REFERENCE_ENVIRONMENT
from fabric_core.resolve.precisions import check_precision, choose_precision
from fabric_core.resolve.resolve import REFERENCE_CHECKPOINT_IO
from fabric_core.resolve.strategies import vouching
from fabric_core.specs import AcceleratorSpec, CheckpointIOSpec, ClusterEnvironmentSpec, StrategySpec

Standing = Literal["supported", "rejected", "unknown"]

SIZES = (1, 2)
"""The numbers of devices for which plugins are asked whether they veto. What they say of each is about the pair."""


@dataclass(frozen=True)
class Pair:
    """A strategy and an accelerator.

    Attributes:
        strategy, accelerator: The two.
        standing: ``"unknown"``: nobody says anything; it is tried, with a warning.
        by: The distributions that say so.
        why: What they say, in one sentence.
    """

    strategy: Offer
    accelerator: Offer
    standing: Standing
    by: tuple[str, ...]
    why: str


def pairs(registry: Registry, precision: Any = None) -> Iterator[Pair]:
    """Every strategy with every accelerator that is on offer, in the order of names.

    Args:
        registry: What is installed.
        precision: The precision that they are to work with; ``None`` for plain float32.
    """
    for strategy in sorted(registry.offers(StrategySpec.kind), key=_name):
        for accelerator in sorted(registry.offers(AcceleratorSpec.kind), key=_name):
            standing, by, why = _standing(strategy, accelerator, precision, registry)
            yield Pair(strategy, accelerator, standing, by, why)


def _name(offer: Offer) -> tuple[str, str]:
    return offer.spec.name, offer.distribution


def _standing(
    strategy: Offer, accelerator: Offer, precision: Any, registry: Registry
) -> tuple[Standing, tuple[str, ...], str]:
    spec, device = cast(StrategySpec, strategy.spec), cast(AcceleratorSpec, accelerator.spec)
    if overlap(spec.rejects, device):
        return "rejected", (strategy.distribution,), f"the strategy rejects {listing(spec.rejects)}"
    try:
        vetoes = _vetoes(strategy, accelerator, precision, registry)
    except ConfigurationError as error:  # there is no such precision for the two
        return "rejected", (strategy.distribution,), str(error)
    if vetoes:
        return "rejected", tuple(dict.fromkeys(by for by, _ in vetoes)), " ".join(why for _, why in vetoes)
    voucher = vouching(spec, device)
    if voucher is spec:
        return "supported", (strategy.distribution,), f"the strategy supports {_all(spec.supports)}"
    if voucher is device:
        return "supported", (accelerator.distribution,), "the accelerator asks for the strategy"
    return "unknown", (), "nobody says so; it is tried, with a warning"


def _all(names: tuple[str, ...]) -> str:
    return "every accelerator" if "*" in names else listing(names)


def _vetoes(strategy: Offer, accelerator: Offer, precision: Any, registry: Registry) -> list[tuple[str, str]]:
    """What plugins have against the two, whatever the number of devices."""
    plans = [_plan(strategy, accelerator, precision, size, registry) for size in SIZES]
    first, *others = [registry.check_plan(plan)[0] for plan in plans]
    return [veto for veto in first if all(veto in other for other in others)]


def _plan(strategy: Offer, accelerator: Offer, precision: Any, size: int, registry: Registry) -> Plan:
    """A plan of the two, with the reference parts otherwise."""
    reason = "asked for its standing"
    chosen = choice_of_offer(strategy, reason)
    number_format = choose_precision(
        precision, None, strategy.spec, cast(AcceleratorSpec, accelerator.spec), registry
    )
    check_precision(number_format, chosen)
    return Plan(
        accelerator=choice_of_offer(accelerator, reason),
        strategy=chosen,
        precision=number_format,
        cluster_environment=asked_choice(ClusterEnvironmentSpec.kind, REFERENCE_ENVIRONMENT, registry),
        checkpoint_io=asked_choice(CheckpointIOSpec.kind, REFERENCE_CHECKPOINT_IO, registry),
        launcher=None,
        loggers=(),
        devices=tuple(range(size)),
        num_nodes=1,
        device_reason=reason,
    )
