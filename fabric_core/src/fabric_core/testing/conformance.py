"""What the checks of every kind have in common: which part they are about, and what is known to deviate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest

from fabric_core.errors import FabricError, MissingRequirementError
from fabric_core.registry import Offer, default_registry
from fabric_core.testing.parts import made

OWN_PACKAGE = __name__.rpartition(".")[0]


def checks_of(cls: type) -> Iterator[str]:
    """The names of the kit's checks in a class."""
    for base in cls.__mro__:
        if _is_of_kit(base):
            yield from (name for name in vars(base) if name.startswith("test_"))


def _is_of_kit(cls: type) -> bool:
    return cls.__module__.startswith(f"{OWN_PACKAGE}.")


class Conformance:
    """Base of the conformance classes.

    A subclass states what it is about and what is special; it inherits every check. A check of the kit cannot be
    replaced: a subclass that defines one anew is refused when it is made, because it would pass in silence. What a part
    does otherwise, and why, is stated in `expected_failures`; once such a check passes, that is a failure too.

    Attributes:
        expected_failures: The reason for each check that is known to fail, by its name (``"test_x"``), or by that of
            one case (``"test_x[bf16-mixed]"``).
    """

    expected_failures: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def about(cls) -> dict[str, str]:
        """Kind, name, distribution and version of what the class is about, for the report."""
        raise NotImplementedError

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if _is_of_kit(cls):
            return
        checks = set(checks_of(cls))
        replaced = sorted(
            name for base in cls.__mro__ if not _is_of_kit(base) for name in checks & set(vars(base))
        )
        if replaced:
            raise TypeError(
                f"{cls.__qualname__} replaces {', '.join(replaced)} of the conformance kit. If the part deviates, say "
                f"so in expected_failures = {{{replaced[0]!r}: 'why'}}."
            )
        unknown = sorted(name for name in cls.expected_failures if name.partition("[")[0] not in checks)
        if unknown:
            raise TypeError(
                f"{cls.__qualname__} expects {', '.join(unknown)} to fail, which the kit does not have. It has: "
                f"{', '.join(sorted(checks))}."
            )
        unexplained = sorted(
            name for name, reason in cls.expected_failures.items() if not str(reason or "").strip()
        )
        if unexplained:
            raise TypeError(
                f"{cls.__qualname__} expects {', '.join(unexplained)} to fail, and does not say why."
            )


class PartConformance(Conformance):
    """Base of the classes that are about one installed part.

    Attributes:
        name: What users write: ``"name"``, or ``"name@distribution"``.
        options: What the part is built with, over the options of its spec.
        kind: Set by the kit.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def about(cls) -> dict[str, str]:
        """See `Conformance.about`. A part that is not there is told by the checks, not here."""
        about = {
            "kind": cls.kind,
            "name": getattr(cls, "name", ""),
            "distribution": "not installed",
            "version": "",
        }
        try:
            offer = cls.find()
        except FabricError:
            return about
        return about | {"distribution": offer.distribution, "version": offer.version}

    @classmethod
    def find(cls) -> Offer:
        """The part's spec, and the distribution that offers it."""
        return default_registry().one(cls.kind, cls.name)

    @property
    def offer(self) -> Offer:
        """The part's spec, and the distribution that offers it."""
        return self.find()

    @property
    def spec(self) -> Any:
        """The part's spec."""
        return self.offer.spec

    def make(self, **options: Any) -> Any:
        """The part, made as a plan would make it. Where a package that it requires is missing, the check is skipped.

        Args:
            options: Laid over those of the class.
        """
        try:
            return made(self.offer, {**self.options, **options})
        except MissingRequirementError as error:
            pytest.skip(str(error))
