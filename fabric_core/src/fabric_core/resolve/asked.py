"""Every way to ask for a part, turned into a choice: instance, class, path, name, ``name@distribution``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from fabric_core.contract_versions import CURRENT, check_spoken
from fabric_core.contracts.part import Part
from fabric_core.errors import (
    AmbiguousPluginError,
    ConfigurationError,
    MissingRequirementError,
    WrongTypeError,
    listing,
)
from fabric_core.plan import Choice
from fabric_core.registry import Offer, Registry
from fabric_core.requirements import missing_requirements
from fabric_core.specs import SPEC_TYPES, AcceleratorSpec, Inventory, LoggerSpec, PartSpec
from fabric_core.targets import import_target

IN_CODE = "passed in code"


def is_name(asked: Any) -> bool:
    """Whether a part was asked for by a name that the registry has to know."""
    return isinstance(asked, str) and ":" not in asked


def choice_of_object(kind: str, asked: Any) -> Choice:
    """The choice for an instance, a class, or the path of a class.

    Raises:
        WrongTypeError: It is no part, or one of another kind.
    """
    if isinstance(asked, str):
        asked = import_target(asked, f"{kind}={asked!r}")
    cls = asked if isinstance(asked, type) else type(asked)
    found = kind_of_class(cls)
    if found != kind:
        what = f"a {found}" if found else "no part of this library"
        raise WrongTypeError(
            f"{kind}={asked!r} cannot be used: {cls.__qualname__} is {what}. Pass a name, or a class or instance "
            f"derived from the contract of a {kind}."
        )
    instance = None if isinstance(asked, type) else asked
    form = "the class" if instance is None else "the instance"
    return Choice(
        spec_of_class(kind, cls), IN_CODE, "", f"{form} {cls.__qualname__} was passed", instance=instance
    )


def kind_of_class(cls: type) -> str | None:
    """Which kind of part a class is; ``None`` when it is none."""
    return cls.spec_type.kind if issubclass(cls, Part) else None


def spec_of_class(kind: str, cls: type) -> PartSpec:
    """The spec that a class carries or inherits, or one that claims nothing but the current contract.

    What derives from a part works where that part works: it keeps the promises, and answers to the names as well. Its
    constructor is its own, and so are its options.
    """
    carried = getattr(cls, "spec", None)
    if isinstance(carried, PartSpec) and carried.kind == kind:
        if "spec" in vars(cls):
            return replace(carried, target=cls, options={})
        aliases = (carried.name, *carried.aliases)
        return replace(carried, name=cls.__name__, aliases=aliases, target=cls, options={}, options_type=None)
    spec_type = next(spec for spec in SPEC_TYPES if spec.kind == kind)
    if spec_type is AcceleratorSpec:
        return AcceleratorSpec(cls.__name__, cls, probe=_unprobed, api=CURRENT[kind])
    return spec_type(cls.__name__, cls, api=CURRENT[kind])


def _unprobed() -> Inventory:
    """An accelerator that was passed in code, without a spec: whoever passed it knows that one device is there."""
    return Inventory(indices=(0,), note="passed in code without a probe")


def choice_of_offer(offer: Offer, reason: str, lost: tuple[tuple[str, str], ...] = ()) -> Choice:
    """The choice for something that the registry offers."""
    return Choice(offer.spec, offer.distribution, offer.version, reason, lost)


def asked_choice(kind: str, asked: Any, registry: Registry) -> Choice:
    """The choice for whatever form a part was asked for in."""
    if is_name(asked):
        return choice_of_offer(registry.one(kind, asked), f"{kind}={asked!r} was asked for")
    return choice_of_object(kind, asked)


def overlap(names: Iterable[str], accelerator: AcceleratorSpec) -> bool:
    """Whether a list of names and groups, such as a strategy's ``rejects``, means an accelerator."""
    own = {*accelerator.names, *(group.lower() for group in accelerator.groups)}
    return any(name.lower() in own for name in names)


def undecided(what: str, offers: list[Offer]) -> AmbiguousPluginError:
    """The error for a choice that is left to us, and that no priority decides."""
    return AmbiguousPluginError(
        f"{what} cannot choose between {listing(offer.full_name for offer in offers)}: each would do, and none has a "
        "higher priority. Name one of them, or block the distribution of another with FABRIC_PLUGINS_DENY."
    )


def check_usable(choice: Choice) -> None:
    """Refuse a part that was written for another contract, or whose requirements are not met.

    Raises:
        ContractVersionError: The core does not speak the part's version of the contract.
        MissingRequirementError: A required package is missing or too old.
    """
    spec = choice.spec
    check_spoken(spec, choice.identity)
    missing = missing_requirements(spec)
    if missing:
        wanted = " ".join(repr(requirement) for requirement in missing)
        raise MissingRequirementError(
            f"The {choice.kind} {choice.identity} needs {listing(missing)}, which is not installed. "
            f"Install it: pip install {wanted}"
        )


def sort_plugins(plugins: tuple[Any, ...], registry: Registry) -> dict[str, Any]:
    """Which kind of part each of ``plugins=[…]`` is.

    Returns:
        What was passed, by kind.

    Raises:
        ConfigurationError: Two of a kind, or a name that parts of several kinds have.
        UnknownPluginError: A name that no part has.
        WrongTypeError: Something that is no part.
    """
    by_kind: dict[str, Any] = {}
    for asked in plugins:
        kind = _kind_of_plugin(asked, registry)
        if kind in by_kind:
            raise ConfigurationError(
                f"plugins= holds two parts of the kind {kind}: {by_kind[kind]!r} and {asked!r}. Keep one."
            )
        by_kind[kind] = asked
    return by_kind


PLUGIN_KINDS = ("precision", "cluster environment", "checkpoint io", "launcher")


def _kind_of_plugin(asked: Any, registry: Registry) -> str:
    if is_name(asked):
        return _kind_of_name(asked, registry)
    if isinstance(asked, str):
        asked = import_target(asked, f"plugins={asked!r}")
    kind = kind_of_class(asked if isinstance(asked, type) else type(asked))
    if kind not in PLUGIN_KINDS:
        raise WrongTypeError(
            f"plugins= takes parts of the kinds {listing(PLUGIN_KINDS)}; {asked!r} is none of them."
        )
    return kind


def _kind_of_name(name: str, registry: Registry) -> str:
    kinds = {offer.spec.kind for offer in registry.named(PLUGIN_KINDS, name)}
    if len(kinds) > 1:
        raise ConfigurationError(
            f"plugins={name!r} could be a {' or a '.join(sorted(kinds))}. Pass the class instead."
        )
    return kinds.pop()


def logger_choice(asked: Any, registry: Registry) -> Choice:
    """The choice for a logger: a name, a part, or any object that has ``log_metrics``."""
    if isinstance(asked, str) or kind_of_class(asked if isinstance(asked, type) else type(asked)):
        return asked_choice(LoggerSpec.kind, asked, registry)
    if callable(getattr(asked, "log_metrics", None)):
        spec = LoggerSpec(type(asked).__name__, type(asked), api=CURRENT[LoggerSpec.kind])
        return Choice(spec, IN_CODE, "", "the object was passed", instance=asked)
    raise WrongTypeError(
        f"loggers={asked!r} cannot be used: a logger needs a method log_metrics(metrics, step)."
    )
