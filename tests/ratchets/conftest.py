"""Numbers that do not depend on how busy the machine is, and may only become smaller; they are in numbers.toml."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NUMBERS = Path(__file__).with_name("numbers.toml")
Held = Callable[..., None]


@pytest.fixture
def numbers() -> dict[str, Any]:
    """All tables. Where Python or PyTorch is another than they were measured with, nothing is compared."""
    tables: dict[str, Any] = tomllib.loads(NUMBERS.read_text(encoding="utf-8"))
    here = {"python": f"{sys.version_info.major}.{sys.version_info.minor}", "torch": str(torch.__version__)}
    for name, version in tables.pop("measured-with").items():
        if not f"{here[name]}.".startswith(f"{version}."):
            pytest.skip(f"not run: numbers.toml was measured with {name} {version}, and this is {here[name]}")
    return tables


@pytest.fixture
def held(numbers: dict[str, Any]) -> Held:
    """Compare a number with the one in the tables: ``held(table, name, found, slack=0)``.

    ``slack`` is how far it may be from that, where it is not exactly the same each time.
    """

    def compare(table: str, name: str, found: float, slack: float = 0) -> None:
        known = numbers[table].get(name)
        where = f"[{table}] {name!r} of tests/ratchets/{NUMBERS.name}"
        assert known is not None, f"New: write {found:g} as {where}."
        assert found <= known + slack, (
            f"Worse by {found - known:g}: {where} is {known:g}, and now it is {found:g}. Find what it is spent on; "
            "if it has to be, write the new number there and say why."
        )
        assert found >= known - slack, (
            f"Better by {known - found:g}: tighten {where} from {known:g} to {found:g}."
        )

    return compare
