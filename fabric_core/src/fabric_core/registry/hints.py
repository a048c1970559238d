"""What to install for a name that is known but not there. The data file beside this module is all that it knows."""

from __future__ import annotations

from functools import cache
from typing import Any

from fabric_core.registry.discovery import installed_version


def install_hint(name: str) -> str:
    """A sentence that says which distribution offers a name, or nothing when nobody knows it."""
    for distribution, names in _known()["install"].items():
        if name.lower() in names:
            if installed_version(distribution) is None:
                return f"It comes with: pip install {distribution}."
            return f"It belongs to {distribution}, which is installed: see 'fabric doctor' for what is wrong with it."
    return ""


def situation_hint(situation: str) -> str:
    """A sentence that says what to install for a situation that no installed strategy volunteers for."""
    distribution = _known()["situations"].get(situation)
    missing = distribution is not None and installed_version(distribution) is None
    return f" Strategies for it come with: pip install {distribution}." if missing else ""


def accelerator_of_argument(name: str) -> str:
    """Which accelerator a deprecated constructor argument means."""
    return str(_known()["deprecated_arguments"][name])


@cache
def _known() -> dict[str, Any]:
    import json
    from importlib import resources

    text = resources.files("fabric_core.registry").joinpath("known_parts.json").read_text("utf-8")
    known: dict[str, Any] = json.loads(text)
    return known
