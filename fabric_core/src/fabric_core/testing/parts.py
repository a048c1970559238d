"""Parts by name, made as a plan would make them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fabric_core.build import make
from fabric_core.registry import Offer, default_registry
from fabric_core.resolve.asked import check_usable, choice_of_offer
from fabric_core.resolve.options import with_options


def made(offer: Offer, options: Mapping[str, Any]) -> Any:
    """The object of an offer. Its requirements are looked at, and its options checked.

    Args:
        offer: What the registry has found.
        options: Laid over those of the spec.
    """
    choice = with_options(choice_of_offer(offer, "the kit asks"), options)
    check_usable(choice)
    return make(choice)


def part_of(kind: str, name: str, options: Mapping[str, Any]) -> Any:
    """What a user passes for a part: its name, or an object where it is to have options."""
    return made(default_registry().one(kind, name), options) if options else name
