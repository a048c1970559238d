"""The registry: names to specs, problems to sentences. It imports no PyTorch and no part that was not chosen.

[Note: problems wait] A plugin that is broken, blocked or odd never stops the others. What is wrong with it is kept,
and is shown when it matters: when its name is asked for, when a name is not found, and by ``fabric doctor``.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pluggy

from fabric_core.errors import (
    AmbiguousPluginError,
    BrokenPluginError,
    UnknownPluginError,
    did_you_mean,
    listing,
)
from fabric_core.hookspecs import PART_HOOKS
from fabric_core.registry import discovery, loading
from fabric_core.registry.discovery import Found
from fabric_core.registry.hints import install_hint
from fabric_core.registry.installed import canonical
from fabric_core.specs import AcceleratorSpec, CommandSpec, PartSpec

OWN_DISTRIBUTION = "fabric-core"
"""Who offers the reference parts."""


@dataclass(frozen=True)
class Offer:
    """One spec, and who offers it."""

    spec: PartSpec
    distribution: str
    version: str

    @property
    def full_name(self) -> str:
        """The form of the name that no other distribution can claim."""
        return f"{self.spec.name}@{self.distribution}"


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with an installed plugin.

    Attributes:
        distribution: Who has it.
        message: One sentence.
        cause: The exception, when there was one.
        hides_accelerators: Whether better hardware may be missing from the registry because of it.
        fatal: Whether the plugin's parts are missing because of it.
    """

    distribution: str
    message: str
    cause: BaseException | None = None
    hides_accelerators: bool = False
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.distribution} ({self.message})"


