"""Loading what specs point at: can it be imported, does it keep its contract, does it take its options?"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fabric_core.authoring.places import Place, Places
from fabric_core.contract_versions import adapted, is_spoken
from fabric_core.errors import FabricError, did_you_mean, listing
from fabric_core.registry.discovery import installed_version
from fabric_core.registry.installed import canonical
from fabric_core.requirements import missing_requirements
from fabric_core.resolve.asked import kind_of_class
from fabric_core.resolve.declared import REQUIRED, declared_options
from fabric_core.specs import CommandSpec, LoggerSpec, PartSpec
from fabric_core.targets import import_target

Told = tuple[str, str, Place, str]
"""A check, a sentence, the author's line, and ``"error"`` or ``"advice"``."""


@dataclass(frozen=True)
class Bench:
    """What is known when the parts of a plugin are loaded.

    Attributes:
        places: Knows the author's files.
        top: The plugin's top package.
        stated: The names of the packages that the distribution states to need, in the form of comparison.
    """

    places: Places
    top: str
    stated: tuple[str, ...]


def check_part(spec: PartSpec | CommandSpec, place: Place, bench: Bench) -> Iterator[Told]:
    """Load everything that a spec points at, and say what is wrong with it.

    Args:
        spec: The spec.
        place: The author's line that made it.
        bench: What else is known.
    """
    for what in ("probe", "detect"):
        path = getattr(spec, what, None)
        function, told = _loaded(path, spec, place, bench)
        yield from told
        if function is not None and not callable(function):
            yield "targets", f"{_name(spec)}: its {what} {path!r} is no function.", place, "error"
    target, told = _loaded(spec.target, spec, place, bench)
    yield from told
    if target is not None:
        yield from (
            _command(spec, target, place)
            if isinstance(spec, CommandSpec)
            else _class(spec, target, place, bench)
        )


def _name(spec: PartSpec | CommandSpec) -> str:
    return f"The {spec.kind} {spec.name!r}"


def _loaded(path: Any, spec: PartSpec | CommandSpec, place: Place, bench: Bench) -> tuple[Any, list[Told]]:
    """What a path names, ``None`` when it cannot be had; and what is wrong with it."""
    if path is None:
        return None, []
    try:
        return import_target(path, _name(spec)), []
    except FabricError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and not _is_own(cause, bench):
            return None, [_not_installed(cause, spec, bench.places.of_error(cause) or place, place, bench)]
        where = bench.places.of_error(cause) if cause is not None else None
        return None, [("targets", f"{error}{_near(cause)}", where or place, "error")]


def _is_own(error: ModuleNotFoundError, bench: Bench) -> bool:
    return (error.name or "").partition(".")[0] == bench.top


def _near(cause: BaseException | None) -> str:
    if isinstance(cause, AttributeError) and inspect.ismodule(cause.obj):
        names = {name.lower(): name for name in dir(cause.obj) if not name.startswith("_")}
        near = difflib.get_close_matches(str(cause.name).lower(), names, n=1)
        return f". Did you mean {names[near[0]]!r}?" if near else ""
    return ""


def _not_installed(
    error: ModuleNotFoundError, spec: PartSpec | CommandSpec, where: Place, place: Place, bench: Bench
) -> Told:
    """An import of a package that is not here: the users are told of it, or they are not."""
    module = (error.name or "").partition(".")[0]
    missing = missing_requirements(spec) if isinstance(spec, PartSpec) else []
    absent = [name for name in bench.stated if installed_version(name) is None]
    told = f"{_name(spec)} is not checked further: it"
    if missing:
        return "targets", f"{told} needs {listing(missing)}, which is not here.", place, "advice"
    bringing = [name for name in absent if canonical(module) in name]  # "yaml" is of "pyyaml"
    if bringing:
        sentence = (
            f"{told} imports {module!r}, which is not here; nor is {listing(bringing)}, which the distribution states "
            "to need. If an extra brings it, state it in requires=(…) as well."
        )
        return "targets", sentence, where, "advice"
    sentence = (
        f"{_name(spec)} imports {module!r}, which is not installed, and nobody tells the users to install it. State "
        "its package in requires=(…) and among the dependencies or in an extra."
    )
    return "targets", sentence, where, "error"


def _command(spec: CommandSpec, target: Any, place: Place) -> Iterator[Told]:
    import click

    if not isinstance(target, click.Command):
        yield (
            "contract",
            f"{_name(spec)} points at {spec.target!r}, which is no click command.",
            place,
            "error",
        )


def _class(spec: PartSpec, cls: Any, place: Place, bench: Bench) -> Iterator[Told]:
    if not _is_kind(spec, cls):
        wanted = "".join(word.capitalize() for word in spec.kind.split()).replace("Io", "IO")
        sentence = (
            f"{_name(spec)} points at {spec.target_name!r}, which does not derive from fabric_core.{wanted}."
        )
        yield "contract", sentence, place, "error"
        return
    if not is_spoken(spec):
        return
    keeps = adapted(cls, spec.kind, spec.api)
    left = getattr(keeps, "__abstractmethods__", ())
    if left:
        where = bench.places.of_definition(cls) or place
        sentence = f"{cls.__qualname__} lacks methods of the contract of a {spec.kind}: {listing(left)}."
        yield "contract", sentence, where, "error"
    yield from _options(spec, keeps, place)
    yield from _declared(spec, keeps, place)


def _is_kind(spec: PartSpec, cls: Any) -> bool:
    if not isinstance(cls, type):
        return False
    duck = spec.kind == LoggerSpec.kind and callable(getattr(cls, "log_metrics", None))
    return kind_of_class(cls) == spec.kind or duck


def _options(spec: PartSpec, cls: type, place: Place) -> Iterator[Told]:
    known = _keywords(cls)
    for name in spec.options:
        if known is not None and name not in known:
            near = did_you_mean(name, known)
            sentence = (
                f"{_name(spec)} passes the option {name!r}, which {cls.__qualname__} does not take.{near}"
            )
            yield "options", f"{sentence} It takes: {listing(known)}.", place, "error"


def _declared(spec: PartSpec, cls: type, place: Place) -> Iterator[Told]:
    """The options that the spec declares, against those that the class takes."""
    try:
        declared = declared_options(spec)
    except FabricError as error:
        yield "options", str(error), place, "error"
        return
    known = _keywords(cls)
    if known is None:
        return
    for name, option in (declared or {}).items():
        sentence = f"{_name(spec)} declares the option {name!r}, which {cls.__qualname__}"
        if name not in known:
            yield "options", f"{sentence} does not take.{did_you_mean(name, known)}", place, "error"
        elif not _same_default(option.default, known[name]):
            defaults = f"{_default(known[name])} there, {_default(option.default)} here"
            yield "options", f"{sentence} has with another default: {defaults}.", place, "error"


def _default(value: Any) -> str:
    return "none" if value is REQUIRED or value is inspect.Parameter.empty else repr(value)


def _same_default(declared: Any, default: Any) -> bool:
    if declared is REQUIRED or default is inspect.Parameter.empty:
        return declared is REQUIRED and default is inspect.Parameter.empty
    return bool(declared == default)


def _keywords(cls: type) -> dict[str, Any] | None:
    """The arguments of a class and their defaults; ``None`` when it may take any."""
    try:
        parameters = inspect.signature(cls).parameters.values()
    except ValueError:  # a class written in C says nothing of its arguments
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {p.name: p.default for p in parameters if p.kind is not p.VAR_POSITIONAL}
