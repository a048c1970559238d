"""Ranks that decided differently say so, on every rank, before they could hang."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
from fabric_core import Fabric
with Fabric(strategy="ddp", precision="acme", devices=2) as fabric:
    print("sum", fabric.all_reduce(1, reduce_op="sum").item())
"""
HOOKS = """
from fabric_core import PrecisionSpec, hookimpl

@hookimpl
def fabric_precisions():
    yield PrecisionSpec("acme", "acme_plugin.precision:AcmePrecision")
"""
PRECISION = "from fabric_core import Precision\nclass AcmePrecision(Precision): ...\n"


@pytest.fixture
def site(tmp_path: Path) -> Callable[[str], Path]:
    """A folder with a plugin distribution ``acme`` in a given version."""

    def make(version: str) -> Path:
        folder = tmp_path / f"site-{version}"
        package, info = folder / "acme_plugin", folder / f"acme-{version}.dist-info"
        package.mkdir(parents=True, exist_ok=True)
        info.mkdir(exist_ok=True)
        (package / "__init__.py").write_text("")
        (package / "hooks.py").write_text(HOOKS)
        (package / "precision.py").write_text(PRECISION)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme\nVersion: {version}\n")
        (info / "entry_points.txt").write_text("[fabric_core.plugins]\nacme = acme_plugin.hooks\n")
        return folder

    return make


@pytest.fixture
def two_nodes(tmp_path: Path, clean_environ: dict[str, str]) -> Callable[..., list[Any]]:
    """Run the script as two ranks on two pretended nodes, each with packages of its own."""

    def run(*sites: Path) -> list[Any]:
        script = tmp_path / "train.py"
        script.write_text(SCRIPT)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        ranks = [
            subprocess.Popen(
                [sys.executable, str(script)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=clean_environ
                | {"PYTHONPATH": str(folder), "FABRIC_LAUNCHED": "1", "MASTER_ADDR": "127.0.0.1"}
                | {"MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
                | {"LOCAL_WORLD_SIZE": "2", "NODE_RANK": str(rank)},
            )
            for rank, folder in enumerate(sites)
        ]
        return [(*rank.communicate(timeout=60), rank.returncode) for rank in ranks]

    return run


def test_the_same_plugins_everywhere_work(
    site: Callable[[str], Path], two_nodes: Callable[..., list[Any]]
) -> None:
    for stdout, stderr, code in two_nodes(site("1.0"), site("1.0")):
        assert (stdout.split(), code) == (["sum", "2"], 0), stderr


def test_another_version_on_one_node_is_named_on_every_rank(
    site: Callable[[str], Path], two_nodes: Callable[..., list[Any]]
) -> None:
    for stdout, stderr, code in two_nodes(site("1.0"), site("1.1")):
        assert (stdout, code) == ("", 1)
        (line,) = (line for line in stderr.splitlines() if line.strip().startswith("precision:"))
        assert "rank 0 (node 0) has acme (from acme 1.0)" in line
        assert "rank 1 (node 1) has acme (from acme 1.1)" in line
        assert "PlanMismatchError" in stderr
