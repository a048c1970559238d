"""The packages that compute in few bits. Each is imported when its precision is built, and not before."""

from __future__ import annotations

import importlib
from typing import Any

from fabric_core.errors import MissingRequirementError
from fabric_core.specs import PrecisionSpec


def package(name: str, spec: PrecisionSpec) -> Any:
    """A module of the package that a precision needs.

    Raises:
        MissingRequirementError: It is not installed, or cannot be imported; the cause is chained.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        wanted = " ".join(map(repr, spec.requires))
        raise MissingRequirementError(
            f"The precision {spec.name!r} needs {name!r}, which cannot be imported: {error}. Install it: pip install "
            f"{wanted}"
        ) from error
