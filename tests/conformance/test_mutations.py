"""Faults, planted one at a time in plugins that are right: each is caught, by a check whose name says what is wrong.

The plugins are those that ``fabric plugins new`` makes. Each is built as a wheel and unpacked, which is an installed
distribution for whoever has the folder on ``PYTHONPATH``; a fault changes one text in a copy of that folder. The faults
are in ``faults/*.toml``, one file per plugin.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent / "faults"
AT_ONCE = 3  # some only wait
ENVIRON = {
    "OMP_NUM_THREADS": "1",
    **os.environ,
}  # of now, because pytest changes it while threads would read it
ASSERTED = ("AssertionError", "assert ", "Failed: ")
"""How the message of a check begins that failed by itself, and not because something else could not go on."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        plugin: The file that holds the fault, which says what plugin it is planted in.
        what: What is wrong.
        file: Where, in the package; or in its metadata, when it begins with ``dist-info/``.
        old, new: The text that is right, there exactly once, and the one that is not.
        caught_by: The check that has to fail.
        saying: What is found in the message of its failure, as a regular expression.
    """

    plugin: str
    what: str
    file: str
    old: str
    new: str
    caught_by: str
    saying: str


@dataclass(frozen=True)
class Plugin:
    """A plugin without fault.

    Attributes:
        name: Of its file.
        kind: As ``fabric plugins new`` is told.
        replaced: Files of the project that are not as they were made, and what each is replaced by, beside this file.
        skipped: Checks that have nothing to look at without the fault.
        faults: What may be planted.
    """

    name: str
    kind: str
    replaced: dict[str, str]
    skipped: list[str]
    faults: tuple[Fault, ...]

    @property
    def checks(self) -> tuple[str, ...]:
        """Those that the faults need."""
        return tuple(dict.fromkeys(fault.caught_by for fault in self.faults))


def read(path: Path) -> Plugin:
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    faults = tuple(Fault(path.stem, **fault) for fault in data["fault"])
    return Plugin(path.stem, data["kind"], data.get("replaced", {}), data.get("skipped", []), faults)


PLUGINS = {path.stem: read(path) for path in sorted(FOLDER.glob("*.toml"))}
FAULTS = [fault for plugin in PLUGINS.values() for fault in plugin.faults]


class Workshop:
    """Makes the plugins, plants the faults, and runs checks, a few at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = ThreadPoolExecutor(AT_ONCE)
        self._made = {name: self.pool.submit(self._make, plugin) for name, plugin in PLUGINS.items()}
        self._runs: dict[int, Future[list[Any]]] = {}

    def begin(self, wanted: list[Plugin | Fault]) -> None:
        """Run what will be asked for."""
        for each in wanted:
            run = self._run_plain if isinstance(each, Plugin) else self._run_planted
            self._runs[id(each)] = self.pool.submit(run, each)

    def found(self, wanted: Plugin | Fault) -> list[Any]:
        """What the kit reports of a plugin as it was made, or with a fault."""
        return self._runs[id(wanted)].result()

    def _make(self, plugin: Plugin) -> Path:
        """A folder with the tests of a plugin and, under ``site``, the plugin as it is installed."""
        project = self.folder / plugin.name / "project"
        call("-m", "fabric_core", "plugins", "new", plugin.kind, "sample", f"--dir={project}")
        for name, source in plugin.replaced.items():
            shutil.copy(FOLDER / source, project / name)
        call("-c", "import sys, hatchling.build; hatchling.build.build_wheel(sys.argv[1])", "..", cwd=project)
        (wheel,) = project.parent.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(project / "site")
        return project

    def _run_plain(self, plugin: Plugin) -> list[Any]:
        return run_checks(self._made[plugin.name].result(), plugin.checks)

    def _run_planted(self, fault: Fault) -> list[Any]:
        project = self.folder / fault.plugin / f"with-fault-{FAULTS.index(fault)}"
        shutil.copytree(
            self._made[fault.plugin].result(), project, ignore=shutil.ignore_patterns("__pycache__", "src")
        )
        place = re.sub("^dist-info/", "../fabric_sample-0.1.0.dist-info/", fault.file)
        path = project / "site" / "fabric_sample" / place
        text = path.read_text(encoding="utf-8")
        assert text.count(fault.old) == 1, f"{fault.old!r} is {text.count(fault.old)} times in {fault.file}"
        planted = text.replace(fault.old, fault.new)
        if path.suffix == ".py":
            compile(planted, path, "exec")  # a fault of the plugin, not of its syntax
        path.write_text(planted, encoding="utf-8")
        return run_checks(project, (fault.caught_by,))


def run_checks(project: Path, checks: tuple[str, ...]) -> list[Any]:
    """Run some checks in a fresh process.

    Returns:
        The entries of the kit's report.
    """
    report = project / "report.json"
    call(
        *("-m", "pytest", "-q", "--no-header", "-pno:cacheprovider"),
        *(f"--fabric-conformance={report}", f"-k={' or '.join(checks)}"),
        cwd=project,
        expect=(0, 1),
        PYTHONPATH=str(project / "site"),
    )
    return list(json.loads(report.read_text())["results"])


def call(*words: str, cwd: Path | None = None, expect: tuple[int, ...] = (0,), **variables: str) -> None:
    ended = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**ENVIRON, **variables},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ended.returncode in expect, (
        f"{words} ended with {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
    )


@pytest.fixture(scope="module")
def workshop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    workshop = Workshop(tmp_path_factory.mktemp("mutations"))
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    workshop.begin([spec.params["planted"] for spec in parameters if spec and "planted" in spec.params])
    yield workshop
    workshop.pool.shutdown(cancel_futures=True)


def title(planted: Plugin | Fault) -> str:
    return planted.name if isinstance(planted, Plugin) else f"{planted.plugin}: {planted.what}"


@pytest.mark.parametrize("planted", PLUGINS.values(), ids=title)
def test_a_plugin_without_fault_passes_every_check_that_catches_one(
    planted: Plugin, workshop: Workshop
) -> None:
    found = {entry["test"]: entry["outcome"] for entry in workshop.found(planted)}
    not_passed = {check: found.get(check, "not there") for check in planted.checks}
    not_passed = {check: outcome for check, outcome in not_passed.items() if outcome != "passed"}
    assert not_passed.keys() <= set(planted.skipped), not_passed


@pytest.mark.parametrize("planted", FAULTS, ids=title)
def test_a_fault_is_caught_by_the_check_that_is_about_it(planted: Fault, workshop: Workshop) -> None:
    check = planted.caught_by
    entries = [entry for entry in workshop.found(planted) if entry["test"] == check]
    assert [entry["outcome"] for entry in entries] == ["failed"], f"{check} does not fail"
    message = entries[0]["reason"]
    assert message.startswith(ASSERTED), f"{check} fails, but not by its own judgement: {message}"
    assert re.search(planted.saying, message), f"the message does not say {planted.saying!r}: {message}"


def test_every_kind_of_part_has_faults() -> None:
    from fabric_core.specs import KINDS

    assert {plugin.kind.replace("-", " ") for plugin in PLUGINS.values()} >= set(KINDS)
