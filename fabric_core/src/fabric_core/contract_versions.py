"""Which versions of each kind's contract this core speaks, and the adapters for those that it has moved on from.

A spec states as ``api`` the version that its class was written for. A class of an older version is adapted when the
part is made, step by step (`adapted`); one of a version that is not spoken is refused before it is imported
(`check_spoken`). What is a new version, and what is none, is told in ``docs/plugins/compatibility.md``.
"""

from __future__ import annotations

import copyreg
import functools
from abc import ABCMeta
from typing import Any

from fabric_core import __version__
from fabric_core.errors import ContractVersionError
from fabric_core.specs import PartSpec
from fabric_core.targets import import_target

__all__ = [
    "ADAPTERS",
    "CURRENT",
    "adapt_instance",
    "adapted",
    "check_spoken",
    "is_spoken",
    "oldest",
    "spoken",
]

CURRENT: dict[str, int] = {
    "accelerator": 1,
    "strategy": 1,
    "precision": 1,
    "cluster environment": 1,
    "launcher": 1,
    "checkpoint io": 1,
    "logger": 1,
}
"""The version of each kind's contract that the classes in ``fabric_core.contracts`` are."""

ADAPTERS: dict[tuple[str, int], str] = {}
"""For a kind and a version n: ``"package.module:adapter"``, a function that takes a class written for version n and
returns a subclass of it that keeps version n + 1. It is imported when a part needs it."""


def oldest(kind: str) -> int:
    """The oldest version that is still spoken: from there on, there is an adapter for every step to the current one."""
    version = CURRENT[kind]
    while (kind, version - 1) in ADAPTERS:
        version -= 1
    return version


def spoken(kind: str) -> str:
    """The versions that are spoken, in words: ``version 1``, or ``versions 1 to 3``."""
    first, last = oldest(kind), CURRENT[kind]
    return f"version {last}" if first == last else f"versions {first} to {last}"


def is_spoken(spec: PartSpec) -> bool:
    """Whether this core can use a part, as far as the version of its contract is concerned."""
    return oldest(spec.kind) <= spec.api <= CURRENT[spec.kind]


def check_spoken(spec: PartSpec, identity: str) -> None:
    """Refuse a part whose version of the contract is not spoken.

    Args:
        spec: The part's description.
        identity: Its name, distribution and version, for the message.

    Raises:
        ContractVersionError: The part is newer than this core, or too old for it.
    """
    if is_spoken(spec):
        return
    if spec.api > CURRENT[spec.kind]:
        advice = "Upgrade the core (pip install --upgrade fabric-core), or use an older version of the part."
    else:
        advice = "Use a newer version of the part, or an older fabric-core."
    raise ContractVersionError(
        f"The {spec.kind} {identity} is written for version {spec.api} of its contract; this core, fabric-core "
        f"{__version__}, speaks {spoken(spec.kind)}. {advice}"
    )


def adapted(cls: type, kind: str, api: int) -> type:
    """The class itself when it is of the current version; else a subclass of it that keeps the current version.

    Args:
        cls: A part's class.
        kind: Its kind.
        api: The version that it was written for; one that is spoken.

    Raises:
        BrokenPluginError: An adapter cannot be imported.
    """
    steps = tuple(ADAPTERS[kind, version] for version in range(api, CURRENT[kind]))
    return _through(cls, steps) if steps else cls


def adapt_instance(part: Any, kind: str, api: int) -> None:
    """Let an object that was made already keep the current version, in place.

    Raises:
        ContractVersionError: Its type cannot be changed, because it has ``__slots__`` or the like.
    """
    cls = type(part)
    if isinstance(cls, _Adapted):
        return
    try:
        part.__class__ = adapted(cls, kind, api)
    except TypeError as error:
        raise ContractVersionError(
            f"The {kind} {cls.__qualname__} is written for version {api} of its contract, and an instance of it cannot "
            f"be adapted to version {CURRENT[kind]} ({error}). Pass the class, or its name, in place of an instance."
        ) from error


class _Adapted(ABCMeta):
    """The type of adapted classes. They have no module of their own in which ``pickle`` could find them."""

    origin: type
    steps: tuple[str, ...]


@functools.cache
def _through(cls: type, steps: tuple[str, ...]) -> type:
    """A class, sent through some adapters."""
    made: Any = cls
    for step in steps:
        made = import_target(step, "the adapter of contracts")(made)
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return _Adapted(cls.__name__, (made,), {**named, "origin": cls, "steps": steps})


def _reduce(cls: _Adapted) -> tuple[Any, ...]:
    return _through, (cls.origin, cls.steps)


copyreg.pickle(_Adapted, _reduce)