class Registry:
    """The parts that the installed distributions offer.

    Args:
        environ: Where ``FABRIC_PLUGINS_DENY``, ``FABRIC_PLUGINS_ALLOW`` (comma-separated distribution names) and
            ``FABRIC_PLUGINS_AUTOLOAD=0`` are read.
        find: Lists what is installed; a seam for tests.
    """

    def __init__(
        self,
        environ: Mapping[str, str] | None = None,
        find: Callable[[], list[Found]] = discovery.find_plugins,
    ) -> None:
        self._environ = os.environ if environ is None else environ
        self._find = find
        self._manager = loading.new_manager()
        self._seen: set[Found] = set()
        self._offers: list[Offer] = []
        self._by_kind: dict[str, list[Offer]] = {}
        self._by_word: dict[str, list[Offer]] = {}
        self.commands: list[tuple[CommandSpec, str]] = []
        self.problems: list[Problem] = []
        self.blocked: list[Found] = []
        self.discover()

    # -- filling --------------------------------------------------------------------------------------------------

    def discover(self) -> bool:
        """Load the plugins that are installed and not loaded yet.

        Returns:
            Whether there was anything new.
        """
        new = [found for found in self._find() if found not in self._seen]
        self._forget({canonical(found.distribution) for found in new})
        for found in new:
            self._seen.add(found)
            if self._is_blocked(found.distribution):
                self.blocked.append(found)
            elif self._manager.has_plugin(_plugin_name(found.distribution, found.module)):
                told = (
                    f"version {found.version} has been installed, but another one is at work until a restart"
                )
                self.problems.append(Problem(found.distribution, told, fatal=False))
            else:
                self._load(found)
        return bool(new)

    def _forget(self, distributions: set[str]) -> None:
        """Drop what was wrong with versions that have been replaced."""
        self.problems = [p for p in self.problems if canonical(p.distribution) not in distributions]

    def register(self, module: ModuleType | object, *, distribution: str, version: str = "0") -> None:
        """Register a hooks module by hand, for a test or where nothing can be installed.

        Args:
            module: A module, or any object, with functions marked ``@hookimpl``.
            distribution: The name under which its parts appear.
            version: The version under which they appear.
        """
        plugin = _plugin_name(distribution, getattr(module, "__name__", type(module).__name__))
        for complaint, meant in loading.odd_hooks(self._manager, module):
            self.problems.append(
                Problem(distribution, complaint, hides_accelerators="fabric_accelerators" in meant)
            )
        try:
            self._manager.register(module, name=plugin)
        except pluggy.PluginValidationError:
            self._manager.unregister(name=plugin)  # it has registered the hooks before the wrong one
            raise
        for hook in PART_HOOKS:
            self._collect(plugin, hook, distribution, version)

    def _load(self, found: Found) -> None:
        try:
            if found.error:
                raise ValueError(found.error)
            module, complaints = loading.import_hooks(found)
            self.problems += [Problem(found.distribution, text, fatal=False) for text in complaints]
            self.register(module, distribution=found.distribution, version=found.version)
        except (Exception, SystemExit) as error:
            hides = loading.may_offer_accelerators(found.module)
            self.report(found.distribution, error, hides_accelerators=hides)

    def _collect(self, plugin: str, hook: str, distribution: str, version: str) -> None:
        try:
            specs = list(loading.specs_of(self._manager, plugin, hook))
        except (Exception, SystemExit) as error:
            self.report(distribution, error, hides_accelerators=hook == "fabric_accelerators", where=hook)
            return
        for spec in specs:
            if isinstance(spec, CommandSpec):
                self.commands.append((spec, distribution))
            else:
                self._add(Offer(spec, distribution, version))

    def _add(self, offer: Offer) -> None:
        self._offers.append(offer)
        self._by_kind.setdefault(offer.spec.kind, []).append(offer)
        for word in {*offer.spec.names, *_groups(offer.spec)}:
            self._by_word.setdefault(word, []).append(offer)

    def report(
        self, distribution: str, error: BaseException, *, hides_accelerators: bool = False, where: str = ""
    ) -> None:
        """Keep a fault of a plugin, to be shown when it matters."""
        message = f"{where + ': ' if where else ''}{type(error).__name__}: {error}"
        self.problems.append(Problem(distribution, message, error, hides_accelerators))

    def _is_blocked(self, distribution: str) -> bool:
        name = canonical(distribution)
        if name == OWN_DISTRIBUTION:
            return False
        denied, allowed = (self._names(f"FABRIC_PLUGINS_{list_}") for list_ in ("DENY", "ALLOW"))
        unlisted = self._environ.get("FABRIC_PLUGINS_AUTOLOAD") == "0" or bool(allowed)
        return name in denied or (unlisted and name not in allowed)

    def _names(self, variable: str) -> set[str]:
        return {
            canonical(name.strip()) for name in self._environ.get(variable, "").split(",") if name.strip()
        }

    # -- looking up -----------------------------------------------------------------------------------------------

    def offers(self, *kinds: str) -> list[Offer]:
        """Everything on offer, of some kinds or of all."""
        if len(kinds) == 1:
            return [*self._by_kind.get(kinds[0], ())]
        return [offer for offer in self._offers if not kinds or offer.spec.kind in kinds]

    def named(self, kind: str | tuple[str, ...], name: str) -> list[Offer]:
        """The offers of a kind that have a name: as their name, alias or group, case aside; ``name@distribution`` too.

        Args:
            kind: The kind, or several.
            name: What the user wrote.

        Returns:
            At least one.

        Raises:
            UnknownPluginError: There is none, even after a second look at what is installed.
            BrokenPluginError: The distribution that was named is installed, but broken.
        """
        kinds = (kind,) if isinstance(kind, str) else kind
        found = self._matching(kinds, name)
        if not found:
            importlib.invalidate_caches()
            found = self._matching(kinds, name) if self.discover() else []
        if not found:
            raise self._unknown(kinds, name)
        return found

    def one(self, kind: str, name: str) -> Offer:
        """The one offer of a kind with a name. Errors as `named` and `only`."""
        return self.only(self.named(kind, name), name)

    def only(self, offers: list[Offer], asked: str) -> Offer:
        """The single offer of a list.

        Raises:
            AmbiguousPluginError: There are several.
        """
        if len(offers) > 1:
            raise _ambiguous(offers, asked)
        return offers[0]

    def _matching(self, kinds: tuple[str, ...], name: str) -> list[Offer]:
        name, _, distribution = name.strip().lower().partition("@")
        return [
            offer
            for offer in self._by_word.get(name, ())
            if offer.spec.kind in kinds
            and (not distribution or canonical(offer.distribution) == canonical(distribution))
        ]

    def _unknown(self, kinds: tuple[str, ...], name: str) -> Exception:
        bare, _, distribution = (part.strip() for part in name.partition("@"))
        broken = [problem for problem in self.problems if problem.fatal]
        for problem in broken:
            if distribution and canonical(problem.distribution) == canonical(distribution):
                error = BrokenPluginError(f"The {'/'.join(kinds)} {name!r} was asked for, but {problem}.")
                error.__cause__ = problem.cause
                return error
        specs = [offer.spec for offer in self.offers(*kinds)]
        near = did_you_mean(
            bare, {word for spec in specs for word in (spec.name, *spec.aliases, *_groups(spec))}
        )
        others = {
            o.spec.kind for o in self._offers if o.spec.kind not in kinds and bare.lower() in o.spec.names
        }
        blocked = {found.distribution for found in self.blocked}
        sentences = [
            f"No {'/'.join(kinds)} is named {name!r}.{near}",
            f"Installed: {listing({spec.name for spec in specs})}.",
            f"{bare!r} is the name of another kind of part: {listing(others)}." if others else "",
            f"Found but broken: {listing(map(str, broken))}." if broken else "",
            f"Blocked by FABRIC_PLUGINS_*: {listing(blocked)}." if blocked else "",
            install_hint(bare),
        ]
        return UnknownPluginError(" ".join(filter(None, sentences)))

    def check_plan(self, plan: Any) -> tuple[list[tuple[str, str]], list[str]]:
        """What plugins say against a plan, as distribution and sentence; and a sentence on each that failed to say."""
        return loading.vetoes(self._manager, plan)


def _plugin_name(distribution: str, module: str) -> str:
    return f"{distribution}:{module}"


def _groups(spec: PartSpec) -> tuple[str, ...]:
    return tuple(group.lower() for group in spec.groups) if isinstance(spec, AcceleratorSpec) else ()


def _ambiguous(offers: list[Offer], asked: str) -> AmbiguousPluginError:
    kind, owners = offers[0].spec.kind, {canonical(offer.distribution): offer for offer in offers}
    named = listing(f"{offer.distribution} {offer.version}" for offer in owners.values())
    if len(owners) == 1:
        return AmbiguousPluginError(
            f"{named} offers {len(offers)} parts of the kind {kind} under the name {asked!r}: "
            f"{listing(offer.spec.target_name for offer in offers)}. This is a fault of {offers[0].distribution}; "
            f"until it is repaired, ask for one by its path."
        )
    return AmbiguousPluginError(
        f"Several distributions offer a {kind} named {asked!r}: {named}. "
        f"Say which: {' or '.join(repr(offer.full_name) for offer in offers)}; or block one with "
        f"FABRIC_PLUGINS_DENY={offers[0].distribution}; or uninstall one."
    )


@functools.cache
def default_registry() -> Registry:
    """The registry of this process. Made once, at the first use."""
    return Registry()
