"""The parts that the flags name: which they may be, and whether they would take the options that are given for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fabric_core.errors import OptionsError
from fabric_core.registry import Registry
from fabric_core.specs import PartSpec

DECIDED_BY: Mapping[str, tuple[str, ...]] = {
    "accelerator": ("accelerator",),
    "strategy": ("strategy",),
    "precision": ("precision", "strategy", "accelerator"),
}
"""The kinds that flags name, and the flags that decide the part: one precision may be several parts, each made for a
strategy or an accelerator. What is not decided here, the script may decide."""


def is_named(flags: Mapping[str, str], kind: str) -> bool:
    """Whether a flag names a part, and does not leave the choice to us."""
    return flags.get(kind, "auto").strip().lower() != "auto"


def named_specs(flags: Mapping[str, str], kind: str, registry: Registry) -> Iterator[PartSpec]:
    """The specs of a kind that have the name of the flag; none when it has none, or is the path of a class.

    Raises:
        UnknownPluginError: No part has the name.
    """
    if is_named(flags, kind) and ":" not in flags[kind]:
        yield from (offer.spec for offer in registry.named(kind, flags[kind]))


def check_named(
    flags: Mapping[str, str], options: Mapping[str, Mapping[str, str]], registry: Registry
) -> None:
    """Know names and options before anything starts. What goes with what depends on what the script says too.

    Raises:
        UnknownPluginError: No part has a name.
        OptionsError: No part of a name takes the options that are given for it.
    """
    for kind in DECIDED_BY:
        specs = list(named_specs(flags, kind, registry))
        if specs and options.get(kind):
            _check_one_takes(specs, options[kind])


def _check_one_takes(specs: list[PartSpec], texts: Mapping[str, str]) -> None:
    from fabric_core.resolve.stated import check_texts

    refusals = []
    for spec in specs:
        try:
            check_texts(spec, texts)
        except OptionsError as error:
            refusals.append(error)
    if len(refusals) == len(specs):
        raise refusals[0]


def decided(
    flags: Mapping[str, str], options: Mapping[str, Mapping[str, str]]
) -> dict[str, Mapping[str, str]]:
    """The options of those parts that the flags alone decide."""
    return {
        kind: options[kind]
        for kind, needed in DECIDED_BY.items()
        if kind in options and all(is_named(flags, name) for name in needed)
    }
