"""Which strategy, and whether it can work with the accelerator and the devices."""

from __future__ import annotations

from typing import Any, cast

from fabric_core.errors import UnsupportedError, listing
from fabric_core.plan import AUTO, Choice, Request
from fabric_core.registry import Offer, Registry
from fabric_core.registry.hints import situation_hint
from fabric_core.requirements import missing_requirements
from fabric_core.resolve.asked import (
    asked_choice,
    choice_of_offer,
    is_name,
    overlap,
    undecided,
)
from fabric_core.specs import AcceleratorSpec, LauncherSpec, PartSpec, Situation, StrategySpec


def named_strategy(request: Request, registry: Registry) -> Choice | None:
    """The strategy that the user asked for; ``None`` when the choice is left to us."""
    asked = request.strategy
    if is_name(asked) and asked.strip().lower() == AUTO:
        return None
    return asked_choice(StrategySpec.kind, asked, registry)


def situation(devices: int, num_nodes: int, notebook: bool) -> Situation:
    """What kind of job this is."""
    if num_nodes > 1:
        return "many_nodes"
    if devices > 1:
        return "notebook" if notebook else "many"
    return "one"


def automatic_strategy(
    where: Situation, accelerator: AcceleratorSpec, devices: int, num_nodes: int, registry: Registry
) -> Choice:
    """The strategy for a situation: the accelerator's own wish first, then the best volunteer."""
    size = f"{devices} device(s) on {num_nodes} node(s)"
    volunteers = [o for o in registry.offers(StrategySpec.kind) if where in _spec(o).volunteers_for]
    wish = accelerator.strategies.get(where)
    if wish is not None:
        wished = registry.one(StrategySpec.kind, wish)
        lost = [(o.spec.name, f"{accelerator.name!r} wants another") for o in volunteers if o != wished]
        return choice_of_offer(wished, f"auto: {accelerator.name!r} wants it for {size}", tuple(lost))
    judged = [(offer, _why_unfit(offer, accelerator, devices * num_nodes)) for offer in volunteers]
    fitting = [offer for offer, why in judged if not why]
    unfit = [(offer.spec.name, why) for offer, why in judged if why]
    if not fitting:
        raise UnsupportedError(
            f"No installed strategy volunteers for {size} on {accelerator.name!r}. "
            f"Installed: {listing(o.spec.name for o in registry.offers(StrategySpec.kind))}."
            f"{situation_hint(where)}{_because(unfit)}"
        )
    best = max(_rank(offer, accelerator) for offer in fitting)
    chosen, *rivals = (offer for offer in fitting if _rank(offer, accelerator) == best)
    if rivals:
        raise undecided("strategy='auto'", [chosen, *rivals])
    lost = [(o.spec.name, "volunteers with a lower priority") for o in fitting if o is not chosen]
    return choice_of_offer(chosen, f"auto: volunteers for {size}", (*lost, *unfit))


def _why_unfit(offer: Offer, accelerator: AcceleratorSpec, total: int) -> str:
    spec, missing = _spec(offer), missing_requirements(offer.spec)
    if overlap(spec.rejects, accelerator):
        return f"cannot work with {accelerator.name!r}"
    if spec.max_devices is not None and total > spec.max_devices:
        return f"uses at most {spec.max_devices} device(s)"
    return f"needs {listing(missing)}" if missing else ""


def _because(unfit: list[tuple[str, str]]) -> str:
    return f" Passed over: {listing(f'{name} ({why})' for name, why in unfit)}." if unfit else ""


def check_strategy(choice: Choice, accelerator: AcceleratorSpec, devices: int, num_nodes: int) -> list[str]:
    """Refuse a strategy that cannot use the accelerator or the devices.

    Returns:
        Warnings: the pair is known to nobody.

    Raises:
        UnsupportedError: It cannot work.
    """
    spec = cast(StrategySpec, choice.spec)
    if overlap(spec.rejects, accelerator):
        raise UnsupportedError(
            f"The strategy {spec.name!r} cannot work with the accelerator {accelerator.name!r}: it rejects "
            f"{listing(spec.rejects)}. Choose another strategy (strategy='auto'), or another accelerator."
        )
    total = devices * num_nodes
    if spec.max_devices is not None and total > spec.max_devices:
        raise UnsupportedError(
            f"The strategy {spec.name!r} uses at most {spec.max_devices} device(s), but {devices} * {num_nodes} = "
            f"{total} were asked for (devices * num_nodes). Ask for fewer, or let strategy='auto' choose."
        )
    if accelerator.max_devices is not None and devices > accelerator.max_devices:
        raise UnsupportedError(
            f"The accelerator {accelerator.name!r} can use at most {accelerator.max_devices} device(s) in one job; "
            f"{devices} were asked for."
        )
    if vouching(spec, accelerator) is not None:
        return []
    pair = f"the strategy {spec.name!r} nor the accelerator {accelerator.name!r}"
    return [f"Neither {pair} says that they work together. It is tried."]


def vouching(strategy: StrategySpec, accelerator: AcceleratorSpec) -> PartSpec | None:
    """Which of the two says that they work together; ``None`` when neither does."""
    if "*" in strategy.supports or overlap(strategy.supports, accelerator):
        return strategy
    wishes = {wish.partition("@")[0].strip().lower() for wish in accelerator.strategies.values()}
    return accelerator if wishes & set(strategy.names) else None


def choose_launcher(
    asked: Any, strategy: Choice, request: Request, registry: Registry, processes: int, started: bool
) -> Choice | None:
    """The launcher; ``None`` when one process is enough, or something else has started them all."""
    if started or (processes == 1 and asked is None):
        return None
    wanted = cast(StrategySpec, strategy.spec).launcher if asked is None else asked
    if wanted is None:
        return None
    choice = asked_choice(LauncherSpec.kind, wanted, registry)
    if request.interactive and not cast(LauncherSpec, choice.spec).interactive:
        able = [o.spec.name for o in registry.offers(StrategySpec.kind) if _launches_anywhere(o, registry)]
        raise UnsupportedError(
            f"The strategy {strategy.name!r} starts its processes by running the script again, and here is no script "
            f"(a notebook or a prompt). Strategies that work here: {listing(able)}. Then: fabric.launch(function)."
        )
    reason = (
        f"plugins= names it ({wanted!r})"
        if asked is not None
        else f"{strategy.name!r} starts its processes so"
    )
    return Choice(choice.spec, choice.distribution, choice.version, reason, instance=choice.instance)


def _launches_anywhere(offer: Offer, registry: Registry) -> bool:
    launcher = _spec(offer).launcher
    return any(
        (launcher or "").lower() in o.spec.names and cast(LauncherSpec, o.spec).interactive
        for o in registry.offers(LauncherSpec.kind)
    )


def _spec(offer: Offer) -> StrategySpec:
    spec: Any = offer.spec
    return spec  # type: ignore[no-any-return]


def _rank(offer: Offer, accelerator: AcceleratorSpec) -> tuple[int, bool]:
    """Priority, and then: whoever vouches for the accelerator comes before whoever says nothing."""
    spec = _spec(offer)
    return spec.priority, "*" in spec.supports or overlap(spec.supports, accelerator)
