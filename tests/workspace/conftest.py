"""What the tests of the workspace share: where it is, and what each distribution says of itself."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCRIPTS = "Scripts" if os.name == "nt" else "bin"
NOT_OURS = ("build", "dist", "__pycache__")
HIDDEN_AND_OURS = (".ci", ".github")
DISTRIBUTIONS = ("fabric_core", "fabric_backends", "fabric_cuda", "fabric_xla", "fabric_deepspeed")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for ``distribution`` runs once for each of the five, by its import name."""
    if "distribution" in metafunc.fixturenames:
        metafunc.parametrize("distribution", DISTRIBUTIONS)


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the workspace."""
    return Path(__file__).parents[2]


@pytest.fixture(scope="session")
def settings(root: Path) -> dict[str, Any]:
    """The workspace's pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def manifests(root: Path) -> dict[str, dict[str, Any]]:
    """Each distribution's pyproject.toml, by import name."""
    return {
        name: tomllib.loads((root / name / "pyproject.toml").read_text(encoding="utf-8"))
        for name in DISTRIBUTIONS
    }


@pytest.fixture(scope="session")
def files(root: Path) -> list[Path]:
    """Every file that belongs to the repository, also where there is no git to ask."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=root, capture_output=True, check=True, timeout=60).stdout
    except (OSError, subprocess.CalledProcessError):
        return walk(root)
    return [path for name in listed.decode().split("\0") if name and (path := root / name).is_file()]


def walk(folder: Path) -> list[Path]:
    """The files below a folder, without environments, caches and build results."""
    found: list[Path] = []
    for name, folders, names in os.walk(folder):
        folders[:] = [
            f for f in folders if f in (".ci", ".github") or not (f in NOT_OURS or f.startswith("."))
        ]
        found += [Path(name, file) for file in names]
    return found


def _run(*command: str | Path, cwd: Path, timeout: float = 100, **variables: str) -> str:
    """Run a command without the variables that would show it our sources, and give back what it printed."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environ.update(variables)
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environ, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def wheels(
    root: Path, manifests: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The five wheels, built here, by import name."""
    folder = tmp_path_factory.mktemp("wheels")
    built = {}
    for name in manifests:
        before = set(folder.iterdir())
        _run(
            *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, root / name),
            cwd=folder,
        )
        (built[name],) = set(folder.iterdir()) - before
    return built


@pytest.fixture(scope="session", name="run")
def _give_run() -> Callable[..., str]:
    """`_run`, for tests, which cannot import from here."""
    return _run


@pytest.fixture(scope="session")
def fresh(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the folder of a fresh environment with a wheel of ours and what it declares to depend on, and nothing else.

    It is asked for as pip would be, such as ``"fabric-core[testing]"``. The dependencies are those of the environment
    that runs the tests, by links: PyTorch is too large to be installed again.
    """

    def make(requirement: str) -> Path:
        folder = tmp_path_factory.mktemp(f"alone-{Requirement(requirement).name}")
        venv.create(folder, symlinks=os.name != "nt", with_pip=False)
        python = folder / SCRIPTS / "python"
        needed = closure(requirement)
        dependencies = folder / "dependencies"
        dependencies.mkdir()
        for path in {path for name in needed if not name.startswith("fabric-") for path in places_of(name)}:
            (dependencies / path.name).symlink_to(path)
        site = _run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder)
        Path(site.strip(), "dependencies.pth").write_text(f"{dependencies}\n", encoding="utf-8")
        install([wheel for name, wheel in wheels.items() if name.replace("_", "-") in needed], folder)
        return folder

    return make


def install(ours: list[Path], environment: Path) -> None:
    """Install wheels into an environment, and nothing that they depend on."""
    _run(
        *(sys.executable, "-m", "pip", "--python", environment / SCRIPTS / "python"),
        *("--disable-pip-version-check", "install", "--no-index", "--no-deps", *ours),
        cwd=environment,
    )


@pytest.fixture(scope="session", name="install")
def _give_install() -> Callable[[list[Path], Path], None]:
    """`install`, for tests, which cannot import from here."""
    return install


@pytest.fixture(scope="session")
def alone(fresh: Callable[[str], Path]) -> Callable[[str], Path]:
    """As `fresh`, by import name; the same folder for all who ask for it, so that nothing may be changed in it."""

    @functools.cache
    def make(distribution: str) -> Path:
        return fresh(distribution.replace("_", "-"))

    return make


def closure(text: str) -> set[str]:
    """The distributions that one needs, itself included, by normalised name, as their metadata says.

    Args:
        text: Its name, perhaps with extras in brackets.
    """
    asked = Requirement(text)
    found: set[str] = set()
    waiting = [(asked.name, frozenset(asked.extras))]
    while waiting:
        name, extras = waiting.pop()
        name = canonicalize_name(name)
        if name in found and not extras:
            continue
        found.add(name)
        for text in importlib.metadata.requires(name) or ():
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                waiting.append((requirement.name, frozenset(requirement.extras)))
    return found


def places_of(name: str) -> set[Path]:
    """The files and folders in site-packages that a distribution consists of."""
    distribution = importlib.metadata.distribution(name)
    site = Path(str(distribution.locate_file("")))
    tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
    return {site / top for top in tops}
