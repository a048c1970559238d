"""What the parts of every kind have in common."""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar

from fabric_core.specs import PartSpec

__all__ = ["Part"]


class Part(ABC):
    """Base of every contract.

    A class that users may also pass themselves, as an instance or a class, carries its spec, so that it meets the
    same checks as a name would. Without one, it counts as a part that makes no claims.
    """

    spec_type: ClassVar[type[PartSpec]]
    """The type of spec that describes this kind of part. Set by the contract, not by plugins."""

    spec: ClassVar[Any] = None
    """This class's own spec (of ``spec_type``), or ``None``."""

    def teardown(self) -> None:
        """Give back what the part holds. Called on every rank by ``Fabric.close``; must be safe to call twice."""
