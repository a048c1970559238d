"""Which precision: the most specific one of its name for the strategy and the accelerator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from fabric_core.errors import ConfigurationError, UnsupportedError, listing
from fabric_core.plan import Choice
from fabric_core.registry import Offer, Registry
from fabric_core.resolve.asked import choice_of_object, choice_of_offer, is_name
from fabric_core.specs import AcceleratorSpec, PartSpec, PrecisionSpec, StrategySpec

REFERENCE_PRECISION = "32-true"


def choose_precision(
    flag: Any, plugin: Any, strategy: PartSpec, accelerator: AcceleratorSpec, registry: Registry
) -> Choice:
    """The precision.

    Args:
        flag: ``precision=…``; a name, a number of bits, a class or an instance; ``None`` when it was not given.
        plugin: The precision among ``plugins=[…]``; ``None`` when there is none.
        strategy: The chosen strategy.
        accelerator: The chosen accelerator.
        registry: What is installed.

    Raises:
        ConfigurationError: Both ways were used, and they differ.
        UnsupportedError: The precision exists, but not for this strategy and accelerator.
    """
    if flag is not None and plugin is not None and flag != plugin:
        raise ConfigurationError(
            f"The precision was given twice: precision={flag!r} and plugins=[{plugin!r}]. Keep one of them."
        )
    asked = flag if flag is not None else plugin
    if asked is None:
        return replace(_by_name(REFERENCE_PRECISION, strategy, accelerator, registry), reason="the default")
    if isinstance(asked, int) and not isinstance(asked, bool):
        asked = str(asked)
    if not is_name(asked):
        return choice_of_object(PrecisionSpec.kind, asked)
    return _by_name(asked, strategy, accelerator, registry)


def check_precision(precision: Choice, strategy: Choice) -> None:
    """Refuse a precision when the strategy lists others. A precision that is made for the strategy vouches for itself.

    Raises:
        UnsupportedError: The strategy cannot work with it.
    """
    claims, spec = cast(StrategySpec, strategy.spec).precisions, cast(PrecisionSpec, precision.spec)
    listed = {claim.lower() for claim in claims} & set(spec.names)
    if claims and not (listed or (spec.strategies and _admits(spec.strategies, set(strategy.spec.names)))):
        raise UnsupportedError(
            f"The strategy {strategy.name!r} cannot work with the precision {precision.name!r}. It works with "
            f"{listing(claims)}. Choose one of these, or another strategy."
        )


def _by_name(name: str, strategy: PartSpec, accelerator: AcceleratorSpec, registry: Registry) -> Choice:
    offers = registry.named(PrecisionSpec.kind, name)
    fitting = _scoped(offers, strategy, accelerator)
    if not fitting:
        raise UnsupportedError(
            f"precision={name!r} exists only for {listing(_scope(_spec(offer)) for offer in offers)}; here the "
            f"strategy is {strategy.name!r} and the accelerator {accelerator.name!r}."
        )
    most = max(_spec(offer).specificity for offer in fitting)
    chosen = registry.only([offer for offer in fitting if _spec(offer).specificity == most], name)
    reason = f"precision={name!r} was asked for"
    if most:
        reason += f"; this one is made for {_scope(_spec(chosen))}"
    lost = tuple((o.full_name, "its scope is less specific") for o in fitting if o is not chosen)
    return choice_of_offer(chosen, reason, lost)


def _scoped(offers: list[Offer], strategy: PartSpec, accelerator: AcceleratorSpec) -> list[Offer]:
    devices = {*accelerator.names, *(group.lower() for group in accelerator.groups)}
    return [
        offer
        for offer in offers
        if _admits(_spec(offer).strategies, set(strategy.names))
        and _admits(_spec(offer).accelerators, devices)
    ]


def _admits(scope: tuple[str, ...], names: set[str]) -> bool:
    return not scope or any(name.lower() in names for name in scope)


def _scope(spec: PrecisionSpec) -> str:
    return (
        " with ".join(filter(None, ("/".join(spec.strategies), "/".join(spec.accelerators)))) or "everything"
    )


def _spec(offer: Offer) -> PrecisionSpec:
    return cast(PrecisionSpec, offer.spec)
