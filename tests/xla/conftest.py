"""Tests of fabric-xla that do without torch_xla; those that need it are in ``tests/xla_engine``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
WHERE = {"package.py": "__init__.py", "runtime.py": "runtime.py", "xla_model.py": "core/xla_model.py"}
"""The files of the stand-in, and where they are in torch_xla."""


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a stand-in for torch_xla is installed."""
    folder = tmp_path_factory.mktemp("site")
    package = folder / "torch_xla"
    (package / "core").mkdir(parents=True)
    (package / "core" / "__init__.py").touch()
    for source, target in WHERE.items():
        shutil.copy(HERE / "stand_in" / source, package / target)
    info = folder / "torch_xla-2.9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_xla\nVersion: 2.9.0\n")
    return folder


@pytest.fixture
def torch_xla(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in, imported; it and what imported it is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(stand_in))
    before = set(sys.modules)
    import torch_xla

    yield torch_xla
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("torch_xla", "fabric_xla"):
            del sys.modules[name]
