"""Importing the hooks modules, each in its own ``try``, and asking each for its specs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
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


def misspelled_hooks(manager: pluggy.PluginManager, module: object) -> list[str]:
    """A complaint for every hook implementation that implements no hook of ours."""
    known = [name for name in vars(hookspecs) if name.startswith("fabric_")]
    return [
        f"it implements a hook {name!r} that does not exist.{did_you_mean(name, known)}"
        for name in dir(module)
        if name not in known and manager.parse_hookimpl_opts(module, name) is not None
    ]


def specs_of(manager: pluggy.PluginManager, plugin: str, hook: str) -> Iterable[PartSpec | CommandSpec]:
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


def vetoes(manager: pluggy.PluginManager, plan: Any, on_error: Callable[[str, Exception], None]) -> Iterable[str]:
    """What the plugins say against a plan; one that raises is reported and does not stop the others."""
    for implementation in manager.hook.fabric_check_plan.get_hookimpls():
        try:
            sentence = implementation.function(*(plan for _ in implementation.argnames))
        except Exception as error:
            on_error(implementation.plugin_name, error)
        else:
            if sentence:
                yield f"{sentence} ({implementation.plugin_name})"


def may_offer_accelerators(module: str) -> bool:
    """Whether a hooks module that cannot be imported might have offered an accelerator.

    Its source is read, not run; where that is not possible, the answer is yes.
    """
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    for folder in (spec and spec.submodule_search_locations) or ():
        base = Path(folder, *rest)
        for source in (base.with_suffix(".py"), base / "__init__.py"):
            if source.is_file():
                return "fabric_accelerators" in source.read_text(errors="replace")
    return True
