"""The options that a part declares: the fields of its spec's ``options_type``, which is imported when it is needed."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from fabric_core.errors import BrokenPluginError
from fabric_core.resolve.annotations import form_of
from fabric_core.resolve.forms import Form
from fabric_core.specs import PartSpec
from fabric_core.targets import import_target

REQUIRED = MISSING
"""The default of an option that has none."""


@dataclass(frozen=True)
class Option:
    """One option of a part.

    Attributes:
        name: The constructor's keyword.
        form: What its value may be.
        default: What the part takes without it; `REQUIRED` when it cannot be left out.
        help: What it is, for people: the field's ``metadata["help"]``, or what the docstring says of it.
    """

    name: str
    form: Form
    default: Any = REQUIRED
    help: str = ""


def declared_options(spec: PartSpec) -> dict[str, Option] | None:
    """The options that a part declares, by name; ``None`` when it declares nothing, and takes what it is given.

    Raises:
        BrokenPluginError: ``options_type`` cannot be imported, is no dataclass, or has annotations that cannot be read.
    """
    if spec.options_type is None:
        return None
    cls = options_class(spec)
    try:
        return _options_of(cls)
    except Exception as error:
        raise BrokenPluginError(
            f"{_owner(spec)} has the options_type {cls.__qualname__!r}, whose annotations cannot be read: "
            f"{type(error).__name__}: {error}"
        ) from error


def options_class(spec: PartSpec) -> type:
    """The dataclass of a spec that states one.

    Raises:
        BrokenPluginError: It cannot be imported, or is no dataclass.
    """
    cls = import_target(spec.options_type, f"the options_type of {_owner(spec, the='the')}")
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise BrokenPluginError(
            f"{_owner(spec)} has the options_type {spec.options_type!r}, which is no dataclass."
        )
    return cls


@cache
def _options_of(cls: type) -> dict[str, Option]:
    hints, said = get_type_hints(cls), dict(_documented(cls))
    return {
        each.name: Option(
            each.name,
            form_of(hints[each.name]),
            _default(each),
            each.metadata.get("help") or said.get(each.name, ""),
        )
        for each in fields(cls)
        if each.init
    }


def _default(each: Field[Any]) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()


_ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*)(?: \([^)]*\))?: +(?P<text>.*)")
"""One line of a docstring that begins with what it explains."""


def _documented(cls: type) -> Iterator[tuple[str, str]]:
    """What the docstrings of a class and of its bases, these first, say of names in ``Args:`` or ``Attributes:``."""
    for base in reversed(cls.__mro__):
        sections = re.split(
            r"^(\w+):\n", inspect.cleandoc(vars(base).get("__doc__") or ""), flags=re.MULTILINE
        )
        for title, body in zip(sections[1::2], sections[2::2], strict=True):
            if title in ("Args", "Attributes"):
                yield from _entries(body)


def _entries(body: str) -> Iterator[tuple[str, str]]:
    block = re.match(r"(?:(?: .*)?\n)*(?: .*)?", body)
    lines = textwrap.dedent(block.group() if block else "")
    for entry in re.split(r"\n(?=\S)", lines):
        found = _ENTRY.match(" ".join(entry.split()))
        for name in found["names"].split(", ") if found else ():
            yield name, found["text"] if found else ""


def _owner(spec: PartSpec, the: str = "The") -> str:
    return f"{the} {spec.kind} {spec.name!r}"
