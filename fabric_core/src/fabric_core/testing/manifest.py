"""The checks of a distribution as a whole: what its hooks module says, and whether that is true."""

from __future__ import annotations

import functools
import json
from typing import Any, ClassVar

import pytest

from fabric_core.authoring import Finding, check_installed
from fabric_core.registry import default_registry
from fabric_core.registry.discovery import find_plugins, installed_version
from fabric_core.registry.installed import canonical
from fabric_core.testing.conformance import Conformance
from fabric_core.testing.fresh import ask

SPIED = """
import os
from fabric_core import hookspecs, specs
from fabric_core.testing.programs.spying import spied_environment
modules = json.loads(sys.argv[1])
answer(spied_environment(modules))
"""


class ManifestConformance(Conformance):
    """Checks of what an installed distribution says of itself, each for one thing that can be wrong.

    They are those of ``fabric plugins check``; what is advice there fails here only where the check says so.

    Attributes:
        distribution: Its name, as ``pip install`` knows it (``"fabric-acme"``).
    """

    distribution: ClassVar[str]

    @classmethod
    def about(cls) -> dict[str, str]:
        """See `Conformance.about`."""
        version = installed_version(cls.distribution) or "not installed"
        return {
            "kind": "manifest",
            "name": cls.distribution,
            "distribution": cls.distribution,
            "version": version,
        }

    def test_it_is_installed_and_offers_something(self) -> None:
        """Its entry point is found, its hooks module is loaded, and the registry has its parts."""
        registry = default_registry()
        problems = [str(problem) for problem in registry.problems if self._is_own(problem.distribution)]
        offers = [offer for offer in registry.offers() if self._is_own(offer.distribution)]
        commands = [spec for spec, owner in registry.commands if self._is_own(owner)]
        assert not problems, "; ".join(problems)
        assert offers or commands, f"{self.distribution} offers nothing: no part and no command"

    def test_its_entry_points_name_modules_that_exist(self) -> None:
        """In the group ``fabric_core.plugins``."""
        self._hold("entry-point")

    def test_its_hooks_module_can_be_imported(self) -> None:
        """In a fresh process, in which nothing else was imported before."""
        self._hold("import")

    def test_importing_it_is_quick_and_brings_in_nothing_heavy(self) -> None:
        """Less than 50 ms of CPU time, and neither PyTorch nor its like: every command imports every hooks module."""
        self._hold("light")

    def test_it_says_the_same_in_every_process(self) -> None:
        """Whatever the seed of hashes, and when it is asked again: on two ranks a name means the same part."""
        self._hold("deterministic")

    def test_it_neither_reads_nor_changes_the_environment(self) -> None:
        """What it offers must not depend on who asks: variables are for probes and detections."""
        modules = [found.module for found in find_plugins() if self._is_own(found.distribution)]
        found = ask(SPIED, json.dumps(modules))
        assert not found["read"], f"importing it, or asking its hooks, reads {', '.join(found['read'])}"
        assert not found["changed"], (
            f"importing it, or asking its hooks, changes {', '.join(found['changed'])}"
        )

    def test_every_hook_exists_and_is_marked(self) -> None:
        """A misspelt hook, or one without ``@hookimpl``, is never called."""
        self._hold("hooks")

    def test_every_spec_can_be_made_and_no_name_is_there_twice(self) -> None:
        """Names are words, tuples are tuples; and within a kind each name means one part."""
        self._hold("specs")

    def test_targets_probes_detections_and_commands_can_be_imported(self) -> None:
        """Or the error names what has to be installed for them, and by which extra."""
        self._hold("targets")

    def test_targets_keep_the_contract_of_their_kind(self) -> None:
        """They derive from it, and no method is left abstract."""
        self._hold("contract")

    def test_classes_take_the_options_of_their_specs(self) -> None:
        """A preset with an option that the class does not have fails where it is used."""
        self._hold("options")

    def test_this_core_speaks_the_versions_that_it_was_written_for(self) -> None:
        """Of each kind's contract."""
        self._hold("version")

    def test_requirements_are_those_that_pip_installs(self) -> None:
        """What a part requires, the distribution brings, itself or by an extra, in versions that the part accepts."""
        self._hold("requires")

    def test_no_other_distribution_has_parts_of_its_names(self) -> None:
        """Where both are installed, the name alone would be refused."""
        self._hold("clash")

    def test_its_dependency_on_the_core_is_stated_without_an_upper_bound(self) -> None:
        """The version of the contract is what decides."""
        self._hold("core")

    def test_its_package_is_typed(self) -> None:
        """A file ``py.typed`` was installed with it."""
        self._hold("package", advice=True)

    def test_nothing_else_is_wrong(self) -> None:
        """Whatever ``fabric plugins check`` has learnt since."""
        others = [finding for finding in self._findings() if finding.is_error and finding.check not in HELD]
        assert not others, _told(others)

    # -- how it is asked ------------------------------------------------------------------------------------------

    def _is_own(self, distribution: str) -> bool:
        return canonical(distribution) == canonical(self.distribution)

    def _findings(self) -> tuple[Finding, ...]:
        if installed_version(self.distribution) is None:
            pytest.fail(f"{self.distribution} is not installed")
        return _findings_of(self.distribution)

    def _hold(self, check: str, advice: bool = False) -> None:
        found = [each for each in self._findings() if each.check == check and (advice or each.is_error)]
        assert not found, _told(found)


HELD = (
    *("entry-point", "import", "light", "deterministic", "hooks", "specs", "targets", "contract", "options"),
    *("version", "requires", "clash", "core", "package"),
)
"""The checks that have a test of their own."""


@functools.cache
def _findings_of(distribution: str) -> tuple[Finding, ...]:
    """Everything at once: it takes two fresh processes."""
    return tuple(check_installed(distribution))


def _told(findings: Any) -> str:
    return "\n".join(f"{finding.path}:{finding.line}: {finding.message}" for finding in findings)
