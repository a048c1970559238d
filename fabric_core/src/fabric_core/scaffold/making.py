"""Making a plugin: everything is decided, checked and filled in before anything is written."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fabric_core import __version__
from fabric_core.contract_versions import CURRENT
from fabric_core.registry import Registry
from fabric_core.scaffold.kinds import Kind, kind_named
from fabric_core.scaffold.naming import Names, check_free, names_for
from fabric_core.scaffold.placing import check_place, place
from fabric_core.scaffold.rendering import render
from fabric_core.scaffold.terms import DEFAULT, Author, author_from, licence_named


@dataclass(frozen=True)
class Made:
    """A new distribution.

    Attributes:
        kind: Of its part.
        names: What everything is called.
        folder: Where it is.
        files: What is in it, by paths in the folder.
    """

    kind: Kind
    names: Names
    folder: Path
    files: tuple[PurePosixPath, ...]

    @property
    def implementation(self) -> PurePosixPath:
        """The module with the class of the part, in the folder."""
        return PurePosixPath("src", self.names.package, f"{self.kind.module}.py")


def make_plugin(
    kind: str,
    name: str,
    registry: Registry,
    *,
    folder: Path | None = None,
    author: str | None = None,
    licence: str = DEFAULT,
) -> Made:
    """Write a complete distribution with one part, which works as it is.

    Args:
        kind: The kind of the part, its words joined in any way.
        name: What the part will be called; the distribution is called ``fabric-NAME``.
        registry: What is installed, whose names are taken.
        folder: Where to; it must not exist, or be empty. By default it is called as the distribution.
        author: Who holds the rights, perhaps with an address in angle brackets.
        licence: The SPDX name of a licence.

    Raises:
        ConfigurationError: Something of this cannot be had. Nothing has been written then.
    """
    what = kind_named(kind)
    names = names_for(name, what)
    spdx, terms = licence_named(licence)
    owner = author_from(f"The {names.distribution} developers" if author is None else author)
    place_to_be = Path(os.path.abspath(names.distribution if folder is None else folder))
    check_free(names, what, registry)
    check_place(place_to_be)
    files = render(what, terms, _values(what, names, owner, spdx))
    place(files, place_to_be)
    return Made(what, names, place_to_be, tuple(files))


def _values(kind: Kind, names: Names, author: Author, licence: str) -> dict[str, str]:
    requires = (f"fabric-core>={__version__}", *kind.requires)
    return {
        "api": str(CURRENT[kind.name]),
        "author": author.name,
        "author_entry": author.entry,
        "class_name": names.class_name,
        "dependencies": ", ".join(f'"{requirement}"' for requirement in requires),
        "distribution": names.distribution,
        "kind": kind.name,
        "license": licence,
        "name": names.name,
        "options_name": names.options_name,
        "package": names.package,
        "summary": f"The {kind.name} {names.name}",
        "variable": names.variable,
        "year": str(datetime.date.today().year),
    }
