"""The options of a chosen part, from all who state some: its preset, a file, the command line, the code.

A later one of these lies over the earlier ones; the command line and the code have to agree. What a part takes is the
business of `fabric_core.resolve.stated`, which is imported when somebody states something.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fabric_core.errors import OptionsError, did_you_mean, listing
from fabric_core.plan import Choice, OptionTable, Plan, Request
from fabric_core.registry import Registry

if TYPE_CHECKING:
    from fabric_core.resolve.stated import Stated

PRESET = "the preset"


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
    from fabric_core.resolve.stated import Reader, check_agreement

    reader = Reader(choice.spec)
    filed, line, stated = reader.tables(tables), reader.line(texts), reader.code(code)
    check_agreement(choice.kind, texts, line, stated)
    return _laid(choice, {**filed, **line, **stated})


def with_options(choice: Choice, options: Mapping[str, Any]) -> Choice:
    """The choice with options from code, and nothing else, laid over those of its spec.

    Raises:
        OptionsError: As for `lay_options`.
    """
    if choice.instance is not None:
        _refuse_for_instance(choice, options, {})
        return choice
    if not options:
        return _laid(choice, {})
    from fabric_core.resolve.stated import Reader

    return _laid(choice, Reader(choice.spec).code(options))


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
