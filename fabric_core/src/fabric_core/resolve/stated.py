"""What is stated of a part's options, read as the part wants it.

Where the part declares its options (`fabric_core.resolve.declared`), each name and value is checked here, before
anything is imported or started. What goes together is the business of the dataclass (``__post_init__``), which is made
when the part is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fabric_core.errors import ConfigurationError, OptionsError, did_you_mean, unknown_option
from fabric_core.plan import Late, OptionTable
from fabric_core.resolve.declared import declared_options
from fabric_core.resolve.forms import Anything, Unfit
from fabric_core.settings import flag
from fabric_core.specs import PartSpec

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


def check_agreement(
    kind: str, texts: Mapping[str, str], line: Mapping[str, Stated], code: Mapping[str, Stated]
) -> None:
    """See whether code and command line say the same.

    Raises:
        ConfigurationError: They do not.
    """
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
