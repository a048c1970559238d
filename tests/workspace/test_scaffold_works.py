"""What ``fabric plugins new`` makes works as it is made: its wheel builds, and passes its own tests where it is installed.

One fresh environment holds the core and a new plugin of each kind, all from wheels.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fabric_core.scaffold.kinds import WORDS

SCRIPTS = "Scripts" if os.name == "nt" else "bin"


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory, run: Callable[..., str]) -> dict[str, Path]:
    """A new plugin of each kind, by that kind."""
    folder = tmp_path_factory.mktemp("projects")
    fabric = Path(sys.executable).with_name("fabric")
    made = {}
    for kind in WORDS:
        run(fabric, "plugins", "new", kind, f"acme-{kind}", cwd=folder)
        made[kind] = folder / f"fabric-acme-{kind}"
    return made


@pytest.fixture(scope="module")
def built(
    projects: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, run: Callable[..., str]
) -> list[Path]:
    """Their wheels."""
    folder = tmp_path_factory.mktemp("built")
    for project in projects.values():
        run(
            *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, project),
            cwd=folder,
        )
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def environment(
    fresh: Callable[[str], Path], install: Callable[[list[Path], Path], None], built: list[Path]
) -> Path:
    """A fresh environment with the core, the kit and the new plugins."""
    folder = fresh("fabric-core[testing]")
    install(built, folder)
    return folder


def test_every_new_part_is_listed_and_usable(environment: Path, run: Callable[..., str]) -> None:
    listed = json.loads(run(environment / SCRIPTS / "fabric", "plugins", "list", "--json", cwd=environment))
    new = {part["kind"]: part["state"] for part in listed["parts"] if part["name"].startswith("acme-")}
    assert new == {kind.replace("-", " "): "ok" for kind in WORDS}


@pytest.mark.parametrize("kind", WORDS)
def test_a_new_plugin_passes_its_own_tests(
    kind: str, projects: dict[str, Path], environment: Path, run: Callable[..., str]
) -> None:
    printed = run(
        *(environment / SCRIPTS / "python", "-m", "pytest", "-p", "no:cacheprovider"),
        cwd=projects[kind],
        OMP_NUM_THREADS="1",
    )
    print(printed)
    assert re.search(r"^=+ \d+ passed", printed, re.MULTILINE), printed
    report = json.loads((projects[kind] / "fabric-conformance.json").read_text(encoding="utf-8"))
    assert report["plugins"] == {f"fabric-acme-{kind}": "0.1.0"}
    assert kind.replace("-", " ") in {result["kind"] for result in report["results"]}
