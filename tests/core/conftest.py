"""What the tests of the core share: installed distributions that are generated, and commands that are run for real."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from outside import outside_of_jobs

from fabric_core import Plan, Registry, Request, hookimpl, hooks
from fabric_core.registry import default_registry
from fabric_core.resolve import resolve

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
            metadata = (
                f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n\nName: not this one\n"
            )
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

    def install_strategy(
        self, distribution: str, name: str, *, before: str = "", version: str = "1.0"
    ) -> None:
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
    return outside_of_jobs("PYTHON")


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


HOOK_OF = {
    "accelerator": "fabric_accelerators",
    "strategy": "fabric_strategies",
    "precision": "fabric_precisions",
    "cluster environment": "fabric_cluster_environments",
    "launcher": "fabric_launchers",
    "checkpoint io": "fabric_checkpoint_ios",
    "logger": "fabric_loggers",
    "command": "fabric_cli_commands",
}


class Shelf(Registry):
    """A registry that finds nothing installed: it holds the core's own parts and what a test puts on it."""

    def __init__(self) -> None:
        super().__init__(environ={}, find=list)
        self.register(hooks, distribution="fabric-core", version="1")

    def put(self, distribution: str, *specs: Any, check: Callable[..., Any] | None = None) -> Shelf:
        """Offer specs of any kinds, and perhaps a check of plans, in the name of a distribution."""
        by_hook: dict[str, list[Any]] = {}
        for spec in specs:
            by_hook.setdefault(HOOK_OF[spec.kind], []).append(spec)
        functions = {hook: hookimpl(lambda found=found: found) for hook, found in by_hook.items()}
        if check is not None:
            functions["fabric_check_plan"] = hookimpl(check)
        self.register(SimpleNamespace(**functions), distribution=distribution, version="1")
        return self

    def plan(self, environ: dict[str, str] | None = None, **flags: Any) -> Plan:
        """Resolve some flags of a ``Fabric``."""
        return resolve(Request(**flags, environ=environ or {}), self)


@pytest.fixture
def shelf() -> Shelf:
    """A registry with the core's own parts and nothing else."""
    return Shelf()


@pytest.fixture
def core_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """The registry that a ``Fabric`` uses, with nothing in it but the core's own parts."""
    monkeypatch.setenv("FABRIC_PLUGINS_AUTOLOAD", "0")
    default_registry.cache_clear()
    yield default_registry()
    default_registry.cache_clear()


def least(measure: Callable[[], float], limit: float, tries: int = 25) -> float:
    """The least of several measurements in seconds; it stops at the first below the limit.

    What else happens on the machine only ever adds to a measurement.
    """
    found = measure()
    while found >= limit and (tries := tries - 1):
        found = min(found, measure())
    return found


@pytest.fixture(name="least")
def _least() -> Callable[[Callable[[], float], float], float]:
    """`least`, for tests, which cannot import from here."""
    return least
