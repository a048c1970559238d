"""A Fabric on one process: a fixture for files whose ``fabric`` is not the command of that name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fabric_core import Fabric


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    """Closed at the end of the test."""
    with Fabric(accelerator="cpu") as fabric:
        yield fabric
