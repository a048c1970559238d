"""Importing the hooks modules, each in its own ``try``, and asking each for its specs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pluggy

from fabric_core import hookspecs
from fabric_core.errors import did_you_mean
from fabric_core.registry.discovery import Found
from fabric_core.specs import CommandSpec, PartSpec

HEAVY = ("torch", "numpy", "pandas", "tensorflow", "jax")
"""Packages that a hooks module has no business importing."""

SLOW = 0.1
"""CPU seconds after which the import of a hooks module is reported."""


def new_manager() -> pluggy.PluginManager:
    """A plugin manager that knows our hooks and no plugin."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def import_hooks(found: Found) -> tuple[ModuleType, list[str]]:
    """Import one hooks module.

    Returns:
        The module, and complaints about what its import dragged in.
    """
    before, started = set(sys.modules), time.process_time()
    module = importlib.import_module(found.module)
    seconds = time.process_time() - started
    heavy = [name for name in HEAVY if name in sys.modules and name not in before]
    complaints = [f"its hooks module {found.module} imports {', '.join(heavy)}"] if heavy else []
    if seconds > SLOW and not heavy:
        complaints.append(f"its hooks module {found.module} takes {seconds:.1f} s of CPU time to import")
    return module, complaints


HOOKS: tuple[str, ...] = tuple(name for name in vars(hookspecs) if name.startswith("fabric_"))
"""The names of all hooks."""


def odd_hooks(manager: pluggy.PluginManager, module: object) -> Iterator[tuple[str, str]]:
    """Hooks that a plugin believes to implement, and does not: an unknown name, or no ``@hookimpl``.

    Yields:
        The complaint, and the hook that was probably meant (empty when none is near).
    """
    for name in dir(module):
        marker = manager.parse_hookimpl_opts(module, name)
        hook = (marker and marker["specname"]) or name
        if marker and hook not in HOOKS:
            meant = did_you_mean(hook, HOOKS)
            yield f"it implements a hook {hook!r} that does not exist.{meant}", meant
        elif name in HOOKS and not marker and callable(getattr(module, name)):
            yield f"its function {name!r} lacks the decorator @hookimpl, so it is not called", name


def specs_of(manager: pluggy.PluginManager, plugin: str, hook: str) -> Iterator[PartSpec | CommandSpec]:
    """What one plugin yields for one hook, checked for its type.

    Raises:
        TypeError: The plugin yields something else than specs.
    """
    for implementation in getattr(manager.hook, hook).get_hookimpls():
        if implementation.plugin_name != plugin:
            continue
        for spec in implementation.function() or ():
            if not isinstance(spec, PartSpec | CommandSpec):
                raise TypeError(f"{hook} has to yield specs, not {spec!r}")
            yield spec


def vetoes(manager: pluggy.PluginManager, plan: Any) -> tuple[list[tuple[str, str]], list[str]]:
    """Ask every plugin what it has against a plan.

    Returns:
        The vetoes, each as distribution and sentence; and complaints about plugins that failed to answer.
    """
    against: list[tuple[str, str]] = []
    failed: list[str] = []
    for implementation in manager.hook.fabric_check_plan.get_hookimpls():
        plugin = implementation.plugin_name.partition(":")[0]
        try:
            sentence = implementation.function(*(plan for _ in implementation.argnames))
        except (Exception, SystemExit) as error:
            failed.append(f"{plugin} could not check the plan: {type(error).__name__}: {error}")
        else:
            if sentence:
                against.append((plugin, str(sentence)))
    return against, failed


def may_offer_accelerators(module: str) -> bool:
    """Whether a hooks module that cannot be imported might have offered an accelerator.

    Its source is read, not run; where that is not possible, the answer is yes.
    """
    source = _source_of(module)
    return source is None or "fabric_accelerators" in source


def _source_of(module: str) -> str | None:
    """The source of a module, found without importing the packages around it; ``None`` when it cannot be found."""
    from pathlib import Path

    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
        if spec is None:
            return None
        folders = spec.submodule_search_locations
        bases = [Path(folder, *rest) for folder in folders] if folders else [Path(spec.origin or "")]
        files = [file for base in bases for file in (base.with_suffix(".py"), base / "__init__.py")]
        return next((file.read_text(errors="replace") for file in files if file.is_file()), None)
    except (ImportError, ValueError, OSError):  # a name that is none, or a module that hides where it is from
        return None
