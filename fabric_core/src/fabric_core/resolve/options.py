"""The options of a chosen part, from all who state some: its preset, a file, the command line, the code.

A later one of these lies over the earlier ones; the command line and the code have to agree. Where the part declares
its options (`fabric_core.resolve.declared`), each name and value is checked here, before anything is imported or
started. What goes together is the business of the dataclass (``__post_init__``), which is made when the part is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fabric_core.errors import ConfigurationError, OptionsError, did_you_mean, listing, unknown_option
from fabric_core.plan import Choice, OptionTable, Plan, Request
from fabric_core.registry import Registry
from fabric_core.resolve.declared import declared_options
from fabric_core.resolve.forms import Anything, Late, Unfit
from fabric_core.settings import flag
from fabric_core.specs import PartSpec

PRESET = "the preset"
CODE = "the code"
LINE = "the command line"

UNDECLARED = Anything(paths=False)


@dataclass(frozen=True)
class Stated:
    """What one source says of one option, read as the part wants it."""

    name: str
    value: Any
    source: str


class Reader:
    """Reads what is said of one part's options.

    Raises:
        OptionsError: The part has no such option, or the value does not fit. From every method.
    """

    def __init__(self, spec: PartSpec) -> None:
        self._owner = f"The {spec.kind} {spec.name!r}"
        self._declared = declared_options(spec)

    def code(self, options: Mapping[str, Any]) -> dict[str, Stated]:
        """What the code passes."""
        return {name: self._stated(name, value, CODE, "take") for name, value in options.items()}

    def line(self, texts: Mapping[str, str]) -> dict[str, Stated]:
        """What the command line says."""
        return {name: self._stated(name, text, LINE, "read") for name, text in texts.items()}

    def tables(self, tables: Iterable[OptionTable]) -> dict[str, Stated]:
        """What a file says, in one table per name of the part.

        Raises:
            ConfigurationError: Two tables differ.
        """
        found: dict[str, Stated] = {}
        for table in tables:
            for name, value in table.values.items():
                new = self._stated(name, value, table.source, "load")
                old = found.setdefault(name, new)
                if not _same(old.value, new.value):
                    raise ConfigurationError(
                        f"{old.source} says {name} = {old.value!r}, and {new.source} says {name} = {new.value!r}, "
                        "which is the same part. Keep one of them."
                    )
        return found

    def _stated(self, name: str, value: Any, source: str, door: str) -> Stated:
        if self._declared is None:
            return Stated(name, getattr(UNDECLARED, door)(value), source)
        option = self._declared.get(name)
        if option is None:
            raise unknown_option(self._owner, name, self._declared, source)
        try:
            return Stated(name, getattr(option.form, door)(value), source)
        except Unfit:
            near = did_you_mean(str(value), option.form.known)
            raise OptionsError(
                f"{self._owner} cannot take {name}={value!r} from {source}: it has to be {option.form.words}.{near}"
            ) from None


def lay_options(choice: Choice, request: Request) -> Choice:
    """The choice with all that was said of its options laid over those of its spec.

    Raises:
        OptionsError: An option is unknown or does not fit, or was given for an object that is made already.
        ConfigurationError: The code and the command line state different values.
    """
    code, texts = request.options.get(choice.kind) or {}, request.texts.get(choice.kind) or {}
    if choice.instance is not None:
        _refuse_for_instance(choice, code, texts)
        return choice
    tables = [table for table in request.tables if _is_for(table, choice)]
    if not (code or texts or tables):
        return with_options(choice, {})
    reader = Reader(choice.spec)
    filed, line, stated = reader.tables(tables), reader.line(texts), reader.code(code)
    _check_agreement(choice.kind, texts, line, stated)
    return _laid(choice, {**filed, **line, **stated})


def with_options(choice: Choice, options: Mapping[str, Any]) -> Choice:
    """The choice with options from code, and nothing else, laid over those of its spec.

    Raises:
        OptionsError: As for `lay_options`.
    """
    if choice.instance is not None:
        _refuse_for_instance(choice, options, {})
        return choice
    return _laid(choice, Reader(choice.spec).code(options) if options else {})


def check_texts(spec: PartSpec, texts: Mapping[str, str]) -> None:
    """Find out whether a part would take what the command line says.

    Raises:
        OptionsError: It would not.
    """
    Reader(spec).line(texts)


def check_preset(spec: PartSpec) -> None:
    """Find out whether the options that a spec itself passes are among those that it declares. For authors.

    Raises:
        OptionsError: They are not.
        BrokenPluginError: What it declares cannot be read.
    """
    Reader(spec).code(spec.options)


def unused_tables(plan: Plan, tables: Iterable[OptionTable], registry: Registry) -> Iterator[str]:
    """Sentences on tables of a file that the user may believe to be in force.

    Most tables of parts that were not chosen are for other jobs, or for other machines. Not so one whose name nobody
    has, and is nearly that of the chosen part.
    """
    for table in tables:
        chosen = [choice for choice in plan if choice.kind == table.kind]
        for choice in chosen:
            if choice.instance is not None and _is_for(table, choice):
                made = type(choice.instance).__qualname__
                yield f"{table.source} is not used: the code passes a {made} that is made already."
        installed = {name for offer in registry.offers(table.kind) for name in offer.spec.names}
        names = {name for choice in chosen for name in choice.spec.names}
        near = did_you_mean(table.name, names, cutoff=0.85)
        if near and table.name not in names | installed:
            yield f"{table.source} is not used: no installed {table.kind} has that name.{near}"


def _is_for(table: OptionTable, choice: Choice) -> bool:
    return table.kind == choice.kind and table.name in choice.spec.names


def _laid(choice: Choice, stated: Mapping[str, Stated]) -> Choice:
    options = {**choice.spec.options, **{name: one.value for name, one in stated.items()}}
    origins = {name: stated[name].source if name in stated else PRESET for name in options}
    changed = options or choice.options
    return replace(choice, options=options, origins=origins) if changed else choice


def _refuse_for_instance(choice: Choice, code: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    if not (code or texts):
        return
    raise OptionsError(
        f"Options for the {choice.kind} were given ({listing({*code, *texts})}), together with an instance of "
        f"{type(choice.instance).__qualname__}, which is made already. Give them to its constructor."
    )


def _check_agreement(
    kind: str, texts: Mapping[str, str], line: Mapping[str, Stated], code: Mapping[str, Stated]
) -> None:
    for name in line.keys() & code.keys():
        if not _same(line[name].value, code[name].value):
            raise ConfigurationError(
                f"The code says {name}={code[name].value!r} for the {kind}, and the command line says "
                f"{flag(kind, name)} {texts[name]}. Make them agree, or leave {name} out of the code so that the "
                "command line decides."
            )


def _same(one: Any, other: Any) -> bool:
    """Whether two values are the same option. A path is the same as the object that it leads to."""
    if one is other:
        return True
    if isinstance(one, Late) and not isinstance(other, str):
        return one == f"{getattr(other, '__module__', '')}:{getattr(other, '__qualname__', '')}"
    try:
        return bool(one == other)
    except Exception:  # values that are compared one by one, such as arrays
        return False
