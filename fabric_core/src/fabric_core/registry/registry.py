"""The registry: names to specs, problems to sentences. It imports no PyTorch and no part that was not chosen.

[Note: problems wait] A plugin that is broken, blocked or odd never stops the others. What is wrong with it is kept,
and is shown when it matters: when its name is asked for, when a name is not found, and by ``fabric doctor``.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fabric_core.errors import AmbiguousPluginError, BrokenPluginError, UnknownPluginError, did_you_mean, listing
from fabric_core.hookspecs import PART_HOOKS
from fabric_core.registry import discovery, loading
from fabric_core.registry.discovery import Found, canonical
from fabric_core.registry.hints import install_hint
from fabric_core.specs import AcceleratorSpec, CommandSpec, PartSpec

OWN_DISTRIBUTION = "fabric-core"


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
        self._seen: set[tuple[str, str, str]] = set()
        self._offers: list[Offer] = []
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
        new = [found for found in self._find() if (found.distribution, found.version, found.name) not in self._seen]
        for found in new:
            self._seen.add((found.distribution, found.version, found.name))
            if self._is_blocked(found.distribution):
                self.blocked.append(found)
            else:
                self._load(found)
        return bool(new)

    def register(self, module: ModuleType | object, *, distribution: str, version: str = "0") -> None:
        """Register a hooks module by hand, for a test or where nothing can be installed.

        Args:
            module: A module, or any object, with functions marked ``@hookimpl``.
            distribution: The name under which its parts appear.
            version: The version under which they appear.
        """
        plugin = f"{distribution}:{getattr(module, '__name__', type(module).__name__)}"
        for complaint in loading.misspelled_hooks(self._manager, module):
            self.problems.append(Problem(distribution, complaint, fatal=False))
        self._manager.register(module, name=plugin)
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
        except Exception as error:
            self.report(distribution, error, hides_accelerators=hook == "fabric_accelerators", where=hook)
            return
        for spec in specs:
            if isinstance(spec, CommandSpec):
                self.commands.append((spec, distribution))
            else:
                self._offers.append(Offer(spec, distribution, version))

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
        return {canonical(name.strip()) for name in self._environ.get(variable, "").split(",") if name.strip()}

    # -- looking up -----------------------------------------------------------------------------------------------

    def offers(self, kind: str | None = None) -> list[Offer]:
        """Everything on offer, of one kind or of all."""
        return [offer for offer in self._offers if kind is None or offer.spec.kind == kind]

    def named(self, kind: str, name: str) -> list[Offer]:
        """The offers of a kind that have a name: as their name, alias or group, case aside; ``name@distribution`` too.

        Raises:
            UnknownPluginError: There is none, even after a second look at what is installed.
            BrokenPluginError: The distribution that was named is installed, but broken.
        """
        found = self._matching(kind, name)
        if not found:
            importlib.invalidate_caches()
            found = self._matching(kind, name) if self.discover() else []
        if not found:
            raise self._unknown(kind, name)
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

    def _matching(self, kind: str, name: str) -> list[Offer]:
        name, _, distribution = name.strip().lower().partition("@")
        return [
            offer
            for offer in self.offers(kind)
            if (name in offer.spec.names or name in _groups(offer.spec))
            and (not distribution or canonical(offer.distribution) == canonical(distribution))
        ]

    def _unknown(self, kind: str, name: str) -> Exception:
        bare, _, distribution = name.partition("@")
        broken = [problem for problem in self.problems if problem.fatal]
        for problem in broken:
            if distribution and canonical(problem.distribution) == canonical(distribution):
                error = BrokenPluginError(f"The {kind} {name!r} was asked for, but {problem}.")
                error.__cause__ = problem.cause
                return error
        names = {offer.spec.name for offer in self.offers(kind)}
        groups = {group for offer in self.offers(kind) for group in (*offer.spec.aliases, *_groups(offer.spec))}
        sentences = [
            f"No {kind} is named {name!r}.{did_you_mean(bare, names | groups)}",
            f"Installed: {listing(names)}.",
            self._elsewhere(kind, bare),
            f"Found but broken: {listing(map(str, broken))}." if broken else "",
            f"Blocked by FABRIC_PLUGINS_*: {listing(f.distribution for f in self.blocked)}." if self.blocked else "",
            install_hint(bare),
        ]
        return UnknownPluginError(" ".join(sentence for sentence in sentences if sentence))

    def _elsewhere(self, kind: str, name: str) -> str:
        kinds = {o.spec.kind for o in self._offers if o.spec.kind != kind and name.lower() in o.spec.names}
        return f"There is a {listing(kinds)} of that name." if kinds else ""

    def check_plan(self, plan: Any) -> Iterator[str]:
        """What the plugins say against a plan, one sentence each."""
        yield from loading.vetoes(self._manager, plan, lambda plugin, error: self.report(plugin, error))


def _groups(spec: PartSpec) -> tuple[str, ...]:
    return tuple(group.lower() for group in spec.groups) if isinstance(spec, AcceleratorSpec) else ()


def _ambiguous(offers: Iterable[Offer], asked: str) -> AmbiguousPluginError:
    offers = list(offers)
    owners = listing(f"{offer.distribution} {offer.version}" for offer in offers)
    first = offers[0]
    return AmbiguousPluginError(
        f"Several distributions offer a {first.spec.kind} named {asked!r}: {owners}. "
        f"Say which: {' or '.join(repr(offer.full_name) for offer in offers)}; or block one with "
        f"FABRIC_PLUGINS_DENY={first.distribution}; or uninstall one."
    )


@functools.cache
def default_registry() -> Registry:
    """The registry of this process. Made once, at the first use."""
    return Registry()
