"""Importing what a spec points to: ``"package.module:attribute"``."""

from __future__ import annotations

import sys
from typing import Any

from fabric_core.errors import BrokenPluginError, ConfigurationError

__all__ = ["import_target"]


def import_target(target: Any, asked_by: str) -> Any:
    """The object that a target names; a target that is an object already is returned as it is.

    Args:
        target: ``"package.module:attribute"``, or the object itself.
        asked_by: Who needs it, for the message.

    Raises:
        ConfigurationError: The text is no such path.
        BrokenPluginError: The module cannot be imported, or has no such attribute. The cause is chained.
    """
    if not isinstance(target, str):
        return target
    module_name, colon, attribute = target.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigurationError(
            f"{target!r}, named by {asked_by}, is not of the form 'package.module:Name'."
        )
    try:
        __import__(
            module_name
        )  # in C; importlib's own function is four calls of Python for a module that is there
        found: Any = sys.modules[module_name]
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise BrokenPluginError(
            f"{asked_by} cannot be loaded from {target!r}: {type(error).__name__}: {error}"
        ) from error
    return found
