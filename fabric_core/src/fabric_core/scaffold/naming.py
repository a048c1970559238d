"""What a new distribution, its package, its part and its classes are called, and which names cannot be had."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import keyword
import re
from dataclasses import dataclass

import fabric_core
from fabric_core.errors import ConfigurationError
from fabric_core.registry import Registry
from fabric_core.scaffold.kinds import Kind

PREFIX = "fabric-"

_FORM = re.compile(r"[a-z](?:[a-z0-9-]{0,30}[a-z0-9])?")


@dataclass(frozen=True)
class Names:
    """What one new distribution and what is in it are called.

    Attributes:
        name: The part, as users ask for it: ``"acme-cluster"``.
        suffix: What the name of its class ends with.
    """

    name: str
    suffix: str

    @property
    def distribution(self) -> str:
        """What ``pip install`` is given."""
        return PREFIX + self.name

    @property
    def package(self) -> str:
        """What is imported."""
        return self.distribution.replace("-", "_")

    @property
    def variable(self) -> str:
        """What environment variables begin with."""
        return self.name.replace("-", "_").upper()

    @property
    def class_name(self) -> str:
        """The class of the part. The suffix is not said twice: ``AcmeLogger`` for a logger named ``acme-logger``."""
        words, end = self._words, len(self.suffix)
        own = words[:-end] if words.lower().endswith(self.suffix.lower()) else words
        name = own + self.suffix
        return f"Own{name}" if name in fabric_core.__all__ else name

    @property
    def options_name(self) -> str:
        """The class of its options."""
        return f"{self._words}Options"

    @property
    def _words(self) -> str:
        return "".join(word.capitalize() for word in self.name.split("-"))


def names_for(asked: str, kind: Kind) -> Names:
    """The names that follow from the one that was asked for, with or without ``fabric-`` in front.

    Raises:
        ConfigurationError: It is no name of a distribution, or one that means something else already.
    """
    name = re.sub(r"[-_.]+", "-", asked.lower()).removeprefix(PREFIX)
    if not _FORM.fullmatch(name):
        raise ConfigurationError(
            f"A plugin cannot be named {asked!r}. A name has letters a to z, digits and single '-' between them, at "
            "most 32 in all, and begins with a letter, such as 'acme' or 'acme-cluster'."
        )
    if keyword.iskeyword(name) or keyword.issoftkeyword(name) or name == "auto":
        raise ConfigurationError(
            f"A plugin cannot be named {asked!r}, because that is a word of "
            f"{'the command line' if name == 'auto' else 'Python'}. Choose another name, such as 'acme-{name}'."
        )
    return Names(name, kind.suffix)


def check_free(names: Names, kind: Kind, registry: Registry) -> None:
    """Refuse a name that is in use here. Looks at what is installed and imports no part.

    Raises:
        ConfigurationError: An installed part of that kind has it, or an installed distribution or package.
    """
    for offer in registry.offers(kind.name):
        if names.name in (*offer.spec.names, *getattr(offer.spec, "groups", ())):
            raise ConfigurationError(
                f"The {kind.name} {names.name!r} is there already, from {offer.distribution} {offer.version}. "
                "Choose another name: with two of one name, users would have to say which they mean."
            )
    taken = _taken(names)
    if taken:
        raise ConfigurationError(
            f"A plugin cannot be named {names.name!r}: {taken} is installed here already. Choose another name, or "
            "uninstall that first."
        )


def _taken(names: Names) -> str:
    """What is installed under the names of the distribution or its package; empty if nothing is."""
    try:
        version = importlib.metadata.version(names.distribution)
    except importlib.metadata.PackageNotFoundError:
        spec = importlib.util.find_spec(names.package)
        # Without an origin, it is but a folder of that name in the working directory.
        return f"a package {names.package}" if spec is not None and spec.origin is not None else ""
    return f"{names.distribution} {version}"
