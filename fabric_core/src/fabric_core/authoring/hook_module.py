"""Reading one hooks module: what importing it costs, what it registers, and which line made each spec."""

from __future__ import annotations

import importlib
import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

from fabric_core import hookspecs
from fabric_core.authoring.places import Place, Places
from fabric_core.errors import FabricError, listing
from fabric_core.hookspecs import PART_HOOKS
from fabric_core.plan import plain
from fabric_core.registry import loading
from fabric_core.specs import CommandSpec, PartSpec
from fabric_core.targets import import_target

PLUGIN = "plugin"


@dataclass
class Reading:
    """What reading one hooks module found.

    Attributes:
        place: Where the hooks module is.
        seconds: The CPU time that importing it took.
        heavy: The heavy packages that came in, each with what was imported then, and the author's line that began it.
        specs: The specs, each with its hook and the line that made it.
        faults: What was raised: the check, the sentence and the line.
        same: Whether the hooks say the same when they are called again.
    """

    place: Place
    seconds: float = 0.0
    heavy: dict[str, tuple[str, Place]] = field(default_factory=dict)
    specs: list[tuple[str, PartSpec | CommandSpec, Place]] = field(default_factory=list)
    faults: list[tuple[str, str, Place]] = field(default_factory=list)
    same: bool = True

    def fault(self, check: str, error: BaseException, places: Places, default: Place | None = None) -> None:
        """Keep something that was raised, where the author's line is not known at a default."""
        where = places.of_error(error) or default or self.place
        self.faults.append((check, f"{type(error).__name__}: {error}", where))


def read(module: str, file: str, places: Places) -> Reading:
    """Import a hooks module, and ask its hooks. To be called in a process that has imported nothing else.

    Args:
        module: Its dotted name.
        file: Its file.
        places: Knows the author's files.
    """
    reading = Reading((file, 0))
    made: dict[int, Place] = {}
    with _lines_of_specs(made, places):
        imported = _import(module, reading, places)
        if imported is not None:
            _ask(imported, reading, made, places)
    for _, spec, place in reading.specs:
        _import_light(spec, place, reading, places)
    return reading


def _import(module: str, reading: Reading, places: Places) -> ModuleType | None:
    with _watched(reading, f"the hooks module {module}", reading.place, places):
        started = time.process_time()
        try:
            return importlib.import_module(module)
        except (Exception, SystemExit) as error:
            reading.fault("import", error, places)
            return None
        finally:
            reading.seconds = time.process_time() - started


LIGHT = ("options_type", "detect")
"""What else of a spec is imported where nothing is trained."""


def _import_light(spec: PartSpec | CommandSpec, place: Place, reading: Reading, places: Places) -> None:
    """Import what is needed of a part before it was chosen. Whether that works is not the question here."""
    for what in LIGHT:
        path = getattr(spec, what, None)
        with _watched(reading, f"the {what} of the {spec.kind} {spec.name!r}", place, places):
            if isinstance(path, str):
                with suppress(FabricError, SystemExit):
                    import_target(path, what)


@contextmanager
def _watched(reading: Reading, what: str, place: Place, places: Places) -> Iterator[None]:
    """Within it, the first import of each heavy package is noted."""
    watch = _Watch(lambda name: reading.heavy.setdefault(name, (what, places.outermost() or place)))
    sys.meta_path.insert(0, watch)
    try:
        yield
    finally:
        sys.meta_path.remove(watch)


class _Watch:
    """Sees every import before it happens."""

    def __init__(self, note: Callable[[str], object]) -> None:
        self._note = note

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Find nothing; the finders behind it do."""
        if name in loading.HEAVY:
            self._note(name)


@contextmanager
def _lines_of_specs(made: dict[int, Place], places: Places) -> Iterator[None]:
    """Within it, every spec that is made leaves the line that makes it, under its ``id``."""
    undo = [_noting(spec_type, made, places) for spec_type in (PartSpec, CommandSpec)]
    try:
        yield
    finally:
        for restore in undo:
            restore()


def _noting(
    spec_type: type[PartSpec] | type[CommandSpec], made: dict[int, Place], places: Places
) -> Callable[[], None]:
    check: Any = spec_type.__post_init__

    def noting(spec: Any) -> None:
        place = places.innermost()
        if place is not None:
            made[id(spec)] = place
        check(spec)

    setattr(spec_type, "__post_init__", noting)  # noqa: B010  a method is not assigned to by accident here
    return partial(setattr, spec_type, "__post_init__", check)


def _ask(module: ModuleType, reading: Reading, made: dict[int, Place], places: Places) -> None:
    manager, sound = loading.new_manager(), {}
    for name, function, hook in _implementations(module):
        told = _wrong_argument(hook, function)
        if told:
            reading.faults.append(("hooks", told, places.of_definition(function) or reading.place))
        else:
            sound[name] = function
    manager.register(SimpleNamespace(**sound), name=PLUGIN)
    for hook in PART_HOOKS:
        try:
            specs = list(loading.specs_of(manager, PLUGIN, hook))
            again = list(loading.specs_of(manager, PLUGIN, hook))
        except (Exception, SystemExit) as error:
            reading.fault("specs", error, places, places.of_definition(getattr(module, hook, None)))
            continue
        reading.same = reading.same and list(map(spec_data, specs)) == list(map(spec_data, again))
        reading.specs += [(hook, spec, made.get(id(spec), reading.place)) for spec in specs]


def _implementations(module: ModuleType) -> Iterator[tuple[str, Any, str]]:
    """What a module marks as hooks that exist: its name, the function, and the hook."""
    manager = loading.new_manager()
    for name in dir(module):
        marker = manager.parse_hookimpl_opts(module, name)
        hook = (marker and marker["specname"]) or name
        if marker and hook in loading.HOOKS:
            yield name, getattr(module, name), hook


def _wrong_argument(hook: str, function: Any) -> str:
    """What a hook asks for and is not given, as a sentence; empty when there is no such thing."""
    given = inspect.signature(getattr(hookspecs, hook)).parameters
    wrong = [name for name in inspect.signature(function).parameters if name not in given]
    return (
        f"The hook {hook!r} is not called with {listing(wrong)}. It is given: {listing(given)}."
        if wrong
        else ""
    )


def spec_data(spec: PartSpec | CommandSpec) -> dict[str, Any]:
    """A spec as plain data."""
    target = spec.target_name if isinstance(spec, PartSpec) else spec.target
    more = {entry.name: plain(getattr(spec, entry.name)) for entry in fields(spec)}
    return {"kind": spec.kind, **more, "target": target}
