"""What the tests of the core share: installed distributions that are generated, and commands that are run for real."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fabric_core import Registry

OURS = ("FABRIC_", "RANK", "LOCAL_", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_", "TORCHELASTIC_", "PYTHON")


STRATEGY_HOOKS = """
from fabric_core import StrategySpec, hookimpl

@hookimpl
def fabric_strategies():
    yield StrategySpec({name!r}, "package.module:Class")
"""


def module_of(distribution: str) -> str:
    """The import name of a generated distribution."""
    return distribution.replace("-", "_").lower()


class Site:
    """A folder on the import path into which distributions are installed, as pip would lay them down.

    Attributes:
        folder: Where they go; other folders can be named one by one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: set[str] = set()

    def install(
        self,
        distribution: str,
        hooks: str | None = None,
        *,
        version: str = "1.0",
        entry_points: str | bytes | None = None,
        metadata: str | None = None,
        folder: Path | None = None,
        files: dict[str, str] | None = None,
    ) -> Path:
        """Lay down one distribution.

        Args:
            distribution: Its name.
            hooks: The code of its hooks module; ``None`` when it is no plugin.
            version: Its version.
            entry_points: The text of ``entry_points.txt`` (default: what names the hooks module).
            metadata: The text of ``METADATA`` (default: a proper one); empty for no such file.
            folder: Where, if not in the site's own folder.
            files: Further modules of its package, by file name.

        Returns:
            The folder that it went to.
        """
        folder = folder or self.folder
        module = module_of(distribution)
        info = folder / f"{module}-{version}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        if metadata is None:
            metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n\nName: not this one\n"
        if metadata:
            (info / "METADATA").write_text(metadata, encoding="utf-8")
        if entry_points is None and hooks is not None:
            entry_points = f"[console_scripts]\nx = y:z\n\n[fabric_core.plugins]\nmain = {module}.hooks\n"
        if entry_points is not None:
            raw = entry_points if isinstance(entry_points, bytes) else entry_points.encode()
            (info / "entry_points.txt").write_bytes(raw)
        if hooks is not None:
            self._write(folder / module, {"__init__.py": "", "hooks.py": hooks, **(files or {})})
        self.modules.add(module)
        return folder

    def install_strategy(self, distribution: str, name: str, *, before: str = "", version: str = "1.0") -> None:
        """Lay down a plugin that offers one strategy, and runs some code ``before`` that when it is imported."""
        self.install(distribution, f"{before}\n{STRATEGY_HOOKS.format(name=name)}", version=version)

    def _write(self, package: Path, files: dict[str, str]) -> None:
        package.mkdir(exist_ok=True)
        for name, code in files.items():
            (package / name).write_text(textwrap.dedent(code), encoding="utf-8")

    def uninstall(self, distribution: str) -> None:
        """Take the metadata of a distribution away, as far as discovery is concerned."""
        for info in self.folder.glob(f"{module_of(distribution)}-*.dist-info"):
            for file in info.iterdir():
                file.unlink()
            info.rmdir()

    def registry(self, **environ: str) -> Registry:
        """A new registry of everything that is installed, ours and generated."""
        return Registry(environ=environ)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """An empty site folder in front of the import path; what was imported from it is forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    site = Site(folder)
    yield site
    for name in list(sys.modules):
        if name.partition(".")[0] in site.modules:
            del sys.modules[name]


@pytest.fixture
def clean_environ() -> dict[str, str]:
    """The environment variables without those that a launcher, a test or a user of ours may have set."""
    return {name: value for name, value in os.environ.items() if not name.startswith(OURS)}


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def python(clean_environ: dict[str, str], tmp_path: Path) -> Run:
    """Run the interpreter with some arguments, in the test's folder."""

    def run(
        *arguments: str, env: dict[str, str] | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env=clean_environ | (env or {}),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    return run


@pytest.fixture
def fabric(clean_environ: dict[str, str], tmp_path: Path) -> Run:
    """Run the installed command ``fabric`` with some arguments, in the test's folder."""
    command = Path(sys.executable).with_name("fabric")

    def run(
        *arguments: str, env: dict[str, str] | None = None, timeout: float = 60, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(command), *arguments],
            env=clean_environ | (env or {}),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            input=stdin or "",
        )

    return run
