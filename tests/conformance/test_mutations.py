"""Faults, planted one at a time in plugins that are right: each is caught, by a check whose name says what is wrong.

The plugins are those that ``fabric plugins new`` makes. Each is built as a wheel and unpacked, which is an installed
distribution for whoever has the folder on ``PYTHONPATH``; a fault changes one text in a copy of that folder. The faults
are in ``faults/*.toml``, one file per plugin.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import planting
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent / "faults"
AT_ONCE = 3  # some only wait
PATIENCE = 110  # seconds, for one
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
    """Makes the plugins, plants the faults, and runs checks, a few at a time.

    Each in a process of its own, which is forked from one that has imported what is slow.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        warm = multiprocessing.get_context("forkserver")
        warm.set_forkserver_preload(planting.PRELOADED)
        self.pool = warm.Pool(AT_ONCE, maxtasksperchild=1)
        made = {plugin.name: self._make(plugin) for plugin in PLUGINS.values()}
        for making in made.values():
            making.get(PATIENCE)
        self._runs: dict[int, Any] = {}

    def begin(self, wanted: list[Plugin | Fault]) -> None:
        """Run what will be asked for."""
        for each in wanted:
            run = self._run_plain if isinstance(each, Plugin) else self._run_planted
            self._runs[id(each)] = run(each)

    def found(self, wanted: Plugin | Fault) -> list[Any]:
        """What the kit reports of a plugin as it was made, or with a fault."""
        return list(self._runs[id(wanted)].get(PATIENCE))

    def _project(self, plugin: str) -> Path:
        """A folder with the tests of a plugin and, under ``site``, the plugin as it is installed."""
        return self.folder / plugin / "project"

    def _make(self, plugin: Plugin) -> Any:
        replaced = {name: FOLDER / source for name, source in plugin.replaced.items()}
        return self.pool.apply_async(planting.make, (plugin.kind, self._project(plugin.name), replaced))

    def _run_plain(self, plugin: Plugin) -> Any:
        return self.pool.apply_async(planting.run_checks, (self._project(plugin.name), plugin.checks))

    def _run_planted(self, fault: Fault) -> Any:
        project = self.folder / fault.plugin / f"with-fault-{FAULTS.index(fault)}"
        change = (fault.file, fault.old, fault.new)
        return self.pool.apply_async(
            planting.run_checks_with_fault, (self._project(fault.plugin), project, *change, fault.caught_by)
        )


@pytest.fixture(scope="module")
def workshop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    workshop = Workshop(tmp_path_factory.mktemp("mutations"))
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    workshop.begin([spec.params["planted"] for spec in parameters if spec and "planted" in spec.params])
    yield workshop
    workshop.pool.terminate()
    workshop.pool.join()


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
